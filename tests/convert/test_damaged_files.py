"""Files of models that fuzzing found: each is refused in one line, soon."""

import contextlib
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.convert import peft, peft_ia3, peft_lora, proof_texts, safetensors, text_proof
from llmctl.convert import tokenizers as brought
from llmctl.convert.lazy_tensors import of_array
from llmctl.data.config import TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

VOCAB = {"<s>": 0, "</s>": 1, "a": 2}


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"vocab.json": json.dumps(VOCAB | {"b": 2**31})}, "2147483648 is no id of so few tokens"),  # took minutes
        ({"vocab.json": json.dumps(VOCAB | {"b": -1})}, "-1 is no id"),
        ({"vocab.json": json.dumps(VOCAB | {"b": "x"})}, "x is no id"),
        ({"vocab.json": json.dumps(VOCAB), "merges.txt": b"\xe9"}, "not a usable tokenizer"),
        ({"vocab.txt": b"[CLS]\n\xe9"}, "not a usable tokenizer"),
        ({"vocab.txt": b"a\nb"}, "not a usable tokenizer"),
        ({"vocab.txt": b"[UNK]\n[CLS]\n[SEP]", "tokenizer_config.json": '{"strip_accents": "x"}'}, "not a usable"),
    ],
)
def test_vocabularies_of_older_tokenizers(tmp_path, files, line):
    for name, data in ({"merges.txt": b""} | files).items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(RequestError, match=line):
        brought._find(tmp_path)


@pytest.mark.parametrize("wrong", [{"special": {"eos": {"a": 1}}}, {"special": "x"}, {"kind": []}, {"kind": {}}])
def test_descriptors_of_tokenizers(saved, tmp_path, wrong):
    described = json.loads((saved / "tokenizer" / loading.DESCRIPTOR).read_text())
    (tmp_path / "tokenizer.json").write_bytes((saved / "tokenizer" / "tokenizer.json").read_bytes())
    (tmp_path / loading.DESCRIPTOR).write_text(json.dumps(described | wrong))
    with pytest.raises(RequestError, match=r"damaged tokenizer descriptor"):
        loading.load(tmp_path)


@pytest.mark.parametrize("pattern", ["String", "Regex"])
@pytest.mark.parametrize(("place", "inner"), [("normalizer", "normalizers"), ("decoder", "decoders")])
def test_replacements_of_a_tokenizer_that_fill_the_memory(words, pattern, place, inner):
    one = {"type": "Replace", "pattern": {pattern: "a"}, "content": "aa"}
    content = json.loads(words.model)
    JsonTokenizer(json.dumps(content | {place: {"type": "Sequence", inner: [one]}}).encode())
    with pytest.raises(ValueError, match="its replacements make a text more than 1,000 times as long"):
        JsonTokenizer(json.dumps(content | {place: {"type": "Sequence", inner: [one] * 20}}).encode())


def read(config, a, b, **more):
    tensors = {"lora_A.weight": np.zeros(a, np.float32), "lora_B.weight": np.zeros(b, np.float32)}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in more.items()}
    return peft_lora.read({"lora_alpha": 4} | config, "m.q_proj", tensors, 8, (types.SimpleNamespace(shape=(8, 6)),))


@pytest.mark.parametrize(
    ("config", "shapes", "line"),
    [
        ({}, ((0, 8), (6, 0)), "has rank 0, and 1 is the least"),
        ({}, ((), ()), r"is \[\] and its pair"),
        ({"lora_alpha": "x"}, ((2, 8), (6, 2)), "lora_alpha = x is no finite number"),
        ({"lora_alpha": 1e300}, ((2, 8), (6, 2)), "is no finite number in range"),
        ({"alpha_pattern": {"(a+)+$": 1}}, ((2, 8), (6, 2)), "repeats too much"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, ((2, 8), (6, 2)), "repeats too much"),
    ],
)
def test_adapters_that_divide_by_nothing(config, shapes, line):
    with pytest.raises(RequestError, match=line):
        read(config, *shapes)


def test_pieces_of_sentencepiece_are_text(tmp_path):
    made = loading.train(["a b c d e"] * 9, TokenizerConfig(kind="bpe", vocab_size=270)).model
    piece = "\u2581".encode()  # of a space
    assert piece in made
    (tmp_path / "tokenizer.model").write_bytes(made.replace(piece, b"\xa2\xa2\xa2"))
    with pytest.raises(RequestError, match="not a usable tokenizer"):
        loading.load(tmp_path)


def test_a_pair_that_is_scaled_to_nothing():
    (pair,) = read({"lora_alpha": 0}, (2, 8), (6, 2))
    node = peft_lora.node(jnp.ones((8, 6)), {-1: pair})
    assert node.scale == 0 and np.isfinite(node.b).all()


def test_parts_of_adapters_that_do_not_fit():
    with pytest.raises(RequestError, match=r"lora_E is \[3, 1\], and its pair has rank 2"):
        read({"init_r": 2}, (2, 8), (6, 2), lora_E=(3, 1))
    with pytest.raises(RequestError, match="init_r = None is no finite number"):
        read({}, (2, 8), (6, 2), lora_E=(2, 1))
    with pytest.raises(RequestError, match=r"magnitude_vector is \[5\], and the base's matrix has 6 outputs"):
        read({}, (2, 8), (6, 2), lora_magnitude_vector=(5,))
    factors = {0: peft_ia3.Factors(np.ones((8, 1)), "inputs"), 1: peft_ia3.Factors(np.ones((1, 6)), "outputs")}
    with pytest.raises(RequestError, match="the inputs of one layer and the outputs of another"):
        peft_ia3.node(np.zeros((2, 8, 6)), factors)


@pytest.mark.parametrize("kind", [{}, ["LORA"], 5, None])
def test_kinds_of_adapters_are_names(saved, tmp_path, kind):
    (tmp_path / peft.CONFIG).write_text(json.dumps({"peft_type": kind}))
    safetensors.write_file(tmp_path / peft.WEIGHTS, {"w": of_array(np.zeros(2, np.float32))})
    with pytest.raises(RequestError, match="only LORA, ADALORA, IA3 are supported"):
        peft.load(artifact.abstract(saved), tmp_path)


def test_code_of_a_model_folder_is_never_run(exported, config, monkeypatch):
    """transformers would ask on the terminal whether to run it."""
    asked = []

    class Words:
        @staticmethod
        def from_pretrained(folder, **options):
            asked.append(options["trust_remote_code"])
            raise ValueError("has code")

    library = types.SimpleNamespace(AutoTokenizer=Words)
    monkeypatch.setattr(text_proof, "_quietly", lambda: contextlib.nullcontext(library))
    with pytest.raises(ValueError, match="has code"):
        text_proof.tokens_there(config, exported, proof_texts.Samples(("x",), (), [[1]], [[0]], 8), theirs=True)
    assert asked == [False]
