"""Build the training job of distillation (Hinton et al., 2015, arXiv:1503.02531).

The job consists of the student, the loss on a teacher's outputs and layers, and checks of the settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmctl.artifacts import artifact
from llmctl.compress.structured_pruning.shrink import drop_layers
from llmctl.config.base import with_article
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import distilled, named
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import Divergence, SoftLoss
from llmctl.model.layer_signals import Signals
from llmctl.train import fake_quantize, learner, loop, sparsify
from llmctl.train.distill_settings import INNER, reads_arrays, reads_teacher

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact
    from llmctl.train.learner import Learner

PROJECTIONS = 3
"""Constant that is folded into a run's random key. The resulting key initializes the projections of signals."""


def load_teachers(paths: Sequence[Path], mesh: Mesh, bases: Sequence[Path]) -> list[Artifact]:
    """Load the teachers. If several teachers are adapters of one base, the base is loaded once and its arrays
    are shared.

    Args:
      paths: folders of the teachers.
      mesh: the devices.
      bases: folders of base artifacts, for adapters whose base is not in a folder next to the adapter.
    """
    loaded: dict[str, Artifact] = {}
    found: dict[Path, Artifact] = {}
    for path in sorted(paths, key=lambda path: artifact.read_manifest(path).base is None):  # adapters load their bases
        same = (a for a in loaded.values() if a.path.resolve() == path.resolve())
        found[path] = next(same, None) or artifact.load(path, mesh, bases=bases, loaded=loaded)
    return [found[path] for path in paths]


def named_teachers(teachers: Sequence[Artifact]) -> dict[str, Any]:
    """Return the digests of the teachers as an entry of the metrics: "teacher", or "teachers" if there are several."""
    digests = [t.manifest.digest for t in teachers]
    return {"teachers": digests} if len(digests) > 1 else {"teacher": digests[0]}


def make_learner(config: Any, teachers: Sequence[Artifact], student: Artifact | None, mesh: Mesh) -> Learner:
    """Return a Learner with the student's initial parameters, the options of the training and the distillation loss.

    Args:
      config: config of the stage `distill`.
      teachers: the teachers, whose probabilities are averaged. If `config.cache` is set, the teachers' arrays are not
        read. Batches then have the outputs that the cache stores.
      student: artifact from which the student starts; None initializes a new model of the sizes in `config.model`. If
        `config.student` is set, this artifact is the teacher, and the student copies some of its layers.
      mesh: the devices.

    Raises:
      RequestError: If the student does not fit the teacher, or the settings do not fit the models or the mesh.
    """
    teacher = teachers[0]
    for other in teachers[1:]:
        check_alike(teacher, other)
    model, task, train = (
        student_model(config, teacher, student),
        named(distilled(teacher.manifest), teacher.model),
        config.train,
    )
    if config.mode != "teacher_forced" and (not task.completes_prompts or teacher.model.architecture == "encoder"):
        raise RequestError(f'mode = "{config.mode}": {teacher.path} generates no answers to prompts')
    for reads in (model, *(t.model for t in teachers if reads_teacher(config))):
        loop.check(reads, train, mesh)
    task.check_label_type(config.data)
    if config.cache and model.head_kind.vocabulary and task.head == "lm" and not config.top_k:
        raise RequestError("cache: stores the most probable tokens only; set top_k, such as 64")
    read = [t.model for t in teachers] if reads_arrays(config) else []
    soft, inner = soft_loss(config, model), signals(config, model, teacher.model, mesh)
    loss = task.soft_loss_of(
        model.model_copy(update={"dropout": config.dropout}),
        read,
        soft,
        signals=inner,
        dtype=jnp.dtype(train.dtype),
        remat=train.remat,
    )
    if student and config.student.active:
        params = copied_layers(config, student, mesh)
    else:
        params = student.params if student else loop.initialize(model, config.seed, mesh)
    sparsify.check(config.sparsify, params, student)
    fake_quantize.check(config.fake_quantize, params)

    def step_fields(params: dict[str, Any], steps: int) -> dict[str, Any]:
        return {"extra": projections(config, inner, model, teacher.model, params)} if inner else {}

    return learner.Learner(
        model,
        params,
        task,
        config.dropout,
        loss if reads_teacher(config) else None,
        beside=read,
        labels=teacher.manifest.labels,
        job_fields={
            **({"constants": tuple(t.params for t in teachers)} if read else {}),
            **({"holds_zeros": student.zeros.__contains__} if student else {}),
            **learner.selection_fields(task, teacher.manifest.labels),
        },
        step_fields=step_fields,
    )


def check_alike(teacher: Artifact, other: Artifact) -> None:
    """Check that two teachers read the same rows and have the same outputs.

    Raises:
      RequestError: If the teachers differ in architecture, head, classes, tokenizer or trained prompt.
    """
    reasons = {
        "architecture": (teacher.model.architecture, other.model.architecture),
        "head": (teacher.model.head, other.model.head),
        "classes": (teacher.manifest.labels, other.manifest.labels),
        "task": (distilled(teacher.manifest), distilled(other.manifest)),
        "tokenizer": (teacher.manifest.tokenizer, other.manifest.tokenizer),
        "trained prompt": (teacher.model.prompt_tokens, other.model.prompt_tokens),
        "vocabulary": (teacher.model.vocab_size, other.model.vocab_size),
    }
    if different := [name for name, (a, b) in reasons.items() if a != b]:
        raise RequestError(f"teachers: {other.path} differs from {teacher.path} in {' and '.join(different)}")


def soft_loss(config: Any, model: ModelConfig) -> SoftLoss:
    """Return the divergence from the teacher's outputs, with its weight and the weight of the loss on labels.

    Raises:
      RequestError: If a divergence of distributions is set and the model predicts a number.
    """
    if model.head_kind.scalar and (config.divergence != "forward" or config.top_k):
        name = "top_k" if config.top_k else "divergence"
        raise RequestError(f"{name}: the teacher predicts numbers, which are compared by their squared difference")
    if config.signals.active:
        given = config.signals
        return SoftLoss(divergence(config), soft=given.largest("logits"), hard=given.largest("hard"))
    hard = 0.0 if config.mode == "on_policy" else config.hard  # samples have no labels
    return SoftLoss(divergence(config), soft=1 - hard, hard=hard)


def divergence(config: Any) -> Divergence:
    """Return the divergence that the settings of the stage `distill` define."""
    return Divergence(config.divergence, config.temperature, config.beta, config.skew, config.top_k)


def signals(config: Any, model: ModelConfig, teacher: ModelConfig, mesh: Mesh) -> Signals | None:
    """Return the losses on inner layers. If all weights of these losses are 0, return None.

    Raises:
      RequestError: If `layer_map` names a layer that does not exist. If `relation_heads` does not divide the widths of
        queries and keys. If the mesh has several pipeline stages.
    """
    given = config.signals
    if not given.inner:
        return None
    if mesh.shape["pipeline"] > 1:
        raise RequestError(f"signals.{given.inner[0]}: needs mesh.pipeline = 1, whose stages keep no outputs of layers")
    pairs = layer_pairs(config.layer_map, model.layers, teacher.layers)
    widths = [n * cfg.head_dim for cfg in (model, teacher) for n in (cfg.heads, cfg.kv_heads)]
    heads = config.relation_heads or math.gcd(model.heads, model.kv_heads, teacher.heads, teacher.kv_heads)
    if given.relations and any(width % heads for width in widths):
        raise RequestError(
            f"relation_heads = {heads}: does not divide the widths of queries and keys, {widths[0]} and {widths[1]} in "
            f"the student, {widths[2]} and {widths[3]} in the teacher"
        )
    largest = {name: given.largest(name) for name in INNER}
    return Signals(**largest, pairs=pairs, distance=config.hidden_distance, relation_heads=heads)


def layer_pairs(layer_map: Any, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Return the layers that the losses on inner layers compare, as pairs (layer of the student, layer of the teacher).

    Args:
      layer_map: the pairs. "uniform": evenly spaced pairs, ending with the last layers. "last": only the pair of the
        last layers. A list: these pairs.
      student: number of layers of the student.
      teacher: number of layers of the teacher.

    Raises:
      RequestError: If a pair of the list names a layer that does not exist.

    >>> layer_pairs("uniform", 2, 6), layer_pairs("last", 2, 6)
    (((0, 2), (1, 5)), ((1, 5),))
    """
    if layer_map == "last":
        return ((student - 1, teacher - 1),)
    if layer_map == "uniform":
        n = min(student, teacher)
        return tuple(((i + 1) * student // n - 1, (i + 1) * teacher // n - 1) for i in range(n))
    for pair in layer_map:
        for layer, layers, who in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            if layer >= layers:
                raise RequestError(f"layer_map: the {who} has no layer {layer}; its layers are 0 to {layers - 1}")
    return tuple((a, b) for a, b in layer_map)


def projections(
    config: Any, inner: Signals, model: ModelConfig, teacher: ModelConfig, params: dict[str, Any]
) -> dict[str, Any]:
    """Return the initial projections that the losses `inner` need, by name. The projections are replicated over the
    mesh.

    If `params` are abstract arrays, the projections are abstract too.
    """
    leaf: Any = jax.tree.leaves(params)[0]
    key = jax.random.fold_in(jax.random.key(config.seed), PROJECTIONS)
    replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())

    def fresh() -> dict[str, Any]:
        return inner.projections(model, teacher, key)

    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.tree.map(lambda a: a.update(sharding=replicated), jax.eval_shape(fresh))
    return jax.jit(fresh, out_shardings=replicated)()


def copied_layers(config: Any, teacher: Artifact, mesh: Mesh) -> dict[str, Any]:
    """Return the parameters of a student that copies layers of the teacher. No array is shared with the teacher."""
    model = shallower(config, teacher)
    kept = {stack: config.student.kept(functional.depth(teacher.model, stack)) for stack in functional.stacks(model)}
    params = jax.tree.map(jnp.copy, drop_layers(teacher.model, teacher.params, kept)[1])
    return jax.device_put(params, functional.shardings(model, params, mesh))


def shallower(config: Any, teacher: Artifact) -> ModelConfig:
    """Return the config of a student that copies layers of the teacher.

    Raises:
      RequestError: If the teacher has too few layers. If a copied layer would get another kind of attention than in the
        teacher.
    """
    like, update = teacher.model, {}
    for stack in functional.stacks(like):
        depth = functional.depth(like, stack)
        kept = config.student.kept(depth)
        if len(kept) > depth or kept[-1] >= depth:
            raise RequestError(f"student: the {stack} of {teacher.path} has {depth} layers, 0 to {depth - 1}")
        kinds = like.local_layers(depth)
        if [kinds[i] for i in kept] != like.local_layers(len(kept)):
            raise RequestError(
                f"student.layer_map: layers {kept} of {teacher.path} have another order of local and global attention "
                "than its config gives to so few layers; choose layers of the same kinds by a list"
            )
        update["encoder_layers" if stack == "encoder" and like.encoder_layers else "layers"] = len(kept)
    return ModelConfig.model_validate({**like.model_dump(), **update, "preset": ""})


def student_model(config: Any, teacher: Artifact, student: Artifact | None) -> ModelConfig:
    """Return the student's config. The student must have the teacher's head, classes and trained prompt.

    If the student's loss reads the teacher, the student must also have the teacher's tokenizer and architecture.

    Raises:
      RequestError: If the student does not fit the teacher.
    """
    like = teacher.model
    if student is None:
        if config.model is None:
            raise RequestError("distill: no student; name an artifact with `from`, or sizes with `model`")
        if config.model.architecture != like.architecture and reads_teacher(config):
            raise RequestError(
                f"distill: the student is {with_article(config.model.architecture)}, the teacher "
                f"{with_article(like.architecture)}; "
                "they must read the same rows"
            )
        answer = {
            name: getattr(like, name)
            for name in ("head", "labels", "pooling", "vocab_size", "prompt_tokens", "next_sentence")
        }
        per_token = like.head_kind.per_token
        answer["pooler"] = not per_token and (config.model.pooler or like.next_sentence)
        answer["head_bias"] = config.model.head_bias or per_token
        answer["head_transform"] = config.model.head_transform and like.head_kind.vocabulary
        return ModelConfig.model_validate({**config.model.model_dump(), **answer, "preset": ""})
    if (student.model.architecture, student.model.head, student.model.labels) != (
        like.architecture if reads_teacher(config) else student.model.architecture, like.head, like.labels,
    ):  # fmt: skip
        raise RequestError(
            f"{student.path}: is {with_article(student.model.architecture)} that answers as {student.model.head!r}, "
            f"the teacher {with_article(like.architecture)} that answers as {like.head!r}; they must agree"
        )
    if student.model.prompt_tokens != teacher.model.prompt_tokens:
        raise RequestError(f"{student.path}: has another trained prompt than the teacher {teacher.path}")
    if student.manifest.tokenizer != teacher.manifest.tokenizer and reads_teacher(config):
        raise RequestError(f"{student.path}: has another tokenizer than the teacher {teacher.path}")
    if not student.plain:
        raise RequestError(
            f"{student.path}: has quantized or low-rank weights; distill before quantizing, after merging"
        )
    return shallower(config, student) if config.student.active else student.model
