"""Run the operations of `stage_pairs` on tiny models in this process, and check what each leaves against its parent."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from stage_pairs import ADAPTER, MORE, PREFIX, PROMPT, QUANTIZE, SIZES, State, after, task

from llmctl.artifacts import artifact, integrity
from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.fingerprint import PRUNED as PRUNED_FROM
from llmctl.artifacts.workspace import Context
from llmctl.compress.pruning import prune as zeros
from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.convert import exporting, importing, parity, text_proof
from llmctl.data import splits
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.tokenizers import loading
from llmctl.evaluate.tasks import registry
from llmctl.model import functional, weights, wiring
from llmctl.model.config import ModelConfig, family
from llmctl.pipeline.stages import distill, finetune, pretrain, prune, quantize

WORDS = ("fine", "dull", "grand", "poor", "bright", "grey", "warm", "cold", "quick", "slow")
SEQ_LEN = 16
TRAIN = TrainConfig(steps=2, batch_size=8, seq_len=SEQ_LEN, eval_batches=1, tensorboard=False)
OPTIM = OptimConfig(learning_rate=1e-2, warmup=0)
PRUNED = {
    "magnitude": {"method": "magnitude", "sparsity": 0.5}, "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "structured": {"heads": 0.5, "ffn": 0.5, "multiple": 4}, "depth": {"keep_layers": 1},
}  # fmt: skip
ROUNDED = {"int8": {"bits": 8}, "int4": {"bits": 4, "group": 4}, "W8A8": {"bits": 8, "activations": "int8"}}
DENSE = ("hf", "compressed-tensors")


@dataclass(frozen=True)
class Made:
    """An artifact, and the facts that it does not say itself."""

    path: Path
    found: Artifact
    state: State
    base: Path | None = None
    """The artifact that its unmerged low-rank pairs were attached to."""


class Bench:
    """The bases of the families, and everything that was made of them, each once.

    made = bench.make(("llama", "int8", "LoRA apart"))
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "reviews.csv"
        rng = np.random.default_rng(0)
        with file.open("w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["text", "label"])
            for i in range(60):
                sentences = [" ".join(rng.choice(WORDS, 5)) for _ in range(4)]
                writer.writerow([". ".join([f"{i}", *sentences]), "pos" if i % 3 else "neg"])
        self.data = DataConfig(source="csv", path=str(file), validation=0.2, test=0.2)
        texts = splits.examples(self.data, "train").texts()
        self.words = loading.train(texts, TokenizerConfig(kind="bpe", vocab_size=310, sentinels=8))
        self.words.save(folder / "words")
        self.made: dict[tuple[str, ...], Made] = {}

    def make(self, chain: tuple[str, ...]) -> Made:
        """Return what the operations of a chain leave, one after the other; the first entry is the family.

        Raises:
          RequestError: the last operation is refused. Those before must not be.
        """
        if chain not in self.made:
            self.made[chain] = self.base(chain[0]) if len(chain) == 1 else self.do(self.make(chain[:-1]), chain)
        return self.made[chain]

    def base(self, name: str) -> Made:
        """Return a family's random network as a pretrained artifact."""
        sizes = {**family(name).FLAGS, **SIZES, **MORE[name], "vocab_size": self.words.vocab_size, "family": name}
        model, out = ModelConfig(**sizes), self.folder / name / "base"
        params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
        about = {"stage": "pretrain", "key": name, "config": {"train": {"seq_len": SEQ_LEN}}}
        artifact.save(out, params, model, tokenizer_dir=self.folder / "words", **about)
        return self.read(out, None)

    def do(self, parent: Made, chain: tuple[str, ...]) -> Made:
        """Run the last operation of a chain on what the others left, and check the result."""
        operation, out = chain[-1], self.folder / "/".join(chain).replace(" ", "-") / "artifact"
        base = parent.base
        if operation == "export and import":
            to = self.carry(parent, out)
        else:
            self.stage(operation, parent, out)
            to = ""
            if operation == "LoRA apart":
                base = parent.path
        made = self.read(out, base)
        if not made.state.pairs:
            made = replace(made, base=None)
        check(operation, parent, made, to)
        return made

    def stage(self, operation: str, parent: Made, out: Path) -> None:
        """Run a stage."""
        ctx = Context(out, out.parent / "work", "/".join(out.parts), {})
        learns = {"data": self.data, "train": TRAIN, "optim": OPTIM}
        reads = {} if parent.found.manifest.seq_len else {"seq_len": SEQ_LEN}  # an import does not say it
        if operation == "pretrain":
            module, config = pretrain, pretrain.Config(**learns)
        elif operation == "distill":
            module, config = distill, distill.Config(teacher="teacher", **learns)
            like = parent.state  # the base, with the student's tokenizer and head
            steps = (("export and import", like.imported), ("finetune", like.head != "lm"))
            teacher = self.make((like.family, *(name for name, needed in steps if needed)))
            ctx = replace(ctx, siblings={"teacher": teacher.path})
        elif operation in PRUNED:
            module = prune
            config = prune.Config(data=self.data, examples=8, batch_size=8, **PRUNED[operation], **reads)
        elif operation in ROUNDED:
            module, config = quantize, quantize.Config(**ROUNDED[operation])
        else:
            how = {} if operation == "finetune" else {"method": "lora", "lora": finetune.LoraConfig(rank=2)}
            if operation == "sparsify":
                how = {"sparsify": finetune.SparsifyConfig(sparsity=0.5)}
            how |= {"merge": False} if operation == "LoRA apart" else {}
            if operation == "houlsby":
                how = {"method": "houlsby", "houlsby": finetune.HoulsbyConfig(size=ADAPTER)}
            if operation == "prompt":
                how = {"method": "prompt", "prompt": finetune.PromptConfig(tokens=PROMPT)}
            if operation == "prefix":
                how = {"method": "prefix", "prefix": finetune.PrefixConfig(tokens=PREFIX)}
            module, config = finetune, finetune.Config(task=task(operation, parent.state), **how, **learns)
        ctx.work.mkdir(parents=True, exist_ok=True)  # a refused operation is tried again in other chains
        module.run(config, parent.path, ctx)

    def carry(self, parent: Made, out: Path) -> str:
        """Export an artifact and import it again; return the format."""
        to = "peft" if parent.state.pairs else DENSE[bool(parent.state.integers)]
        with (  # other tests load what is written with transformers, whose import takes longer than all of this
            mock.patch.object(text_proof, "available", lambda *_: "not asked"),
            mock.patch.object(text_proof, "tokenization_difference", lambda *_: ""),
        ):
            exporting.run(parent.path, out.parent / "exported", to=to)
            if to == "peft":
                assert parent.base
                importing.adapter(out.parent / "exported", parent.base, out)
            else:
                importing.run(out.parent / "exported", out)
        return to

    def read(self, path: Path, base: Path | None) -> Made:
        """Return an artifact with its state."""
        found = artifact.load(path)
        imported = found.manifest.tokenizer != self.words.digest
        return Made(path, found, replace(state(found, base), imported=imported), base)


def state(found: Artifact, base: Path | None) -> State:
    """Return the state that an artifact's arrays and manifest show."""
    model, nodes = found.model, [m.node for m in weights.matrices(found.params, "block")]
    pairs = any(n.has_adapter for n in nodes)
    kinds, grouped = set(), ""
    for node in (weights.as_node(n.bare()) for n in nodes):
        if (q := node.integers()) is not None:
            grouped = "/" if q.array.scale.shape[-2] > 1 else grouped  # a cut can leave one group of a matrix
            kinds.add((str(q.array.qvalue.dtype), "*" if q.activations else ""))
    assert len(kinds) <= 1, kinds
    integers = "".join(f"{dtype}{grouped}{activations}" for dtype, activations in kinds)
    quantized_adapters = any(
        weights.as_node(w).is_integer
        for path, w in weights.flatten(found.params).items()
        if weights.parse(path).bottleneck
    )
    return State(
        model.family, model.head, model.architecture, model.layers, model.heads, model.kv_heads, model.d_ff,
        integers, pairs, artifact.read_manifest(base).model.head if pairs and base else "",
        adapter=model.adapter_size, adapter_integers=quantized_adapters, prompt=model.prompt_tokens,
        prefix=model.prefix_tokens, pruned=found.manifest.pruned, sparsity=zeros.sparsity(found.params),
    )  # fmt: skip


def check(operation: str, parent: Made, made: Made, to: str) -> None:
    """Assert everything that an operation must keep, and what it must change.

    Loading has compared the digests, and the shapes with the model config.
    """
    before, now = parent.found.manifest, made.found.manifest
    damage = integrity.quick_check(made.path, now)
    assert not damage.content and not damage.record, damage
    expected = after(operation, parent.state)
    if to in DENSE:  # an import guesses from the share of zeros, of which rounding makes some
        expected = replace(expected, pruned=now.sparsity > PRUNED_FROM[to == "compressed-tensors"])
    assert replace(made.state, sparsity=0) == replace(expected, sparsity=0), (made.state, expected)
    assert now.nonfinite == []
    for name, a in weights.arrays(made.found.params).items():
        assert np.isfinite(np.asarray(a, np.float32)).all(), name

    if to in DENSE:
        assert now.parent is None
    else:
        origin = artifact.read_manifest(parent.base) if to == "peft" and parent.base else before
        assert now.parent == origin.as_parent()
    assert now.stage == {"export and import": "import"}.get(operation, now.stage)
    kept = before.labels if expected.head == parent.state.head else ["neg", "pos"]
    assert now.labels == kept
    assert now.model.labels == len(kept)
    if to not in DENSE:
        assert now.tokenizer == before.tokenizer
        assert now.seq_len == (SEQ_LEN if now.stage in ("pretrain", "finetune", "distill") else before.seq_len)
        assert registry.of(now).name == (
            task(operation, parent.state) if now.stage == "finetune" else registry.of(before).name
        )
    here, there = loading.load(made.found.tokenizer_dir), loading.load(parent.found.tokenizer_dir)
    assert here.encode("12 fine, grey. Warm") == there.encode("12 fine, grey. Warm")

    kept_values(operation, parent.found, made.found, to)
    answers = parity.answers(made.found.model, made.found.params, parity.probe(made.found.model))
    assert np.isfinite(np.asarray(answers)).all() and np.std(np.asarray(answers)) > 0


def kept_values(operation: str, parent: Artifact, made: Artifact, to: str) -> None:
    """Assert which entries of the layers' matrices stay: zeros of pruning, integers, what cuts and rounding keep."""
    merges = made.manifest.stage in ("prune", "quantize") and weights.adapted(parent.params)
    params = jax.jit(weights.merge_adapters)(parent.params) if merges else parent.params
    old = {m.path: m.node for m in weights.matrices(params, "block")}
    new = {m.path: m.node for m in weights.matrices(made.params, "block")}
    if operation == "houlsby":
        new = {path: node for path, node in new.items() if path in old or not weights.parse(path).bottleneck}
    assert new.keys() <= old.keys()
    if operation == "structured":
        return selected(parent.model, params, made.params)
    if operation == "depth":
        layers = made.manifest.metrics["layers_kept"]
        for path, node in new.items():
            index = np.asarray(layers[weights.parse(path).stack])
            for name, a in node.parts().items():
                np.testing.assert_array_equal(a, np.asarray(old[path].parts()[name])[index], err_msg=path)
        return None
    for path, node in new.items():
        same(operation, path, old[path], node, pruned=parent.manifest.pruned, to=to)
    return None


def same(operation: str, path: str, old: weights.Node, new: weights.Node, *, pruned: bool, to: str) -> None:
    """Assert what one matrix keeps of its parent's."""
    before, now = np.asarray(old.values()), np.asarray(new.values())
    assert before.shape == now.shape, path
    if pruned:  # zeros of rounding are zeros of the mask, if the integers were pruned
        assert not now[before == 0].any(), path
        by_four = (before.reshape(before.shape[0], -1, 4, before.shape[-1]) == 0).sum(axis=2)
        after_four = (now.reshape(before.shape[0], -1, 4, before.shape[-1]) == 0).sum(axis=2)
        assert (after_four >= by_four).all(), path
    if operation == "wanda 2:4":
        assert ((now.reshape(before.shape[0], -1, 4, before.shape[-1]) == 0).sum(axis=2) >= 2).all(), path
    if operation in PRUNED:
        kept = now != 0
        np.testing.assert_array_equal(now[kept], before[kept], err_msg=path)
    if old.is_integer and to not in DENSE and operation not in QUANTIZE:
        theirs, ours = weights.as_node(old.bare()).integers(), weights.as_node(new.bare()).integers()
        assert ours.activations == theirs.activations and ours.array.qvalue.dtype == theirs.array.qvalue.dtype
        np.testing.assert_array_equal(ours.array.scale, theirs.array.scale, err_msg=path)
        if operation not in PRUNED:
            np.testing.assert_array_equal(now, before, err_msg=path)
    if to:
        np.testing.assert_array_equal(np.asarray(new.dense()), np.asarray(old.dense()), err_msg=path)


def selected(cfg: ModelConfig, old: dict, new: dict) -> None:
    """Assert that each head and neuron that is left equals one of those before, in their order."""
    for stack in wiring.stacks(cfg):
        found = {}
        for units in wiring.units(cfg, stack):
            before, now = (np.asarray(signatures(stack, units, params)) for params in (old, new))
            found[units.name] = np.array([ascending(a, b) for a, b in zip(now, before, strict=True)])
        queries = cfg.heads // cfg.kv_heads
        for name in (n for n in found if n.endswith("/heads")):  # a key/value head goes with all of its query heads
            groups = found[name.replace("heads", "groups")]
            np.testing.assert_array_equal(found[name], (groups[..., None] * queries + np.arange(queries)).reshape(
                found[name].shape))  # fmt: skip


def ascending(units: np.ndarray, among: np.ndarray) -> list[int]:
    """Return the positions of some units among all, which must be ascending."""
    found = [-1]
    for unit in units:
        equal = [i for i in range(found[-1] + 1, len(among)) if np.array_equal(unit, among[i])]
        assert equal, "a unit that was not there before"
        found.append(equal[0])
    return found[1:]


def signatures(stack: str, units: wiring.Units, params: dict) -> jax.Array:
    """Return everything that belongs to each unit, [layers, units, numbers]: its columns and its rows."""
    flat, parts = weights.flatten(params), []
    for names, axis in ((units.writers, -1), (units.readers, -2)):
        modules = [f"{stack}/blocks/{name}" for name in names]
        kernels = [path for path in map(weights.kernel_of, modules) if path in flat]
        prefixes = [path for path in flat if weights.parse(path).prefix and path.rpartition("/")[0] in modules]
        assert len(kernels) + bool(prefixes) == len(names)
        for path in kernels + prefixes:
            a = jnp.moveaxis(weights.dense(flat[path]), axis, 1)
            parts.append(a.reshape(a.shape[0], a.shape[1] // units.width, -1))
    return jnp.concatenate(parts, axis=-1)
