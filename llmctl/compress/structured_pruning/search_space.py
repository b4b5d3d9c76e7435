"""List the sizes that a budget search considers: numbers of layers, heads, neurons and hidden channels.

A group of heads is a key/value head with its query heads. The search may remove complete groups. It may also remove the
same number of query heads from every group.

For each combination of layers, heads and channels, the number of neurons is the largest that the budget allows. The
module does not import JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.model.config import ModelConfig

FRACTIONS = (7 / 8, 3 / 4, 1 / 2, 1 / 4, 1 / 8)
"""Fractions of each size at which the loss is measured."""
PARTS = {"layers": "layers", "heads": "kv_heads", "ffn": "d_ff", "hidden": "d_model"}
"""Sizes that a search may reduce: {name of the size: field of ModelConfig that contains the size}."""
QUERIES = "queries"
"""Name of a size that is not in `PARTS`: the number of query heads per key/value head."""

Size = Callable[[ModelConfig], float]
"""Function that computes the parameters, bytes, FLOPs per token or latency of a model. The result never decreases if a
size of the model grows.
"""


@dataclass(frozen=True)
class Space:
    """Store the values that each size of a pruned model may take, such as the allowed hidden widths.

    >>> space = Space(ModelConfig(preset="smollm2-135m"), multiple=64)
    >>> space.hidden
    [576, 512, 448, 384, 320, 256, 192]
    """

    cfg: ModelConfig
    """Config of the unpruned model."""
    multiple: int = 1
    """Number by which all allowed numbers of neurons and of hidden channels are divisible."""
    layers: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    """Numbers of key/value heads."""
    hidden: list[int] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    """Numbers of query heads per key/value head; by default only the number of the unpruned model."""

    def __post_init__(self) -> None:
        """Allow all values of a size, in descending order, if no values are given."""
        whole: dict[str, Iterable[int]] = {
            "layers": range(self.cfg.layers, 0, -1),
            "heads": range(self.cfg.kv_heads, 0, -1),
            QUERIES: [count(self.cfg, QUERIES)],
        }
        for name, counts in {**whole, "hidden": hidden_sizes(self.cfg, self.multiple)}.items():
            if not getattr(self, name):
                object.__setattr__(self, name, list(counts))

    def restricted(self, check: Callable[[ModelConfig], None], *, each: bool = True, tries: int = 1) -> Space:
        """Return a Space with only the values that `check` allows. The values of the unpruned model are always allowed.

        A value is checked alone: all other sizes are unpruned.

        Args:
          check: function that raises a RequestError if the model cannot be pruned to a config.
          each: whether to check every value. Otherwise, only the smallest value of each size is checked. If this value
              is not allowed, the size is not reduced.
          tries: number of steps to try for the number of neurons. The steps are `multiple`, 2 * `multiple`, and so on.

        Raises:
          RequestError: If no number of neurons is allowed.
        """

        def passes(name: str, count: int) -> bool:
            try:
                check(self.one(name, count))
            except RequestError:
                return False
            return True

        allowed = {}
        for name, counts in self._counts().items():
            whole = count(self.cfg, name)
            good = {n: passes(name, n) for n in (counts if each else {min(counts)} - {whole})}
            allowed[name] = [n for n in counts if n == whole or good.get(n if each else min(counts))]
        steps = [self.multiple * (k + 1) for k in range(tries) if self.multiple * (k + 1) < self.cfg.d_ff]
        step = next((n for n in steps if passes("ffn", n)), None)
        if step is None and steps:
            check(self.one("ffn", steps[0]))
        return Space(self.cfg, step or self.multiple, **allowed)

    def one(self, name: str, number: int) -> ModelConfig:
        """Return the unpruned model's config with only the size `name` changed to `number`."""
        whole = {part: count(self.cfg, part) for part in (*PARTS, QUERIES)}
        return with_sizes(self.cfg, **{**whole, name: number})

    def points(self) -> dict[str, list[int]]:
        """Return the values of each size at which the loss is measured, in descending order.

        The keys are the names in `PARTS`. `QUERIES` is also a key if the number of query heads may change.
        """
        found = {}
        for name, counts in {**self._counts(), "ffn": range(1, self.cfg.d_ff + 1)}.items():
            found[name] = sorted({_nearest(self.cfg, name, counts, f) for f in FRACTIONS}, reverse=True)
            found[name] = [n for n in found[name] if n != count(self.cfg, name)]
        return {name: found[name] for name in PARTS} | ({QUERIES: found[QUERIES]} if found[QUERIES] else {})

    def choices(self) -> Iterator[tuple[int, int, int, int]]:
        """Iterate over all choices of layers, key/value heads, hidden width and query heads per key/value head."""
        return product(sorted(self.layers), sorted(self.heads), self.hidden, sorted(self.queries))

    def smallest(self) -> ModelConfig:
        """Return the config in which every size has its smallest value."""
        least = {name: min(counts) for name, counts in self._counts().items()}
        return with_sizes(self.cfg, **least, ffn=min(self.multiple, self.cfg.d_ff))

    def filled(
        self, layers: int, heads: int, hidden: int, queries: int, wanted: float, size: Size
    ) -> ModelConfig | None:
        """Return the config with these sizes and as many neurons as the budget `wanted` allows.

        If the budget does not allow the smallest number of neurons, return None.
        """

        def of(ffn: int) -> ModelConfig:
            return with_sizes(self.cfg, layers=layers, heads=heads, ffn=ffn, hidden=hidden, queries=queries)

        step = min(self.multiple, self.cfg.d_ff)
        low, high = 1, self.cfg.d_ff // step
        found = {n: size(of(n * step)) for n in {low, high}}
        if found[low] > wanted:
            return None
        if found[high] <= wanted:
            return of(high * step)
        interpolates = True  # finds the number at once if the size is linear in the neurons, as all but latencies are
        while high - low > 1:
            share = (wanted - found[low]) / (found[high] - found[low]) if interpolates else 1 / 2
            middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
            found[middle] = size(of(middle * step))
            low, high = (middle, high) if found[middle] <= wanted else (low, middle)
            interpolates = not interpolates
        return of(low * step)

    def uniform(self, wanted: float, size: Size) -> ModelConfig:
        """Return the config that meets the budget by keeping about the same fraction of every size.

        For each percentage, the layers, heads and hidden width are reduced to this percentage. The number of neurons is
        then the largest that the budget allows. The result is the config whose kept fraction of neurons is nearest to
        the percentage.
        """
        best, distance = self.smallest(), np.inf
        for percent in range(1, 101):
            share = percent / 100
            near = {name: _nearest(self.cfg, name, counts, share) for name, counts in self._counts().items()}
            if len(self.heads) > 1:  # the same fraction of the groups and of their query heads would be its square
                near[QUERIES] = count(self.cfg, QUERIES)
            model = self.filled(**near, wanted=wanted, size=size)
            if model is not None and abs(model.d_ff / self.cfg.d_ff - share) < distance:
                best, distance = model, abs(model.d_ff / self.cfg.d_ff - share)
        return best

    def _counts(self) -> dict[str, list[int]]:
        return {"layers": self.layers, "heads": self.heads, "hidden": self.hidden, QUERIES: self.queries}


def count(cfg: ModelConfig, name: str) -> int:
    """Return the size `name` of a config, such as the number of layers or of query heads per key/value head."""
    return cfg.heads // cfg.kv_heads if name == QUERIES else getattr(cfg, PARTS[name])


def with_sizes(
    cfg: ModelConfig, *, layers: int, heads: int, ffn: int, hidden: int, queries: int | None = None
) -> ModelConfig:
    """Return the config with other sizes.

    `heads` is the number of key/value heads. Each key/value head keeps `queries` query heads; by default all.

    The encoder of an encoder-decoder keeps the same fraction of layers as the decoder.
    """
    update = {
        "layers": layers, "kv_heads": heads, "heads": heads * (queries or cfg.heads // cfg.kv_heads), "d_ff": ffn,
        "d_model": hidden, "preset": "",
    }  # fmt: skip
    if cfg.encoder_layers:
        update["encoder_layers"] = max(1, round(cfg.encoder_layers * layers / cfg.layers))
    return cfg.model_copy(update=update)


def hidden_sizes(cfg: ModelConfig, multiple: int) -> list[int]:
    """Return the hidden widths that a search considers, descending from the model's width to a quarter of this width.

    The step is a sixteenth of the width. Reduced widths are multiples of `multiple`.
    """
    if cfg.positions == "sinusoidal":
        return [cfg.d_model]
    step = max(1, round(cfg.d_model / 16 / multiple)) * multiple
    rounded = {n // multiple * multiple for n in range(cfg.d_model, 0, -step)}
    return [cfg.d_model, *sorted((n for n in rounded if cfg.d_model / 4 <= n < cfg.d_model), reverse=True)]


def _nearest(cfg: ModelConfig, name: str, counts: Iterable[int], share: float) -> int:
    """Return the element of `counts` that is nearest to the fraction `share` of the model's size `name`.

    For layers, heads and neurons, the fraction of the size is first rounded to an integer.
    """
    aim = share * count(cfg, name)
    aim = aim if name == "hidden" else max(1, round(aim))
    return min(counts, key=lambda n: abs(n - aim))
