"""Texts in llmctl and in transformers' pipelines give the same predictions, whatever the tokenizer adds to a text."""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmctl.artifacts import artifact
from llmctl.convert import post_processor
from llmctl.data.examples.labelled import padded, templated
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.fill_mask import Filler

WORDS = [
    *("the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "moon", "12", "345", "it's"),
    *("so", "film", "was", "better", "than", "book", "naïve", "Wörter"),
]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 9)) + ".!? "[i % 4] for i in range(200)]
SHORT = 17
"""Tokens that the model reads: some texts are longer."""
SIZES = {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 48, "max_seq_len": SHORT}
FAMILIES = {
    "decoder": {"family": "llama", "pooling": "last"},
    "learned": {"family": "gpt2", "pooling": "last"},
    "encoder": {"family": "bert", "pooling": "first"},
    "encoder-decoder": {"family": "t5", "architecture": "encoder", "pooling": "mean"},
}
HEADS = {
    "decoder": ("lm", "classify", "regress", "tokens", "span", "embed"),
    "learned": ("classify", "tokens"),
    "encoder": ("lm", "classify", "regress", "tokens", "span", "embed"),
    "encoder-decoder": ("tokens", "embed"),
}
TOKENIZERS = {
    "none": (),  # one special token that ends texts, as GPT-2's
    "eos": ("eos",),
    "bos": ("bos",),
    "bos, eos": ("bos", "eos"),
    "bos, eos, pad": ("bos", "eos", "pad"),
    "eos, pad": ("eos", "pad"),
}
CASES = [(kind, head, name) for kind in FAMILIES for head in HEADS[kind] for name in TOKENIZERS]
FAST = [c for c in CASES if c in (
    ("decoder", "classify", "none"), ("learned", "classify", "bos, eos"), ("encoder", "classify", "eos, pad"),
    ("decoder", "tokens", "bos"), ("decoder", "lm", "bos"), ("encoder-decoder", "embed", "eos"),
)]  # fmt: skip


def tokenizer(names, adds=()):
    """A byte-level BPE with these special tokens, and a post-processor that adds those of `adds`; none if empty."""
    special = ["<|endoftext|>", *(f"<{n}>" for n in names), "<mask>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    said = {n: f"<{n}>" for n in names} | {"mask": "<mask>"}
    said = {"eos": "<|endoftext|>"} | said
    if adds:
        begin, end = ([said[n]] * (n in adds) for n in ("bos", "eos"))
        made.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, "$B:1", *(f"{t}:1" for t in end)],
            special_tokens=[(t, made.token_to_id(t)) for t in (*begin, *end)],
        )
    return JsonTokenizer(made.to_str().encode(), None, said)


def model_of(kind, head, words, rows=0):
    given = {**FAMILIES[kind], **SIZES, "vocab_size": words.vocab_size + rows, "head": head, "next_sentence": False}
    given |= {"labels": 3} if head in ("classify", "tokens") else {}
    pools = kind == "encoder" and head in ("classify", "regress", "embed")
    given |= {"pooler": pools, "head_transform": kind == "encoder" and head == "lm"}
    given |= {"head_bias": head in ("tokens", "span") or kind == "encoder"}
    return ModelConfig(**given)


def ours(cfg, params, words, texts):
    """What llmctl answers to every text, and its token ids."""
    template = words.template if cfg.head != "lm" or cfg.architecture != "decoder" else None
    rows = [
        templated(template, np.array(words.encode(t), np.int32), None, SHORT)[0]
        if template
        else np.array(words.prompt(t)[:SHORT], np.int32)
        for t in texts
    ]
    batch = {k: jnp.asarray(v) for k, v in padded(rows, SHORT, words.pad_id).items()}
    x = functional.hidden(cfg, params, batch)
    y = functional.lm_logits(cfg, params, x) if cfg.head == "lm" else functional.outputs(cfg, params, x, batch)
    return np.asarray(y), [r.tolist() for r in rows]


def theirs(cfg, folder, texts, batch_size=8):
    """What transformers answers to every text, through its pipeline where it has one for the head."""
    kwargs = {"truncation": True, "padding": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = hf.AutoTokenizer.from_pretrained(folder)
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(hf, kind).from_pretrained(folder).eval()
        assert words.model_max_length >= SHORT
        ids = [words(t, truncation=True, max_length=SHORT)["input_ids"] for t in texts]
        if cfg.head in ("classify", "regress"):
            pipe = hf.pipeline("text-classification", model=model, tokenizer=words, device="cpu")
            given = pipe(texts, top_k=None, function_to_apply="none", batch_size=batch_size, **kwargs)
            order = {label: i for i, label in model.config.id2label.items()}
            found = [[s["score"] for s in sorted(one, key=lambda s: order[s["label"]])] for one in given]
            return np.array(found), ids
        out = []
        with torch.no_grad():
            for row in ids:
                y = model(input_ids=torch.tensor([row]))
                if cfg.head == "span":
                    out.append(torch.stack([y.start_logits[0], y.end_logits[0]], -1).numpy())
                elif cfg.head == "embed":
                    x = y.last_hidden_state[0]
                    pooled = {"last": x[-1], "first": x[0], "mean": x.mean(0)}[cfg.pooling]
                    out.append((pooled / pooled.norm()).numpy())
                else:
                    out.append(y.logits[0].numpy())
        return out, ids


def same(cfg, mine, other):
    (a, ids_a), (b, ids_b) = mine, other
    assert ids_a == ids_b
    for one, two, ids in zip(a, b, ids_b, strict=True):
        one = one[: len(ids)] if cfg.head in ("lm", "tokens", "span") else one
        np.testing.assert_allclose(np.reshape(one, np.shape(two)), two, atol=1e-4 * max(1, np.abs(two).max()))


def goes_out(kind, head, name, texts, wild, call, tmp_path):
    words = tokenizer(TOKENIZERS[name])
    words.add_bos = "bos" in TOKENIZERS[name]
    cfg = model_of(kind, head, words)
    params = wild(cfg)
    words.save(tmp_path / "words")
    labels = [f"class {i}" for i in range(3)] if head in ("classify", "tokens") else []
    artifact.save(
        tmp_path / "a", params, cfg, stage="finetune", key="k", config={}, tokenizer_dir=tmp_path / "words",
        labels=labels,
    )  # fmt: skip
    code, made, err = call("export", tmp_path / "a", "--out", tmp_path / "hf")
    assert code == 0, err
    read = "texts and pairs" if head in ("classify", "regress") else "text"
    assert made["proof"] == f"from {read}, transformers reads what was written"
    assert made["transformers"] < 1e-3
    same(cfg, ours(cfg, params, words, texts), theirs(cfg, tmp_path / "hf", texts))
    # and comes back as it was
    assert call("import", tmp_path / "hf", "--out", tmp_path / "b")[0] == 0
    back = artifact.load(tmp_path / "b")
    again = loading.load(back.tokenizer_dir)
    same(cfg, ours(back.model, back.params, again, texts), theirs(cfg, tmp_path / "hf", texts))


@pytest.mark.parametrize(("kind", "head", "name"), FAST)
def test_exported_models_predict_the_same_from_text(kind, head, name, wild, call, tmp_path):
    goes_out(kind, head, name, TEXTS[:9], wild, call, tmp_path)


@pytest.mark.parametrize("fault", ["", "untyped", "between", "types"])
def test_classifiers_of_pairs_are_proven_on_pairs(fault, wild, call, tmp_path, monkeypatch):
    """The pipeline answers to pairs as llmctl; a written tokenizer that joins them otherwise is found."""
    words = tokenizer(("eos", "pad"))
    if fault == "untyped":  # the model's own file adds the right tokens, but gives both texts the type 0; mended
        words = tokenizer(("bos", "eos", "pad"), adds=("eos",))
        words = JsonTokenizer(words.model.replace(b'"type_id":1', b'"type_id":0'), None, dict(words.special))
        assert not post_processor.marks_second(words.backend) and words.backend.encode("x", "x").type_ids == [0] * 4
        fault = ""
    cfg = model_of("encoder", "classify", words).model_copy(update={"token_types": 2})
    params, labels = wild(cfg), [f"class {i}" for i in range(3)]
    words.save(tmp_path / "words")
    about = {"stage": "finetune", "key": "k", "config": {}, "labels": labels, "tokenizer_dir": tmp_path / "words"}
    artifact.save(tmp_path / "a", params, cfg, **about)
    put = post_processor.put

    def faulty(made, template):
        put(made, template if fault != "between" else dataclasses.replace(template, between=()))
        if fault == "types":
            made.post_processor = Tokenizer.from_str(made.to_str().replace('"type_id":1', '"type_id":0')).post_processor

    monkeypatch.setattr(post_processor, "put", faulty)
    code, made, err = call("export", tmp_path / "a", "--out", tmp_path / "hf")
    if fault:
        line = {"between": "others read ('x', 'a b') as", "types": "the answers differ"}.get(fault)
        assert code == 1 and line in err and not (tmp_path / "hf").exists()
        return
    assert made["proof"].startswith("from texts and pairs") and made["transformers"] < 1e-3
    pairs = [("cat sat", "a mat"), ("so", "the film"), ("12", "345")]
    encoded = [[np.array(words.encode(t), np.int32) for t in pair] for pair in pairs]
    rows, types = zip(*(templated(words.template, a, b, SHORT) for a, b in encoded), strict=True)
    batch = {k: jnp.asarray(v) for k, v in padded(rows, SHORT, words.pad_id).items()}
    batch["types"] = jnp.stack([jnp.pad(jnp.asarray(t), (0, SHORT - len(t))) for t in types])
    y = functional.outputs(cfg, params, functional.hidden(cfg, params, batch), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = hf.pipeline("text-classification", model=str(tmp_path / "hf"), device="cpu")
        found = [pipe({"text": a, "text_pair": b}, top_k=None, function_to_apply="none") for a, b in pairs]
    want = [[{s["label"]: s["score"] for s in one}[label] for label in labels] for one in found]
    np.testing.assert_allclose(y, want, atol=1e-4 * max(1, np.abs(want).max()))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "name"), CASES)
def test_exported_models_predict_the_same_from_200_texts(kind, head, name, wild, call, tmp_path):
    goes_out(kind, head, name, TEXTS, wild, call, tmp_path)


ADDED = {"nothing": (), "bos": ("bos",), "eos": ("eos",), "both": ("bos", "eos")}


def comes_in(adds, pad, texts, wild, call, tmp_path):
    """A classifier of transformers with its own tokenizer, whose file and config say how texts begin and end."""
    words = tokenizer(("bos", "eos", "pad"), ADDED[adds])
    cfg = model_of("decoder", "classify", words)
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=words.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=SHORT, num_labels=3,
        pad_token_id={"pad": 3, "eos": 2}[pad], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.LlamaForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p + 0.2 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(words.model)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    said |= {"pad_token": f"<{pad}>", "model_max_length": SHORT, "model_input_names": ["input_ids", "attention_mask"]}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(said))
    code, _, err = call("import", tmp_path / "hf", "--out", tmp_path / "a")
    assert code == 0, err
    found = artifact.load(tmp_path / "a")
    given = ours(found.model, found.params, loading.load(found.tokenizer_dir), texts)
    other = theirs(cfg, tmp_path / "hf", texts, batch_size=1)
    if adds in ("eos", "both") and pad == "eos":  # transformers pools before the end tokens, so llmctl adds none
        other = other[0], [ids[:-1] for ids in other[1]]
    same(found.model, given, other)
    return found


@pytest.mark.parametrize(("adds", "pad"), [("nothing", "pad"), ("both", "eos")])
def test_imported_classifiers_predict_the_same_from_text(adds, pad, wild, call, tmp_path):
    comes_in(adds, pad, TEXTS[:5], wild, call, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["pad", "eos"])
@pytest.mark.parametrize("adds", ADDED)
def test_imported_classifiers_predict_the_same_from_200_texts(adds, pad, wild, call, tmp_path):
    # texts that fit, for a cut text loses what the end token takes
    comes_in(adds, pad, [t for t in TEXTS if len(t) < SHORT], wild, call, tmp_path)


def test_masks_are_filled_as_the_pipeline_fills_them(wild, call, tmp_path):
    words = tokenizer(("bos", "eos", "pad"))
    words.add_bos = True
    cfg = model_of("encoder", "lm", words)
    params = wild(cfg)
    words.save(tmp_path / "words")
    artifact.save(tmp_path / "a", params, cfg, stage="pretrain", key="k", config={}, tokenizer_dir=tmp_path / "words")
    assert call("export", tmp_path / "a", "--out", tmp_path / "hf")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = hf.pipeline("fill-mask", model=str(tmp_path / "hf"), device="cpu")
        found = pipe("the<mask> sat", top_k=cfg.vocab_size)
    # llmctl never fills in a special token, and shares its probability among the others
    kept = [p["score"] for p in found if p["token"] not in words.special_ids.values()]
    got = Filler(cfg, params, words).fill(["the<mask> sat"], 4)[0]
    p = np.array([p for _, p in got.masks[0]])
    np.testing.assert_allclose(p / p[0], np.array(kept[:4]) / kept[0], atol=1e-5)


def test_an_import_says_where_transformers_reads_texts_otherwise(wild, call, tmp_path):
    words = tokenizer(("bos", "eos", "pad"), ("bos",))
    cfg = model_of("decoder", "tokens", words)
    words.save(tmp_path / "words")
    labels = ["x", "y", "z"]
    more = {"stage": "finetune", "key": "k", "config": {}, "labels": labels}
    artifact.save(tmp_path / "a", wild(cfg), cfg, tokenizer_dir=tmp_path / "words", **more)
    assert call("export", tmp_path / "a", "--out", tmp_path / "hf")[0] == 0
    code, _, err = call("import", tmp_path / "hf", "--out", tmp_path / "b")
    assert (code, "others read" in err) == (0, False)
    said = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "BertTokenizer"}))
    code, _, err = call("import", tmp_path / "hf", "--out", tmp_path / "c")
    assert code == 0
    assert "others read 'The film" in err or "transformers cannot load its tokenizer" in err
