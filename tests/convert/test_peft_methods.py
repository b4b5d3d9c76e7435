"""Finetuning methods against PEFT and torch on tiny random models: forward, gradients, counts, merging and files."""

import json
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.settings import MeshConfig
from llmctl.convert import name_map, peft, peft_table, safetensors
from llmctl.distributed import mesh as meshes
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stages import finetune
from llmctl.train.adapters.registry import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of torch and peft

BERT = {
    "family": "bert", "d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 48,
    "max_seq_len": 16, "token_types": 2,
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 6}
CASES = {
    "rslora": ("llama", "LoraConfig", LORA | {
        "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    }),
    "table": ("llama", "LoraConfig", LORA | {
        "target_modules": ["embed_tokens", "lm_head", "q_proj"], "modules_to_save": ["norm"],  # every norm
    }),
    "dora": ("llama", "LoraConfig", LORA | {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "ia3": ("llama", "IA3Config", {
        "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
    }),
    "ia3 bert": ("bert", "IA3Config", {
        "target_modules": ["key", "value", "layer.0.output.dense", "layer.1.output.dense"],
        "feedforward_modules": ["layer.0.output.dense", "layer.1.output.dense"],
    }),
    "dora bert": ("bert", "LoraConfig", LORA | {"use_dora": True, "target_modules": ["query", "intermediate.dense"]}),
}  # fmt: skip


def of_peft(name, folder, ids, cotangent_of):
    """What PEFT computes: logits, those of the merged model, gradients of sum(logits * cotangent), and counts."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    family, kind, settings = CASES[name]
    model = getattr(hf, "AutoModelForCausalLM" if family == "llama" else "AutoModelForMaskedLM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = model.from_pretrained(folder / "base", attn_implementation="eager").eval()
        tuned = theirs.get_peft_model(base, getattr(theirs, kind)(**settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    logits = tuned(input_ids=torch.tensor(np.asarray(ids))).logits
    (logits * torch.tensor(cotangent_of(logits.shape))).sum().backward()
    grads = {
        n.replace(".modules_to_save", "").replace(".default", ""): p.grad.numpy()
        for n, p in tuned.named_parameters()
        if p.requires_grad
    }
    count, _ = tuned.get_nb_trainable_parameters()
    tuned.save_pretrained(folder / "adapter")
    with torch.no_grad():
        merged = tuned.merge_and_unload()(input_ids=torch.tensor(np.asarray(ids))).logits.numpy()
    return logits.detach().numpy(), merged, grads, count


@pytest.fixture
def bases(saved, save, config, wild, words):
    """The artifact's folder and the config of each family."""

    def base(family):
        if family == "llama":
            return saved, config
        bert = ModelConfig(vocab_size=words.vocab_size, **BERT)
        return save(bert, wild(bert)), bert

    return base


def cotangent(shape):
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def batch_of(ids):
    positions = jnp.tile(jnp.arange(ids.shape[1]), (len(ids), 1))
    return {"tokens": jnp.asarray(ids), "segments": jnp.ones_like(ids), "positions": positions}


@pytest.mark.parametrize("name", CASES)
def test_forward_gradients_counts_and_merging_are_those_of_peft(name, bases, call, logits, tmp_path):
    saved, config = bases(CASES[name][0])
    assert call("export", saved, "--out", tmp_path / "base")[0] == 0
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    expected, merged, grads, count = of_peft(name, tmp_path, ids, cotangent)
    batch = batch_of(ids)

    base = artifact.load(saved)
    params = peft.load(base, tmp_path / "adapter")
    full = peft.replaced(base, params)
    names = weights.adapter_names(params) | {*full}
    named = weights.arrays(params)

    @jax.jit
    def ours(trained):
        def loss(trained):
            tree = weights.rebuild(params, named | trained)
            y = functional.lm_logits(config, tree, functional.hidden(config, tree, batch))
            return jnp.sum(y * cotangent(y.shape)), y

        return jax.value_and_grad(loss, has_aux=True)(trained)

    (_, got), slopes = ours({n: named[n] for n in names})
    size = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=1e-4 * size)
    assert sum(named[n].size for n in names) == count
    found = gradients(config, weights.rebuild(params, named | slopes), full)
    assert set(found) == set(grads)
    for n, g in grads.items():
        np.testing.assert_allclose(found[n], g, atol=1e-4 * max(1.0, np.abs(g).max()), err_msg=n)

    one = logits(config, jax.jit(weights.merge_adapters)(params), batch)
    np.testing.assert_allclose(one, got, atol=1e-5 * size)
    np.testing.assert_allclose(one, merged, atol=1e-4 * size)

    # Back to PEFT's format, whose proof runs PEFT itself; the tensors are the same.
    tuned = artifact.load(saved)
    artifact.save(tmp_path / "tuned", params, config, stage="import", key="k", config={peft.FULL: full},
                  parent=tuned.manifest, tokenizer_dir=tuned.tokenizer_dir)  # fmt: skip
    code, made, err = call("export", tmp_path / "tuned", "--to", "peft", "--out", tmp_path / "again")
    assert code == 0, err
    assert made["proof"] == "from text, PEFT reads what was written" and made["transformers"] < 1e-4
    first, again = (safetensors.read_file(tmp_path / f / peft.WEIGHTS) for f in ("adapter", "again"))
    assert {n for n in first if ".base_layer." not in n} == set(again)  # PEFT repeats the base of a table's adapter
    for n in again:
        np.testing.assert_allclose(again[n].read(), first[n].read(), atol=1e-6, err_msg=n)


def gradients(config, tree, full) -> Mapping[str, np.ndarray]:
    """Gradients by PEFT's names, from a tree whose adapters, and weights of `full`, hold gradients."""
    adapters, out = weights.adapted(tree), {}
    tensor_layouts = peft._tensor_layouts(config)
    table = peft_table.of(config, tensor_layouts)
    if table.path in adapters:
        tensors = peft.peft_lora.write(adapters[table.path])
        out |= {f"{peft.PREFIX}{table.module}.{peft_table.NAMES[k]}": a for k, a in tensors.items()}
    whole = {n: j for n, j in tensor_layouts.items() if j.slots[0].path in full}
    out |= {peft.PREFIX + n: t.read() for n, t in name_map.write(tree, whole).items()}
    for module, slot in peft._modules(config).items():
        if slot.path not in adapters:
            continue
        w = peft._layer(adapters[slot.path], slot.layer)
        tensors = peft.FORMATS[{"low_rank": "LORA", "dora": "LORA"}.get(w.kind, "IA3")].write(w)
        out |= {f"{peft.PREFIX}{module}.{k}": a for k, a in tensors.items()}
    return {n + (".weight" if n.endswith("vector") else ""): a for n, a in out.items()}


def test_a_tied_table_is_two_modules_there(config, wild, save, call, tmp_path):
    """Adapter and norms of a finetuned model with tied embeddings, through PEFT's files and back."""
    pytest.importorskip("peft")
    tied = config.model_copy(update={"tied": True})
    params, rng = wild(tied), np.random.default_rng(3)
    flat = weights.flatten(params)
    a, b = (jnp.asarray(rng.normal(0, 0.2, s), jnp.float32) for s in ((tied.vocab_size, 3), (3, 64)))
    flat["embed/tokens"] = weights.LowRank(flat["embed/tokens"], a, b, 2.0)
    base = save(tied, params)
    common = {"key": "k", "parent": artifact.read_manifest(base), "tokenizer_dir": artifact.load(base).tokenizer_dir}
    norms = flat["decoder/blocks/attn_norm/scale"] = jnp.asarray(rng.normal(1, 0.2, (3, 64)), jnp.float32)
    artifact.save(tmp_path / "a", weights.unflatten(flat), tied, stage="finetune",
                  config={"lora": {"modules_to_save": ["attn_norm"]}}, **common)  # fmt: skip
    code, made, err = call("export", tmp_path / "a", "--to", "peft", "--out", tmp_path / "adapter")
    assert code == 0, err
    assert made["proof"] == "from text, PEFT reads what was written" and made["transformers"] < 1e-4
    code, _, err = call("import", tmp_path / "adapter", "--base", base, "--out", tmp_path / "back")
    assert code == 0, err
    back = weights.flatten(artifact.load(tmp_path / "back").params)
    np.testing.assert_array_equal(back["decoder/blocks/attn_norm/scale"], norms)
    np.testing.assert_allclose(weights.dense(back["embed/tokens"]), weights.dense(flat["embed/tokens"]), atol=1e-6)
    code, made, err = call("export", tmp_path / "back", "--to", "peft", "--out", tmp_path / "again")
    first, again = (safetensors.read_file(tmp_path / f / peft.WEIGHTS) for f in ("adapter", "again"))
    assert code == 0 and set(first) == set(again), err


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_prompt_tuning_is_that_of_peft(family, bases, call, tmp_path):
    """Forward, gradients of the prompt, and its number of entries. The prompt's ids follow the vocabulary."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    saved, config = bases(family)
    assert call("export", saved, "--out", tmp_path / "base")[0] == 0
    model = getattr(hf, "AutoModelForCausalLM" if family == "llama" else "AutoModelForMaskedLM")
    base = model.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    kind = "CAUSAL_LM" if family == "llama" else "FEATURE_EXTRACTION"
    tuned = theirs.get_peft_model(base, theirs.PromptTuningConfig(task_type=kind, num_virtual_tokens=3)).eval()
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    logits = tuned(input_ids=torch.tensor(ids), attention_mask=torch.ones(2, 9)).logits
    (logits * torch.tensor(cotangent(logits.shape))).sum().backward()
    (weight,) = (p for p in tuned.parameters() if p.requires_grad)

    method, settings = METHODS["prompt"], finetune.Config(method="prompt", prompt={"tokens": 3})
    wide, mesh = method.network(settings, config), meshes.make(MeshConfig())
    params = method.attach(settings, wide, artifact.load(saved).params, jax.random.key(0), mesh)
    trains, named = method.trains(settings, wide, params), weights.arrays(params)
    assert [n for n in named if trains(n) and not n.startswith("head/")] == ["embed/prompt"]
    assert named["embed/prompt"].size == weight.numel()
    before = np.tile(np.arange(3, dtype=np.int32) + config.vocab_size, (2, 1))
    batch = batch_of(np.concatenate([before, ids], axis=1))

    @jax.jit
    def ours(prompt):
        tree = weights.rebuild(params, named | {"embed/prompt": prompt})
        y = functional.lm_logits(wide, tree, functional.hidden(wide, tree, batch))
        return jnp.sum(y * cotangent(y.shape)), y

    (_, got), slope = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(weight.detach().numpy()))
    assert got.shape[-1] == config.vocab_size  # the prompt is never predicted
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4 * np.abs(got).max())
    np.testing.assert_allclose(slope, weight.grad.numpy(), atol=1e-4 * np.abs(slope).max())


def test_adalora_trains_as_peft_does(saved, call, config, tmp_path):
    """Loss with the orthogonality term, and its gradients, from the same singular vectors and values."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    assert call("export", saved, "--out", tmp_path / "base")[0] == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    settings = theirs.AdaLoraConfig(
        init_r=3,
        target_r=2,
        lora_alpha=6,
        total_step=9,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",  # without it, PEFT's model leaves the orthogonality term out
    )
    tuned = theirs.get_peft_model(model, settings).eval()
    torch.manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    expected = tuned(input_ids=torch.tensor(ids), labels=torch.tensor(ids, dtype=torch.int64)).loss
    expected.backward()
    named = dict(tuned.named_parameters())

    def of_torch(slots, part, gradient=False):
        found = [named[f"{peft.PREFIX}{m}.lora_{part}.default"] for m, _ in slots]
        return jnp.stack([jnp.asarray((p.grad if gradient else p.data).numpy().T) for p in found])

    base = artifact.load(saved).params
    modules: dict[str, list] = {}
    for m, slot in sorted(peft._modules(config).items(), key=lambda item: item[1].layer):
        if m.endswith(("q_proj", "up_proj")):
            modules.setdefault(slot.path, []).append((m, slot.layer))
    flat = weights.flatten(base)
    tree = {
        path: weights.Svd(flat[path], *(of_torch(slots, part) for part in "ABE"), 6 / 3)
        for path, slots in modules.items()
    }
    params, batch = weights.updated(base, tree), batch_of(ids)
    arrays = weights.arrays(params)

    @jax.jit
    def ours(trained):
        tree = weights.rebuild(params, arrays | trained)
        y = functional.lm_logits(config, tree, functional.hidden(config, tree, batch))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(y[:, :-1]), batch["tokens"][:, 1:, None], axis=-1)
        method = METHODS["adalora"].during(finetune.Config(method="adalora"), tree, 100)
        return -chosen.mean() + method["penalty"](tree)

    loss, slopes = jax.value_and_grad(ours)({n: arrays[n] for n in weights.adapter_names(params)})
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert sum(a.size for a in slopes.values()) == tuned.get_nb_trainable_parameters()[0]
    for path, slots in modules.items():
        for part in "ABE":
            np.testing.assert_allclose(slopes[f"{path}:{part.lower()}"], of_torch(slots, part, True), atol=1e-4)


def test_files_of_adalora_come_in_as_pairs_of_their_own_ranks(saved, call, config, logits, tmp_path):
    """PEFT prunes singular values, saves what is left with its pattern, and computes the same as our pairs."""
    theirs, hf, torch = (pytest.importorskip(n) for n in ("peft", "transformers", "torch"))
    assert call("export", saved, "--out", tmp_path / "base")[0] == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    settings = theirs.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=2, tfinal=1, target_modules=["q_proj", "up_proj"]
    )
    tuned = theirs.get_peft_model(model, settings).eval()
    torch.manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    tuned(input_ids=torch.tensor(ids)).logits.square().sum().backward()
    allocator = tuned.base_model.rankallocator
    allocator.update_ipt(tuned.base_model.model)
    pattern = allocator.mask_to_budget(tuned.base_model.model, allocator.target_bgt)
    tuned.peft_config["default"].rank_pattern = pattern
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor(ids)).logits.numpy()
    tuned.save_pretrained(tmp_path / "adapter")
    code, _, err = call("import", tmp_path / "adapter", "--base", saved, "--out", tmp_path / "a")
    assert code == 0, err
    params = artifact.load(tmp_path / "a").params
    batch = batch_of(ids)
    np.testing.assert_allclose(logits(config, params, batch), expected, atol=1e-4 * np.abs(expected).max())
    code, _, err = call("export", tmp_path / "a", "--to", "peft", "--out", tmp_path / "again")
    assert code == 0, err
    said = json.loads((tmp_path / "again" / peft.CONFIG).read_text())
    stored = safetensors.read_file(tmp_path / "again" / peft.WEIGHTS)
    ranks = [t.shape[0] for n, t in stored.items() if n.endswith("lora_A.weight")]
    assert said["peft_type"] == "LORA" and sum(ranks) == allocator.target_bgt == sum(sum(v) for v in pattern.values())
    assert len(set(ranks)) > 1
