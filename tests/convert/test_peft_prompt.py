"""Trained prompts in PEFT's format, against `peft` and torch on tiny random models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.convert import parity, peft, safetensors
from llmctl.convert.lazy_tensors import of_array
from llmctl.data.tokenizers import loading
from llmctl.model.config import ModelConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of torch and peft

SIZES = {"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 48, "max_seq_len": 48}
MODELS = {
    "llama": ({"family": "llama"}, "CAUSAL_LM", "AutoModelForCausalLM"),
    "gpt2": ({"family": "gpt2", "tied": True}, "CAUSAL_LM", "AutoModelForCausalLM"),
    "bert": (
        {
            "family": "bert",
            "head": "classify",
            "labels": 3,
            "token_types": 2,
            "next_sentence": False,
            "head_transform": False,
        },
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
    ),
    "t5": ({"family": "t5", "encoder_layers": 2}, "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
}
SLOW = ("gpt2", "t5")


def of_peft(family, folder, ids):
    """What PEFT computes with a random prompt of 4 vectors over the base in `folder`; the files are beside it."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    _, task, kind = MODELS[family]
    base = getattr(hf, kind).from_pretrained(folder / "base", attn_implementation="eager").eval()
    tuned = theirs.get_peft_model(base, theirs.PromptTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.5)
    tuned.save_pretrained(folder / "adapter")
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.long)}
    if task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = torch.tensor(ids[:, :5])
    with torch.no_grad():
        return tuned(**given).logits.numpy()


def batch_of(ids, encoder):
    def side(ids):
        positions = jnp.tile(jnp.arange(ids.shape[1]), (len(ids), 1))
        return {"tokens": jnp.asarray(ids), "segments": jnp.ones_like(ids), "positions": positions}

    return {**side(ids[:, :5]), **{f"encoder_{k}": v for k, v in side(ids).items()}} if encoder else side(ids)


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f in SLOW)) for f in MODELS])
def test_logits_are_those_of_peft_and_the_files_go_back(family, save, wild, words, call, tmp_path):
    fields, _, _ = MODELS[family]
    cfg = ModelConfig.model_validate({"vocab_size": words.vocab_size, **SIZES, **fields})
    labels = [f"c{i}" for i in range(cfg.labels)]
    base = save(cfg, wild(cfg), labels=labels)
    code, _, err = call("export", base, "--out", tmp_path / "base")
    assert code == 0, err
    ids = np.random.default_rng(1).integers(5, cfg.vocab_size, (2, 9)).astype(np.int32)
    expected = of_peft(family, tmp_path, ids)

    code, made, err = call(
        "import", tmp_path / "adapter", "--base", base, "--store", "adapter", "--out", tmp_path / "a"
    )
    assert code == 0, err
    found = artifact.load(tmp_path / "a", bases=[base])
    assert found.model.prompt_tokens == 4 and loading.load(found.tokenizer_dir).prefix == tuple(
        range(cfg.vocab_size, cfg.vocab_size + 4)
    )
    stored = {"embed/prompt", *(["head/out/kernel", "head/out/bias"] if cfg.labels else [])}
    assert {*found.manifest.base.stored} == stored
    batch = parity.prompted(found.model, batch_of(ids, cfg.encoder_layers))
    got = np.asarray(parity.answers(found.model, found.params, batch)).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))

    code, made, err = call("export", tmp_path / "a", "--base", base, "--to", "peft", "--out", tmp_path / "back")
    assert code == 0 and made["files"] == [peft.CONFIG, peft.WEIGHTS], err
    assert made["proof"].endswith("PEFT reads what was written") and made["transformers"] < 1e-3
    before, after = (safetensors.read_file(tmp_path / name / peft.WEIGHTS) for name in ("adapter", "back"))
    rows = {"prompt_embeddings": 4}  # those of a decoder that PEFT stores and does not read stay behind
    assert {n for n in after.keys() ^ before.keys() if ".pooler." not in n} == set()  # a pooler is part of our head
    for name, t in before.items():
        np.testing.assert_array_equal(after[name].read(), np.asarray(t.read())[: rows.get(name)])


def test_what_does_not_fit_is_refused(saved, config, params, save, call, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    good = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    vectors = np.zeros((3, config.d_model), np.float32)
    for said, tensors, line in (
        ({"num_virtual_tokens": 0}, {}, "num_virtual_tokens = 0 is no number between 1 and"),
        ({"num_virtual_tokens": 1000}, {}, "is no number between 1 and"),
        ({}, {"prompt_embeddings": vectors[:2]}, "prompt_embeddings is [2, 64], which does not fit 3 vectors"),
        ({}, {"prompt_embeddings": vectors, "base_model.x": vectors}, "not understood: base_model.x"),
        ({}, {"other": vectors}, "lacks prompt_embeddings"),
    ):
        (folder / peft.CONFIG).write_text(json.dumps(good | said))
        safetensors.write_file(folder / peft.WEIGHTS, {n: of_array(a) for n, a in tensors.items()})
        code, _, err = call("import", folder, "--base", saved, "--out", tmp_path / "a")
        assert code == 2 and line in err and len(err.strip().splitlines()) == 1, (line, err)
    safetensors.write_file(folder / peft.WEIGHTS, {"prompt_embeddings": of_array(vectors)})
    assert call("import", folder, "--base", saved, "--out", tmp_path / "a")[0] == 0
    code, _, err = call("import", folder, "--base", tmp_path / "a", "--out", tmp_path / "b")
    assert code == 2 and "has a trained prompt already" in err
    code, _, err = call("import", folder, "--base", saved, "--merge", "--out", tmp_path / "b")
    assert code == 2 and "has a trained prompt, which no matrix of its base can express" in err
    code, _, err = call("export", tmp_path / "a", "--out", tmp_path / "b")
    assert code == 2 and "export --to peft" in err
