"""LoRA adapters in PEFT's format: arithmetic by hand, round trips, and rejected variants."""

import json
import warnings
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.convert import peft, safetensors, text_proof
from llmctl.convert.lazy_tensors import of_array
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig


@pytest.fixture(scope="session")
def tuned(params):
    """The base with pairs of rank 3 on queries and down projections."""
    flat, rng = weights.flatten(params), np.random.default_rng(3)
    for path in ("decoder/blocks/attn/q/kernel", "decoder/blocks/mlp/down/kernel"):
        L, i, o = flat[path].shape
        a, b = (jnp.asarray(rng.normal(0, 0.2, s), jnp.float32) for s in ((L, i, 3), (L, 3, o)))
        flat[path] = weights.LowRank(flat[path], a, b, 2.0)
    return weights.unflatten(flat)


@pytest.fixture
def adapter(save, config, tuned, call, tmp_path):
    code, made, err = call("export", save(config, tuned), "--to", "peft", "--out", tmp_path / "adapter")
    assert code == 0, err
    assert made["parity"] == 0
    assert made["proof"] == "from text, PEFT reads what was written"
    return tmp_path / "adapter"


def test_an_exported_adapter_says_what_peft_multiplies(adapter, tuned):
    said = json.loads((adapter / peft.CONFIG).read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (3, 6, ["down_proj", "q_proj"])
    stored = safetensors.read_file(adapter / peft.WEIGHTS)
    assert len(stored) == 2 * 2 * 3
    a, b = (
        np.asarray(stored[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight"].read()) for x in "AB"
    )
    ours = weights.flatten(tuned)["decoder/blocks/attn/q/kernel"]
    delta = np.asarray(weights.dense(ours) - ours.base)[1].T  # theirs is [out, in]
    np.testing.assert_allclose(said["lora_alpha"] / said["r"] * b @ a, delta, atol=1e-5)


def test_pairs_are_merged_in_a_dense_export(save, config, tuned, call, tmp_path):
    code, made, err = call("export", save(config, tuned), "--out", tmp_path / "hf")
    assert code == 0, err
    assert made["parity"] < 1e-4
    stored = safetensors.read_folder(tmp_path / "hf")["model.layers.2.mlp.down_proj.weight"].read()
    merged = weights.dense(weights.flatten(tuned)["decoder/blocks/mlp/down/kernel"])[2].T
    np.testing.assert_allclose(stored, merged, atol=1e-6)


@pytest.mark.parametrize(("to", "proof"), [
    ("peft", "llmctl reads the written weights (the base quantizes activations, which a dense base does not)"),
    ("hf", "from text, transformers reads what was written"),
])  # fmt: skip
def test_pairs_over_a_base_that_quantizes_activations(to, proof, save, config, params, tuned, call, tmp_path):
    """Neither PEFT's base nor the merged matrices quantize activations, which the comparisons take into account."""
    flat = weights.flatten(quantize(params, scheme="int8", activations="int8")[0])
    flat |= {path: replace(w, base=flat[path]) for path, w in weights.of_type(tuned, weights.LowRank).items()}
    code, made, err = call("export", save(config, weights.unflatten(flat)), "--to", to, "--out", tmp_path / "made")
    assert code == 0, err
    assert made["parity"] < 1e-4 and made["proof"] == proof


def test_there_and_back(adapter, saved, tuned, call, tmp_path):
    code, _, err = call("import", adapter, "--base", saved, "--out", tmp_path / "a")
    assert code == 0, err
    back = artifact.load(tmp_path / "a")
    assert back.manifest.parent.digest == artifact.read_manifest(saved).digest
    for path, w in weights.flatten(tuned).items():
        got = weights.flatten(back.params)[path]
        assert type(got) is type(w)
        np.testing.assert_allclose(weights.dense(got), weights.dense(w), atol=1e-6)


def test_layers_that_differ_in_rank_and_scale_come_in_as_one_pair(saved, tmp_path):
    base, rng = artifact.load(saved), np.random.default_rng(0)
    module = "model.layers.{}.self_attn.v_proj"
    arrays, expected = {}, np.zeros((3, 64, 32))
    for layer, rank in ((0, 2), (2, 4)):
        a, b = rng.normal(size=(rank, 64)).astype(np.float32), rng.normal(size=(32, rank)).astype(np.float32)
        name = f"base_model.model.{module.format(layer)}"
        arrays |= {f"{name}.lora_A.weight": of_array(a), f"{name}.lora_B.weight": of_array(b)}
        expected[layer] = ({0: 8, 2: 16}[layer] / np.sqrt(rank) * b @ a).T
    safetensors.write_file(tmp_path / peft.WEIGHTS, arrays)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {module.format(2): 4}}
    for pattern in ("layers.2.self_attn.v_proj", r"layers\.[2-9]\.self_attn\..*"):
        (tmp_path / peft.CONFIG).write_text(json.dumps(said | {"alpha_pattern": {pattern: 16}}))
        w = weights.flatten(peft.load(base, tmp_path))["decoder/blocks/attn/v/kernel"]
        np.testing.assert_allclose(np.asarray(weights.dense(w) - w.base), expected, atol=1e-4)
    (tmp_path / peft.CONFIG).write_text(json.dumps(said | {"alpha_pattern": {"*.v_proj": 16}}))
    with pytest.raises(RequestError, match="alpha_pattern holds no regular expression"):
        peft.load(base, tmp_path)


GPT2 = {
    "family": "gpt2", "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "tied": False,
    "max_seq_len": 16, "norm": "layer", "activation": "gelu_tanh", "gated": False, "positions": "learned",
    "qkv_bias": True, "out_bias": True, "mlp_bias": True,
}  # fmt: skip
SELECTIONS = {
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "layers_pattern": {"target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "up_proj"]},
    "eva": {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    "fan_in_fan_out": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
}


@pytest.mark.filterwarnings("ignore")  # warnings of torch and peft
@pytest.mark.parametrize("name", SELECTIONS)
def test_merged_logits_are_those_of_peft(name, save, saved, wild, config, words, call, tmp_path):
    """Settings that select modules, and adapters of fused Conv1D matrices, against the merge of PEFT itself."""
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if name == "fan_in_fan_out":
        config = ModelConfig(vocab_size=words.vocab_size, **GPT2)
        saved = save(config, wild(config))
    assert call("export", saved, "--out", tmp_path / "base")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = theirs.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **SELECTIONS[name])
    tuned = theirs.get_peft_model(model, lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in tuned.named_parameters():
            if "lora_" in parameter_name:
                p.normal_(0, 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    if name == "eva":  # the initialization reads data; what it leaves in the settings is this
        said = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
        changed = said | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
        (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(changed))
    code, _, err = call("import", tmp_path / "adapter", "--base", saved, "--out", tmp_path / "a")
    assert code == 0, err
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12))
    with torch.no_grad():
        merged = tuned.merge_and_unload().eval()(torch.tensor(ids)).logits.numpy()
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(torch.tensor(ids)).logits
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    batch = {"tokens": ids.astype(np.int32), "segments": np.ones((2, 12), np.int32), "positions": positions}
    found = artifact.load(tmp_path / "a")
    got = np.asarray(
        functional.lm_logits(found.model, found.params, functional.hidden(found.model, found.params, batch))
    )
    assert np.abs(merged - plain.numpy()).max() > 0.1  # the adapter matters
    np.testing.assert_allclose(got, merged, atol=2e-4)


def test_what_is_not_plain_lora_is_refused(adapter, saved, call, tmp_path):
    said = json.loads((adapter / peft.CONFIG).read_text())
    for change, message in (
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ):
        (adapter / peft.CONFIG).write_text(json.dumps(said | change))
        code, _, err = call("import", adapter, "--base", saved, "--out", tmp_path / "a")
        assert code == 2
        assert message in err
    (adapter / peft.CONFIG).write_text(json.dumps(said))
    assert "--base" in call("import", adapter, "--out", tmp_path / "a")[2]
    code, _, err = call("import", adapter, "--base", saved, "--out", tmp_path / "a", "--dtype", "bfloat16")
    assert code == 2 and "only --base, --store and --merge have a meaning" in err
    stored = safetensors.read_file(adapter / peft.WEIGHTS)
    strays = {k: of_array(np.array(t.read())) for k, t in stored.items()} | {
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": of_array(np.zeros((3, 64), np.float32))
    }
    safetensors.write_file(adapter / peft.WEIGHTS, strays)
    code, _, err = call("import", adapter, "--base", saved, "--out", tmp_path / "a")
    assert code == 2
    assert "layers.9" in err
    assert not (tmp_path / "a").exists()
    code, _, err = call("export", saved, "--to", "peft", "--out", tmp_path / "x")
    assert code == 2
    assert "no low-rank pairs" in err


@pytest.mark.parametrize("missing", ["", "peft is not installed"])
def test_a_base_without_counterpart_is_refused_whatever_is_installed(
    missing, save, config, tuned, call, tmp_path, monkeypatch
):
    monkeypatch.setattr(text_proof, "available", lambda *_: missing)
    made = save(config.model_copy(update={"attn_softcap": 5.0}), tuned)
    code, _, err = call("export", made, "--to", "peft", "--out", tmp_path / "x")
    assert code == 2 and "attn_softcap = 5.0" in err
    assert not (tmp_path / "x").exists()


@pytest.fixture
def base_folder(saved, call, tmp_path):
    """The original base as transformers reads it."""
    assert call("export", saved, "--out", tmp_path / "base")[0] == 0
    return tmp_path / "base"


def by_peft(kind, base_folder, adapter, ids):
    """Logits of the original base with an adapter, as PEFT loads both."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs.PeftModel.from_pretrained(getattr(hf, kind).from_pretrained(base_folder), adapter).eval()
        with torch.no_grad():
            return model(input_ids=torch.tensor(np.asarray(ids))).logits.numpy()


def test_peft_adds_the_exported_pairs_to_the_original_base(adapter, base_folder, tuned, config, batch, logits):
    theirs = by_peft("AutoModelForCausalLM", base_folder, adapter, batch["tokens"])
    np.testing.assert_allclose(theirs, logits(config, tuned, batch), atol=1e-4)


def test_a_trained_output_layer_goes_out_again(adapter, saved, base_folder, config, batch, logits, call, tmp_path):
    """An adapter with modules_to_save = ["lm_head"] came in whole and went out without the head."""
    head = np.random.default_rng(5).normal(0, 0.3, (config.vocab_size, config.d_model)).astype(np.float32)
    stored = {k: of_array(np.array(t.read())) for k, t in safetensors.read_file(adapter / peft.WEIGHTS).items()}
    safetensors.write_file(adapter / peft.WEIGHTS, stored | {"base_model.model.lm_head.weight": of_array(head)})
    said = json.loads((adapter / peft.CONFIG).read_text())
    (adapter / peft.CONFIG).write_text(json.dumps(said | {"modules_to_save": ["lm_head"]}))
    assert call("import", adapter, "--base", saved, "--out", tmp_path / "a")[0] == 0
    code, made, err = call("export", tmp_path / "a", "--to", "peft", "--out", tmp_path / "again")
    assert code == 0, err
    assert made["parity"] == 0
    assert json.loads((tmp_path / "again" / peft.CONFIG).read_text())["modules_to_save"] == ["lm_head"]
    ours = logits(config, artifact.load(tmp_path / "a").params, batch)
    np.testing.assert_allclose(
        by_peft("AutoModelForCausalLM", base_folder, tmp_path / "again", batch["tokens"]), ours, atol=1e-4
    )


def test_a_trained_task_head_goes_out_beside_its_pairs(saved, save, config, wild, base_folder, batch, call, tmp_path):
    """Pairs and the head of a classifier on the original language model, as finetuning leaves them."""
    cfg = config.model_copy(update={"head": "classify", "labels": 3})
    flat, rng = weights.flatten(wild(cfg)), np.random.default_rng(3)
    path = "decoder/blocks/attn/v/kernel"
    L, i, o = flat[path].shape
    base = {k: w for k, w in weights.flatten(artifact.load(saved).params).items() if k in flat}
    a, b = (jnp.asarray(rng.normal(0, 0.2, s), jnp.float32) for s in ((L, i, 3), (L, 3, o)))
    params = weights.unflatten(flat | base | {path: weights.LowRank(base[path], a, b, 2.0)})
    made = save(cfg, params, parent=artifact.read_manifest(saved), labels=["x", "y", "z"])
    code, shown, err = call("export", made, "--to", "peft", "--out", tmp_path / "adapter")
    assert code == 0, err
    # The proof's base pools at the last token that is not its padding, for which the table gets a row.
    assert shown["proof"] == "from texts and pairs, PEFT reads what was written" and shown["transformers"] < 1e-4
    hf = pytest.importorskip("transformers")
    said = json.loads((base_folder / "config.json").read_text()) | {"num_labels": 3, "pad_token_id": 0}
    (base_folder / "config.json").write_text(json.dumps(said))
    assert hf.AutoConfig.from_pretrained(base_folder).num_labels == 3
    theirs = by_peft("AutoModelForSequenceClassification", base_folder, tmp_path / "adapter", batch["tokens"])
    ours = functional.outputs(cfg, params, functional.hidden(cfg, params, batch), batch)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
