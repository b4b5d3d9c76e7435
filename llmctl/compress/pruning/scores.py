"""Define pruning scores: the importance of each weight of a matrix. Score and sparsity pattern are independent.

A new score is one function here and its name in `SCORES`. Another package provides a score by the entry point
`score.NAME`. The module imports JAX only inside the functions, so that settings can check names without loading JAX.

Shapes: I inputs, O outputs of one layer's matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmctl.config.registry import Registry

if TYPE_CHECKING:
    import jax

    from llmctl.compress.calibration.statistics import Moments

Calculate = Callable[["jax.Array", "Moments | None", Mapping[str, "jax.Array"], "jax.Array"], "jax.Array"]
"""Function that computes the scores [I, O] of a matrix. The lowest scores are pruned. Its arguments are the weights
[I, O] (float32), statistics, gradients and a random key.

`statistics` has the sum of squares of each input over the calibration tokens (`Moments`). `gradients` has the gradient
sums that `Score.gradients` names, each [I, O]. The key differs for every matrix of every layer. Zero weights always
count as the least important.
"""


@dataclass(frozen=True)
class Score:
    """Define a pruning score: a function and the data that it needs.

    >>> @score(per="matrix", gradients=("square",))
    ... def newest(weights_IO, statistics, gradients, key):
    ...     return weights_IO**2 * gradients["square"]
    >>> newest.calibrated, float(newest.calculate_scores(2.0, None, {"square": 3.0}, None))
    (True, 12.0)
    """

    calculate_scores: Calculate
    per: Literal["matrix", "output"] = "matrix"
    """Group of weights within which scores compete in an unstructured pattern: the complete matrix, or each output's
    inputs."""
    statistics: bool = False
    """Whether the function needs the sums of squares of each matrix's inputs (`Moments`)."""
    gradients: tuple[Literal["sum", "absolute", "square"], ...] = ()
    """Names of the gradient sums that the function needs. Each is a sum of g, |g| or g^2 over calibration batches, for
    the gradient g of the loss."""

    @property
    def calibrated(self) -> bool:
        """Return whether the score reads calibration data."""
        return self.statistics or bool(self.gradients)


def score(
    *,
    per: Literal["matrix", "output"] = "matrix",
    statistics: bool = False,
    gradients: tuple[Literal["sum", "absolute", "square"], ...] = (),
) -> Callable[[Calculate], Score]:
    """Return a decorator that makes a Score from a function. The arguments are fields of `Score`."""
    return lambda calculate_scores: Score(calculate_scores, per, statistics, gradients)


SCORES: Registry[Score] = Registry(
    "score", {name: f"{__name__}:{name}" for name in ("magnitude", "wanda", "ria", "taylor", "fisher", "random")}
)


@score(per="matrix")
def magnitude(weights_IO, statistics, gradients, key):
    """Return |w| as the scores [I, O]. This score reads no data."""
    return abs(weights_IO)


@score(per="output", statistics=True)
def wanda(weights_IO, statistics, gradients, key):
    """Return |W_ij| * ||X_i||_2 as the scores [I, O] (Sun et al., 2023, arXiv:2306.11695).

    The score is the norm of the weight's contribution to the output.
    """
    from jax import numpy as jnp

    return abs(weights_IO) * jnp.sqrt(statistics.squares)[:, None]


@score(per="matrix", statistics=True)
def ria(weights_IO, statistics, gradients, key):
    """Return relative importance times sqrt(||X_i||_2) as the scores [I, O] (Zhang et al., 2024, ICLR).

    The relative importance of a weight is |w| / sum(|w| of its input) + |w| / sum(|w| of its output). An input or
    output that has only small weights therefore keeps some weights.
    """
    from jax import numpy as jnp

    size_IO = abs(weights_IO)
    tiny = jnp.finfo(size_IO.dtype).tiny  # an input or output without weights has no share
    of_input = size_IO / jnp.maximum(size_IO.sum(axis=1, keepdims=True), tiny)
    of_output = size_IO / jnp.maximum(size_IO.sum(axis=0, keepdims=True), tiny)
    return (of_input + of_output) * (statistics.squares**0.25)[:, None]


@score(per="matrix", gradients=("absolute",))
def taylor(weights_IO, statistics, gradients, key):
    """Return |w g|, summed over batches, as the scores [I, O].

    The score is the first-order change of the loss if the weight is removed (Molchanov et al., 2019, arXiv:1906.10771).
    """
    return abs(weights_IO) * gradients["absolute"]


@score(per="matrix", gradients=("square",))
def fisher(weights_IO, statistics, gradients, key):
    """Return w^2 times the sum of g^2 as the scores [I, O].

    The sum of g^2 is the diagonal Fisher information (Theis et al., 2018, arXiv:1801.05787).
    """
    return weights_IO**2 * gradients["square"]


@score(per="matrix")
def random(weights_IO, statistics, gradients, key):
    """Return uniform random scores [I, O], a baseline for every other score."""
    import jax

    return jax.random.uniform(key, weights_IO.shape)
