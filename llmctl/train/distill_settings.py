"""Define the settings of distillation that are sections of the stage `distill`, and check their combinations.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from llmctl.config.base import Config
from llmctl.config.settings import KVCache

INNER = ("hidden", "relations", "embeddings")
"""Names of the signals that compare inner layers of student and teacher."""


Weight = Annotated[float, Field(ge=0)] | dict[str, float]
"""Type of a signal's weight: a number, or a linear change such as {from = 1.0, to = 0.0, steps = 0.5}."""


class SignalsConfig(Config):
    """Set the weights of the distillation losses, which are called signals. A signal without a weight is not used.

    A weight is a number, or a table such as { from = 1.0, to = 0.0, steps = 0.5 }. With a table, the weight changes
    linearly. `steps` is the number of steps of the change, or a fraction of all steps if below 1. If `steps` is
    missing, the change takes all steps.
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    logits: Weight = 0.0
    """Weight of the divergence from the teacher's outputs. If no signal has a weight, the default is 1 minus the
    setting `hard` of the stage."""
    hard: Weight = 0.0
    """Weight of the loss on the labels. If no signal has a weight, the default is the setting `hard` of the stage."""
    hidden: Weight = 0.0
    """Weight of the distance between hidden states of student and teacher, for the layer pairs in `layer_map`. If the
    widths differ, a trained projection maps the student's states to the teacher's width."""
    relations: Weight = 0.0
    """Weight of the divergence between the token relations of student and teacher, in the last layer pair of
    `layer_map`. Relations are the softmax of the scaled products of queries with queries, keys with keys, and values
    with values."""
    embeddings: Weight = 0.0
    """Weight of the distance between the student's and the teacher's inputs of the first layer."""

    @property
    def active(self) -> bool:
        """Return whether the weight of any signal is set."""
        return any(getattr(self, name) for name in type(self).model_fields)

    @property
    def schedules(self) -> dict[str, dict[str, float]]:
        """Return the tables of the weights that change, by the name of the signal."""
        weights = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: weight for name, weight in weights.items() if isinstance(weight, dict)}

    def largest(self, name: str) -> float:
        """Return the largest weight that a signal has during training."""
        weight = getattr(self, name)
        return max(weight["from"], weight["to"]) if isinstance(weight, dict) else weight

    @property
    def inner(self) -> list[str]:
        """Return the names of the inner-layer signals with a nonzero weight."""
        return [name for name in INNER if getattr(self, name)]

    @field_validator("*")
    @classmethod
    def _is_a_schedule(cls, value: Any) -> Any:
        if isinstance(value, dict):
            given = "{" + ", ".join(f"{k} = {v:g}" for k, v in value.items()) + "}"
            if not {"from", "to"} <= value.keys() <= {"from", "to", "steps"}:
                raise ValueError(f"{given}: a weight that changes has from and to, and may have steps")
            if (
                value["from"] < 0
                or value["to"] < 0
                or value.get("steps", 1) <= 0
                or not any(value[name] for name in ("from", "to"))
            ):
                raise ValueError(f"{given}: from and to must not be negative, nor both 0, and steps must be above 0")
        return value

    @model_validator(mode="after")
    def _has_a_weight(self) -> SignalsConfig:
        if self.model_fields_set and not self.active:
            raise ValueError("all signals have the weight 0; set one of them, such as logits = 1.0")
        return self


class StudentConfig(Config):
    """Set which layers of the teacher the student copies. To reduce widths too, use the stage `prune` with the method
    `structured`.
    """

    common: ClassVar[tuple[str, ...] | None] = ()

    layers: int = Field(default=0, ge=0)
    """Number of layers that a new student copies from the teacher's encoder, and from its decoder. 0 copies no layers,
    unless `layer_map` is a list of layers."""
    layer_map: str | list[Any] = "every_other"
    """Layers to copy. every_other: evenly spaced layers, beginning with the first layer, such as every second layer.
    first: the first layers. A list such as [0, 2, 5]: the layers with these indices, from 0."""

    @property
    def active(self) -> bool:
        """Return whether the student starts from the teacher's layers."""
        return self.layers > 0 or isinstance(self.layer_map, list)

    @model_validator(mode="after")
    def _fits(self) -> StudentConfig:
        chosen = self.layer_map
        if isinstance(chosen, list):
            if not _indices(chosen) or sorted(set(chosen)) != chosen:
                raise ValueError(f"layer_map: {chosen} are not ascending indices of layers, such as [0, 2, 5]")
            if self.layers not in (0, len(chosen)):
                raise ValueError(f"layers = {self.layers}, and layer_map names {len(chosen)} layers; leave out layers")
        elif chosen not in ("every_other", "first"):
            raise ValueError(f"layer_map: {chosen!r} is not every_other, first or a list of layers, such as [0, 2, 5]")
        elif "layer_map" in self.model_fields_set and not self.layers:
            raise ValueError(f"layer_map = {chosen!r}: set layers, the number of layers that are copied")
        return self

    def kept(self, depth: int) -> list[int]:
        """Return the indices of the copied layers of a stack with `depth` layers, ascending.

        >>> StudentConfig(layers=3).kept(6), StudentConfig(layers=2, layer_map="first").kept(6)
        ([0, 2, 4], [0, 1])
        """
        if isinstance(self.layer_map, list):
            return self.layer_map
        return [i * depth // self.layers if self.layer_map == "every_other" else i for i in range(self.layers)]


class AnswersConfig(Config):
    """Set how answers are generated: by the teacher in the mode `sequence`, by the student in the mode `on_policy`."""

    common: ClassVar[tuple[str, ...] | None] = ()
    unkeyed: ClassVar[frozenset[str]] = frozenset({"folder"})

    folder: str = ""
    """Folder of the answers, which is also a data set in JSON lines. Default: a folder next to the artifact, whose name
    ends with -answers."""
    max_new: int = Field(default=0, ge=0)
    """Maximum number of tokens per answer. 0 uses 64, but at most half of the teacher's maximum sequence length."""
    beams: int = Field(default=1, ge=1)
    """Number of beams of a beam search; 1 generates greedily, or samples if temperature is above 0."""
    temperature: float = Field(default=0.0, ge=0)
    """Temperature of sampling; 0 takes the most probable token. The default of the mode `on_policy` is 1."""
    top_k: int = Field(default=0, ge=0)
    """Number of most probable tokens to sample from; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Total probability of the most probable tokens to sample from."""
    kv_cache: KVCache = ""
    """Format of cached keys and values: int8, fp8_e4m3 or int4. If empty, the cache has the dtype of the
    computation."""

    @model_validator(mode="after")
    def _fits(self) -> AnswersConfig:
        if self.temperature and self.temperature < 1e-6:
            raise ValueError(f"temperature = {self.temperature:g}: set 0, or at least 1e-06")
        if self.temperature and self.beams > 1:
            raise ValueError("temperature and beams exclude each other: a beam search takes the most probable answer")
        for name in ("top_k", "top_p"):
            if name in self.model_fields_set and "temperature" in self.model_fields_set and not self.temperature:
                raise ValueError(f"{name}: restricts sampling; set temperature above 0")
        return self


def _indices(values: Any) -> bool:
    """Return whether `values` is a list of one or more whole numbers that are not negative."""
    return isinstance(values, list) and bool(values) and all(type(i) is int and i >= 0 for i in values)


def check(config: Any) -> None:
    """Check that the settings of distillation do not contradict each other.

    Args:
      config: config of the stage `distill`.

    Raises:
      ValueError: If two settings contradict each other.
    """
    given, signals = config.model_fields_set, config.signals
    for name, kind in (("beta", "js"), ("skew", "skew")):
        if name in given and config.divergence != kind:
            raise ValueError(f"{name} is for divergence = {kind!r}, and divergence = {config.divergence!r}")
    if "hard" in given and signals.active:
        raise ValueError("hard and signals exclude each other; set signals.hard instead of hard")
    pairs = config.layer_map
    if isinstance(pairs, str):
        if pairs not in ("uniform", "last"):
            raise ValueError(f"layer_map: {pairs!r} is not uniform, last or a list of pairs, such as [[0, 1], [2, 5]]")
    elif not pairs or not all(_indices(pair) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"layer_map: {pairs} are not pairs of layers (student, teacher), such as [[0, 1], [2, 5]]")
    unused = {"layer_map": ("hidden", "relations"), "hidden_distance": ("hidden", "embeddings"),
              "relation_heads": ("relations",)}  # fmt: skip
    for name, readers in unused.items():
        if name in given and not set(readers) & set(signals.inner):
            raise ValueError(f"{name}: no signal reads it; set signals.{readers[0]}")
    for name in ("divergence", "temperature", "beta", "skew", "top_k"):
        if name in given and signals.active and not signals.logits:
            raise ValueError(f"{name}: no signal reads it; set signals.logits")
    if config.mode == "sequence":
        if "hard" in given:
            raise ValueError('hard: mode = "sequence" trains on the answers alone; set signals to add other losses')
        if len(config.teachers or []) > 1:
            raise ValueError('mode = "sequence": one teacher generates the answers, and teachers names several')
        for name in ("top_k", "top_p"):
            if name in config.answers.model_fields_set and not config.answers.temperature:
                raise ValueError(f"answers.{name}: restricts sampling; set answers.temperature above 0")
        for name in ("divergence", "temperature", "beta", "skew", "top_k", "cache"):
            if name in given and not signals.logits:
                raise ValueError(f'{name}: mode = "sequence" reads it only if signals.logits is set')
    elif config.mode == "teacher_forced" and "answers" in given:
        raise ValueError('answers: only mode = "sequence" and mode = "on_policy" generate answers')
    if config.mode == "on_policy":
        if config.cache:
            raise ValueError('cache: mode = "on_policy" has other texts in every step; leave it out')
        if ("hard" in given and config.hard) or signals.hard:
            raise ValueError('hard: the samples of mode = "on_policy" have no labels; set it to 0')
        for name in ("beams", "kv_cache", "folder"):
            if name in config.answers.model_fields_set:
                raise ValueError(f'answers.{name}: only mode = "sequence" reads it')
        if config.fake_quantize.learns:
            raise ValueError(
                'fake_quantize.scales: mode = "on_policy" generates without learned scales; set scales = "current"'
            )
    elif "on_policy_fraction" in given:
        raise ValueError('on_policy_fraction: only mode = "on_policy" reads it')
    if config.cache:
        if signals.inner:
            raise ValueError(f"cache: stores outputs, and signals.{signals.inner[0]} compares layers; leave one out")
        if signals.active and not signals.logits:
            raise ValueError("cache: no signal reads the teacher's outputs; set signals.logits")
    if config.teacher and config.teachers:
        raise ValueError("teacher and teachers exclude each other; name all of them in teachers")
    if len(set(config.teachers or [])) != len(config.teachers or []):
        raise ValueError(f"teachers: {config.teachers} name an artifact twice")
    if len(config.teachers or []) > 1:
        if signals.inner:
            raise ValueError(f"signals.{signals.inner[0]}: compares layers of one teacher, and teachers names several")
        if config.student.active:
            raise ValueError("student: copies layers of one teacher, and teachers names several")
    if config.student.active and config.model is not None:
        raise ValueError("student and model exclude each other: the student has the teacher's layers, or new sizes")


def reads_teacher(config: Any) -> bool:
    """Return whether the loss of the stage `distill` reads the teacher's outputs or layers."""
    signals = config.signals
    if config.mode == "sequence":
        return bool(signals.logits or signals.inner)
    return True


def reads_arrays(config: Any) -> bool:
    """Return whether the loss of the stage `distill` runs the teacher. This is true if the loss reads the teacher and
    there is no cache."""
    return reads_teacher(config) and not config.cache
