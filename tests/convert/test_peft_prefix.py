"""Prefix tuning against PEFT on tiny random models: outputs, gradients, number of entries, and files both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.settings import MeshConfig
from llmctl.convert import exporting, peft, safetensors
from llmctl.convert.lazy_tensors import of_array
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters.registry import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of torch and peft

SIZES = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 8, "d_ff": 48, "max_seq_len": 16}
FAMILIES = {"llama": {"kv_heads": 2}, "bert": {"token_types": 2}, "t5": {"layers": 3, "encoder_layers": 3}}
MODELS = {
    "llama": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "bert": ("AutoModel", "FEATURE_EXTRACTION"),
    "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}
P, T = 3, 9
REAL = np.ones((2, T), np.int32)
REAL[1, 6:] = 0  # padding on the right


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tuning_is_that_of_peft(family, wild, save, words, tmp_path):
    """PEFT has no BERT for tasks in this form (its heads take no cache), so that of the bare encoder is compared."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    config = ModelConfig.model_validate({"family": family, "vocab_size": words.vocab_size, **SIZES, **FAMILIES[family]})
    saved = save(config, wild(config))
    exporting.run(saved, tmp_path / "base")
    auto, kind = MODELS[family]
    base = getattr(hf, auto).from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    tuned = theirs.get_peft_model(base, theirs.PrefixTuningConfig(task_type=kind, num_virtual_tokens=P)).eval()
    (weight,) = (p for p in tuned.parameters() if p.requires_grad)
    torch.manual_seed(0)
    weight.data.normal_(0, 0.7)
    rng = np.random.default_rng(1)
    ids, source = rng.integers(0, config.vocab_size, (2, 2, T))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(REAL)}
    if family == "t5":
        inputs |= {"input_ids": torch.tensor(source), "decoder_input_ids": torch.tensor(ids)}
    out = tuned(**inputs)
    y = out[0] if family == "bert" else out.logits
    factor = rng.normal(size=y.shape).astype(np.float32)
    factor *= 1 if family == "t5" else REAL[..., None]  # outputs of padding are not used
    (y * torch.tensor(factor)).sum().backward()

    method, settings = METHODS["prefix"], finetune.Config(method="prefix", prefix={"tokens": P})
    wide, mesh = method.network(settings, config), meshes.make(MeshConfig())
    params = method.attach(settings, wide, artifact.load(saved).params, jax.random.key(0), mesh)
    trains, named = method.trains(settings, wide, params), weights.arrays(params)
    names = [n for n in named if trains(n) and not n.startswith("head/")]
    assert sum(named[n].size for n in names) == weight.numel() and len(names) == 2
    assert weights.count(functional.abstract(wide)) == weights.count(functional.abstract(config)) + weight.numel()
    positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    batch = {"tokens": ids, "positions": positions, "segments": np.ones_like(REAL) if family == "t5" else REAL}
    if family == "t5":
        batch |= {"encoder_tokens": source, "encoder_positions": positions, "encoder_segments": REAL}
    W, L = config.kv_heads * config.head_dim, config.layers
    # PEFT repeats the vectors of an encoder-decoder and gives each layer four of them, of which cross-attention's are
    # dropped. Layer l therefore has pair 2 l modulo L.
    pairs = [2 * layer % L for layer in range(L)] if family == "t5" else [*range(L)]

    @jax.jit
    def ours(vectors):
        both = vectors.reshape(P, L, 2, W)[:, jnp.array(pairs)]
        tree = weights.rebuild(params, named | {n: both[:, :, i].swapaxes(0, 1) for i, n in enumerate(sorted(names))})
        y = functional.hidden(wide, tree, batch)
        y = y if family == "bert" else functional.lm_logits(wide, tree, y)
        return jnp.sum(y * factor), y

    (_, got), slope = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(weight.detach().numpy()))
    expected, used = y.detach().numpy(), (factor != 0)
    np.testing.assert_allclose(got * used, expected * used, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(slope, weight.grad.numpy(), atol=1e-4 * np.abs(slope).max())


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_files_come_from_peft_and_go_back(family, wild, save, words, call, tmp_path):
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    more = {"llama": {"kv_heads": 2}, "gpt2": {"tied": True}}[family]
    sizes = {**SIZES, "max_seq_len": 48}
    cfg = ModelConfig.model_validate({"family": family, "vocab_size": words.vocab_size, **sizes, **more})
    base = save(cfg, wild(cfg))
    assert call("export", base, "--out", tmp_path / "base")[0] == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    tuned = theirs.get_peft_model(model, theirs.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    torch.manual_seed(0)
    next(p for p in tuned.parameters() if p.requires_grad).data.normal_(0, 0.7)
    tuned.save_pretrained(tmp_path / "adapter")
    ids = np.random.default_rng(1).integers(5, cfg.vocab_size, (2, T)).astype(np.int32)
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long)).logits

    come = ("import", tmp_path / "adapter", "--base", base, "--store", "adapter", "--out", tmp_path / "a")
    code, _, err = call(*come)
    assert code == 0, err
    found = artifact.load(tmp_path / "a", bases=[base])
    assert len(found.manifest.base.stored) == 2 and found.model.prefix_tokens == P
    batch = {"tokens": ids, "segments": np.ones_like(ids), "positions": np.tile(np.arange(T, dtype=np.int32), (2, 1))}
    logits = functional.lm_logits(found.model, found.params, functional.hidden(found.model, found.params, batch))
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4 * np.abs(expected.numpy()).max())

    code, made, err = call("export", tmp_path / "a", "--base", base, "--to", "peft", "--out", tmp_path / "back")
    assert code == 0, err
    assert made["proof"].endswith("PEFT reads what was written") and made["transformers"] < 1e-3
    before, after = (safetensors.read_file(tmp_path / name / peft.WEIGHTS) for name in ("adapter", "back"))
    assert [*before] == [*after] == ["prompt_embeddings"]
    np.testing.assert_array_equal(after["prompt_embeddings"].read(), before["prompt_embeddings"].read())


def test_a_prefix_that_does_not_fit_is_refused(saved, config, call, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    good = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    vectors = np.zeros((3, 2 * config.layers * config.kv_heads * config.head_dim), np.float32)
    for said, tensors, line in (
        ({"num_virtual_tokens": 0}, {}, "must contain prompt_embeddings alone; missing or not understood: prompt_em"),
        ({"num_virtual_tokens": True}, {"prompt_embeddings": vectors}, "is no number between 1 and"),
        ({}, {"prompt_embeddings": vectors[:2]}, "which does not fit 3 keys and values of width"),
        ({}, {"prompt_embeddings": vectors * np.inf}, "contains NaN or infinity"),
        ({}, {"prompt_embeddings": vectors, "base_model.x": vectors}, "not understood: base_model.x"),
        ({"task_type": "SEQ_CLS"}, {"prompt_embeddings": vectors}, "is for decoder language models"),
    ):
        (folder / peft.CONFIG).write_text(json.dumps(good | said))
        safetensors.write_file(folder / peft.WEIGHTS, {n: of_array(a) for n, a in tensors.items()})
        code, _, err = call("import", folder, "--base", saved, "--out", tmp_path / "a")
        assert code == 2 and line in err and len(err.strip().splitlines()) == 1, (line, err)
