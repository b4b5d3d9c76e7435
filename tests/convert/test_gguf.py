"""GGUF files: the gguf package reads our files, round trips, rounding by kind, vocabularies."""

import json
import os
import shutil
import struct
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.convert import gguf as ours
from llmctl.data.tokenizers import loading
from llmctl.model import weights
from llmctl.model.config import ModelConfig
from llmctl.model.families.llama import LLAMA3_ROPE


@pytest.fixture(scope="session")
def files(saved, tmp_path_factory):
    """kind -> the tiny Llama as a file of that kind, made once."""
    from llmctl.convert import exporting

    made = {}

    def make(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp(kind) / "out"
            assert exporting.run(saved, out, to="gguf", kind=kind)["parity"] < 1e-4
            made[kind] = out / "model.gguf"
        return made[kind]

    return make


def test_rows_of_queries_are_paired_as_llama_cpp_rotates_them():
    w = np.arange(8)[:, None]  # one head of 4 after the other: halves (0, 1) and (2, 3)
    np.testing.assert_array_equal(ours.interleaved(w, 2).ravel(), [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(ours.halves(ours.interleaved(w, 2), 2), w)


def test_metadata_names_and_types_are_those_of_llama_cpp(files, config, params):
    reader = gguf.GGUFReader(files("q4_0"))
    said = {k: f.contents() for k, f in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert (said["llama.block_count"], said["llama.attention.head_count_kv"]) == (3, 2)
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "smollm"
    tensors = {t.name: t for t in reader.tensors}
    kinds = {n: tensors[n].tensor_type.name for n in ("token_embd.weight", "blk.0.attn_k.weight", "output_norm.weight")}
    assert kinds == {"token_embd.weight": "Q8_0", "blk.0.attn_k.weight": "Q4_0", "output_norm.weight": "F32"}
    q = {t.name: t for t in gguf.GGUFReader(files("f32")).tensors}["blk.1.attn_q.weight"].data
    theirs = np.asarray(params["decoder"]["blocks"]["attn"]["q"]["kernel"])[1].T
    np.testing.assert_array_equal(q.reshape(64, 64)[:4], theirs[[0, 8, 1, 9]])


@pytest.mark.parametrize(
    ("kind", "worst"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 0.01), ("q5_1", 0.06), ("q4_0", 0.15), ("q4_1", 0.15)]
)
def test_comes_back_with_the_rounding_of_its_kind_and_no_more(kind, worst, files, call, tmp_path, saved):
    code, made, err = call("import", files(kind), "--out", tmp_path / "a")
    assert code == 0, err
    a, b = artifact.load(saved), artifact.load(tmp_path / "a")
    assert b.model == a.model
    assert not b.manifest.pruned  # zeros of rounding are no mask
    for part in ("q", "k", "v", "o"):
        x, y = (np.asarray(f.params["decoder"]["blocks"]["attn"][part]["kernel"]) for f in (a, b))
        assert np.linalg.norm(x - y) <= worst * np.linalg.norm(x)
    if kind == "f32":
        assert made["digest"] == a.manifest.digest
    text = "The cat looked at 345, it's so!\n\nünï"
    ids = loading.load(a.tokenizer_dir).encode(text)
    assert loading.load(b.tokenizer_dir).encode(text) == ids
    assert loading.load(b.tokenizer_dir).decode(ids) == text


def test_rotary_factors_of_llama3_are_those_of_transformers():
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cfg = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    scaled = ROPE_INIT_FUNCTIONS["llama3"](cfg, torch.device("cpu"))[0].numpy()
    plain = 5e5 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(ours.llama3_factors(LLAMA3_ROPE, 5e5, 64), plain / scaled, rtol=1e-5)


FAMILIES = {
    "llama-biases": {"family": "llama", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "llama3": {"family": "llama", "rope_scaling": LLAMA3_ROPE, "tied": True},
    "mistral": {"family": "mistral", "window": 5},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "gemma2": {"family": "gemma2", "attn_scale": 16**-0.5, "window": 5},
    "gemma3": {"family": "gemma3", "attn_scale": 16**-0.5, "window": 5},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_relatives_of_llama_go_there_and_back(name, save, wild, words, call, tmp_path):
    sizes = {"d_model": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "d_ff": 64, "max_seq_len": 64}
    cfg = ModelConfig(vocab_size=words.vocab_size, **sizes, **FAMILIES[name])
    made = save(cfg, wild(cfg))
    code, said, err = call("export", made, "--to", "gguf", "--type", "f32", "--out", tmp_path / "g")
    assert code == 0, err
    assert said["parity"] < 1e-4
    assert ("without its window" in err) == (name == "mistral")
    metadata = gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields
    assert metadata[f"{metadata['general.architecture'].contents()}.context_length"].contents() == 64
    assert call("import", tmp_path / "g" / "model.gguf", "--out", tmp_path / "a")[0] == 0
    back = artifact.read_manifest(tmp_path / "a").model
    assert {k: v for k, v in back if v != getattr(cfg, k)} == {}


@pytest.mark.parametrize("gone", ["attn_output", "attn_k", "ffn_gate"])
def test_a_bias_that_the_file_lacks_is_zero(gone, save, wild, words, call, tmp_path, batch, logits):
    sizes = {"d_model": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "d_ff": 64, "max_seq_len": 64}
    cfg = ModelConfig(vocab_size=words.vocab_size, **sizes, **FAMILIES["llama-biases"])
    assert call("export", save(cfg, wild(cfg)), "--to", "gguf", "--type", "f32", "--out", tmp_path / "g")[0] == 0
    args = (tmp_path / "g" / "model.gguf", "--out", tmp_path / "a", "--drop", rf"blk\.\d+\.{gone}\.bias")
    code, _, err = call("import", *args)
    assert code == 0, err
    flat = weights.flatten(wild(cfg))
    part = {"attn_output": "attn/o", "attn_k": "attn/k", "ffn_gate": "mlp/gate"}[gone]
    path = f"decoder/blocks/{part}/bias"
    expected = logits(cfg, weights.unflatten(flat | {path: jnp.zeros_like(flat[path])}), batch)
    np.testing.assert_allclose(logits(cfg, artifact.load(tmp_path / "a").params, batch), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_biases_that_llama_cpp_does_not_read_are_refused(name, save, wild, words, call, tmp_path):
    sizes = {"d_model": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "d_ff": 64, "max_seq_len": 64}
    cfg = ModelConfig(vocab_size=words.vocab_size, **sizes, **FAMILIES[name], qkv_bias=True, out_bias=True)
    code, _, err = call("export", save(cfg, wild(cfg)), "--to", "gguf", "--out", tmp_path / "g")
    assert code == 2
    assert "llama.cpp reads no such biases" in err and "--drop" not in err


@pytest.fixture(scope="session")
def pieces():
    from llmctl.data.config import TokenizerConfig

    texts = [f"{a}{b} {b}{a}" for a in ("ka", "mo", "ri", "ten", "lu") for b in ("san", "pe", "do", "shi")]
    return loading.train(texts, TokenizerConfig(kind="bpe", vocab_size=280, normalize="identity"))


@pytest.mark.parametrize("case", ["same", "added", "metaspace"])
def test_a_sentencepiece_model_beside_the_same_tokenizer_json_goes_to_gguf(case, pieces, wild, call, tmp_path):
    """Llama 2, Mistral, TinyLlama and Gemma folders: llama.cpp has no name for how their tokenizer.json splits text."""
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    from llmctl.convert import hf_export, sentencepiece_json
    from llmctl.evaluate.tasks.registry import default

    made = sentencepiece_json.convert(pieces)
    if case == "added":
        made.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    if case == "metaspace":  # as transformers writes it since 2024
        made.normalizer = normalizers.Sequence([])
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    sizes = {"d_model": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 32, "max_seq_len": 64}
    cfg = ModelConfig(family="llama", vocab_size=288, **sizes)
    config = hf_export.config_of(cfg, default(cfg), [], {}, "float32")
    hf_export.save(tmp_path / "hf", config, hf_export.tensors_of(cfg, wild(cfg)))
    (tmp_path / "hf" / "tokenizer.json").write_text(made.to_str())
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(said))
    assert call("import", tmp_path / "hf", "--out", tmp_path / "without")[0] == 0
    code, _, err = call("export", tmp_path / "without", "--to", "gguf", "--out", tmp_path / "x")
    assert code == 2
    assert "a folder that also has a tokenizer.model of the same tokens" in err
    (tmp_path / "hf" / "tokenizer.model").write_bytes(pieces.model)
    assert call("import", tmp_path / "hf", "--out", tmp_path / "a")[0] == 0
    words = loading.load(tmp_path / "a" / "tokenizer")
    assert words.kind == "json"
    code, _, err = call("export", tmp_path / "a", "--to", "gguf", "--type", "f32", "--out", tmp_path / "g")
    assert code == 0, err
    assert ("adds a space before a text that begins with one" in err) == (case == "metaspace")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.scores"]) == 288
    if case == "added":
        assert fields["tokenizer.ggml.tokens"][280] == "<|im_start|>"
        assert fields["tokenizer.ggml.token_type"][280] == gguf.TokenType.CONTROL
    assert call("import", tmp_path / "g" / "model.gguf", "--out", tmp_path / "b")[0] == 0
    back = loading.load(tmp_path / "b" / "tokenizer")
    for text in ("kasan pedo, ünï 你", "mo  ri\n\nten"):
        assert back.prompt(text) == words.prompt(text)
    assert (back.bos_id, back.eos_id) == (words.bos_id, words.eos_id)


def test_a_sentencepiece_model_of_other_tokens_is_not_taken(pieces, tmp_path):
    from llmctl.convert import sentencepiece_json
    from llmctl.data.config import TokenizerConfig
    from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

    words = JsonTokenizer(sentencepiece_json.convert(pieces).to_str().encode(), special={"eos": "</s>"})
    texts = [f"{a} {b}" for a in ("una", "voz", "que", "dice") for b in ("tarde", "noche", "siempre")]
    other = loading.train(texts, TokenizerConfig(kind="bpe", vocab_size=280, normalize="identity"))
    for model, taken in ((other.model, False), (b"nothing", False), (pieces.model, True)):
        (tmp_path / "tokenizer.model").write_bytes(model)
        assert (sentencepiece_json.model_beside(words, tmp_path) is not None) == taken


def test_what_llama_cpp_does_otherwise_with_a_vocabulary_is_said():
    from llmctl.convert import gguf_vocabulary
    from llmctl.data.config import TokenizerConfig

    texts = [f"{a}{b} {b}{a}" for a in ("ka", "mo", "ri", "ten", "lu") for b in ("san", "pe", "do", "shi")]
    said = {}
    for kind, normalize in (("bpe", "identity"), ("bpe", "nfkc"), ("unigram", "identity")):
        words = loading.train(texts, TokenizerConfig(kind=kind, vocab_size=280, normalize=normalize))
        said[kind, normalize] = gguf_vocabulary._difference(words)
    assert said["bpe", "identity"] == ""
    assert "does not normalize" in said["bpe", "nfkc"]
    assert "unknown token" in said["unigram", "identity"]


def test_llama_3_begins_where_its_file_does_not_say_so(tmp_path):
    from llmctl.convert import gguf_vocabulary, tokenizer_export

    for pre, said in (("llama-bpe", True), ("smollm", False)):
        writer = gguf.GGUFWriter(tmp_path / f"{pre}.gguf", "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["<|begin_of_text|>", "<|end_of_text|>", "a", "aa"])
        writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 2)
        writer.add_token_merges(["a a"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        words = loading.load(gguf_vocabulary.read(tmp_path / f"{pre}.gguf", tmp_path / pre))
        assert words.prompt("a") == [0] * said + [2]
        (tmp_path / f"{pre}-hf").mkdir()
        tokenizer_export.export_tokenizer(tmp_path / pre, tmp_path / f"{pre}-hf", ModelConfig(vocab_size=4))
        assert loading.load(tmp_path / f"{pre}-hf").prompt("a") == words.prompt("a")


def test_every_end_token_of_a_file_ends_an_answer(saved, call, tmp_path):
    """The end of a turn too; llama.cpp guesses it from the spelling if the file has no key for it."""
    from llmctl.convert import gguf_vocabulary
    from llmctl.model.generate.continuations import end_ids

    for name, key in (("<|eot_id|>", False), ("<stop>", True), ("<other>", False)):
        file = tmp_path / f"{key}{len(name)}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["<|begin_of_text|>", "<|end_of_text|>", "a", name, "<|eom_id|>"])
        writer.add_token_types([*[gguf.TokenType.CONTROL] * 2, gguf.TokenType.NORMAL, *[gguf.TokenType.CONTROL] * 2])
        writer.add_token_merges([])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_eom_token_id(4)
        if key:
            writer.add_eot_token_id(3)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        folder = gguf_vocabulary.read(file, tmp_path / f"{key}{len(name)}")
        assert end_ids(folder, loading.load(folder)) == ([1, 4] if name == "<other>" else [1, 3, 4])
    # and a file that is written says them
    shutil.copytree(saved, tmp_path / "a")
    (tmp_path / "a" / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    artifact.write_manifest(tmp_path / "a", artifact.read_manifest(tmp_path / "a"))
    assert call("export", tmp_path / "a", "--to", "gguf", "--out", tmp_path / "g")[0] == 0
    said = gguf.GGUFReader(tmp_path / "g" / "model.gguf").fields
    assert said["tokenizer.ggml.eos_token_id"].contents() == 2
    assert said["tokenizer.ggml.eot_token_id"].contents() == 0


def test_tensors_of_a_file_can_be_left_out_by_either_name(files, call, tmp_path):
    for n, name in enumerate((r"blk\.\d+\.ffn_up\.weight", r".*up_proj.*")):
        code, _, err = call("import", files("f32"), "--out", tmp_path / "a", "--drop", name)
        assert code == 2
        assert "missing tensors model.layers.0.mlp.up_proj.weight" in err, n
    code, _, err = call("import", files("f32"), "--out", tmp_path / "a", "--ignore", "rope_theta")
    assert code == 2
    assert "has no config.json" in err


def test_bad_files_are_refused(files, saved, call, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files("f16").read_bytes()[:5000])
    code, _, err = call("import", cut, "--out", tmp_path / "a")
    assert code == 2
    assert "not a readable GGUF file" in err
    # an array of 2^60 bytes, in a file of a hundred
    array = b"x" + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 2**60)
    cut.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + array + bytes(64))
    code, _, err = call("import", cut, "--out", tmp_path / "a")
    assert code == 2
    assert "shorter than its header says" in err
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, _, err = call("import", tmp_path / "other.gguf", "--out", tmp_path / "a")
    assert code == 2
    assert "'mamba' is not known" in err
    assert call("export", saved, "--to", "gguf", "--type", "q9", "--out", tmp_path / "x")[0] == 2
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "x").exists()


def test_vocabularies_of_damaged_files_are_refused(files, tmp_path):
    data, key = files("f16").read_bytes(), b"tokenizer.ggml.bos_token_id"
    at = data.index(key) + len(key) + 4
    beyond = data[:at] + struct.pack("<I", 2**31 - 1) + data[at + 4 :]
    mark = "\u0120".encode()  # of a space
    for wrong in (beyond, data.replace(mark, b"\xc4\xff")):
        (tmp_path / "x.gguf").write_bytes(wrong)
        with pytest.raises(RequestError, match=r"x\.gguf: its vocabulary cannot be understood"):
            ours.tokenizer(tmp_path / "x.gguf", tmp_path / "work")


GOLDEN = Path(__file__).parent / "llama_cpp_golden.json"
"""What llama.cpp said: `LLMCTL_WRITE_GOLDEN=1 pytest tests/convert/test_gguf.py -k llama_cpp_reads` with xllamacpp."""
TEXT = "The cat looked at 345, it's so!"
KEPT = 12


def llama_cpp_case(name, words, wild):
    # Its kernels take rows of 32 and more; Gemma's configs get a window that the text outgrows.
    sizes = {"d_model": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "d_ff": 96, "max_seq_len": 64}
    changes = {"attn_scale": 32**-0.5} if name.startswith("gemma") else {}
    changes |= {"window": 32} if name == "mistral" else {}  # the file says nothing of Mistral's window
    cfg = ModelConfig(vocab_size=words.vocab_size, **sizes, **({"family": name} | FAMILIES.get(name, {}) | changes))
    return cfg, wild(cfg)


@pytest.fixture
def after_text(words, logits):
    """after_text(cfg, params) -> our log-probabilities of the token after TEXT [V], and the number of its tokens."""

    def made(cfg, params):
        ids = words.encode(TEXT)
        tokens = np.array([ids], np.int32)
        positions = np.arange(len(ids), dtype=np.int32)[None]
        batch = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
        last = logits(cfg, params, batch)[0, -1].astype(np.float64)
        return last - last.max() - np.log(np.exp(last - last.max()).sum()), len(ids)

    return made


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_llama_cpp_answered_as_we_do(name, wild, words, after_text):
    """Figures of llama.cpp from our files of these very models, read from text; recorded once."""
    golden = json.loads(GOLDEN.read_text())[name]
    ours, count = after_text(*llama_cpp_case(name, words, wild))
    assert golden["tokens"] == count
    best = np.argsort(-ours, kind="stable")[:KEPT]
    theirs = {int(i): p for i, p in golden["log_probabilities"]}
    # Its cache of keys and values is float16.
    for i in best[:3]:
        np.testing.assert_allclose(theirs[int(i)], ours[i], atol=0.02)
    np.testing.assert_allclose([theirs[i] for i in theirs], ours[[*theirs]], atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_llama_cpp_reads_what_we_write(name, save, wild, words, call, tmp_path, after_text):
    xllamacpp = pytest.importorskip("xllamacpp")
    cfg, params = llama_cpp_case(name, words, wild)
    code, _, err = call("export", save(cfg, params), "--to", "gguf", "--type", "f32", "--out", tmp_path / "g")
    assert code == 0, err
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "g" / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 64, 1, 2, False
    asked = {"prompt": TEXT, "n_predict": 1, "n_probs": KEPT, "temperature": 1, "cache_prompt": False}
    server = xllamacpp.Server(settings)
    answers = (server.handle_completions({**asked, "seed": seed}) for seed in range(20))
    # It tells no probabilities if the token that it samples is the end; they do not depend on that token.
    found = next(answer for answer in answers if answer["choices"][0]["logprobs"])
    told = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ours, count = after_text(cfg, params)
    assert found["usage"]["prompt_tokens"] == count
    for one in told:
        np.testing.assert_allclose(one["logprob"], ours[one["id"]], atol=0.05)
    if os.environ.get("LLMCTL_WRITE_GOLDEN"):
        recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        pairs = [[one["id"], round(one["logprob"], 5)] for one in told]
        recorded[name] = {"tokens": count, "log_probabilities": pairs}
        GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
