"""Select the matrices of the blocks that get an adapter, and replace each by an adapter that contains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from llmctl.config.errors import RequestError
from llmctl.train.adapters.method import Params

if TYPE_CHECKING:
    import jax

    from llmctl.model import weights
    from llmctl.model.config import ModelConfig

T = TypeVar("T")


def wrap(
    cfg: ModelConfig,
    params: Params,
    targets: Sequence[str],
    make: Callable[[weights.Matrix, int], weights.Adapter],
    mesh: jax.sharding.Mesh,
    setting: str,
) -> Params:
    """Return the parameters with an adapter around every target matrix of the blocks.

    Args:
      cfg: config of the model.
      params: parameters of the model.
      targets: names of matrices (q, k, v, o, gate, up, down); empty means all.
      make: function from a matrix and its number to the adapter. The number does not depend on `targets`.
      mesh: the devices over which the result is sharded.
      setting: name of the setting `targets` in errors.

    Raises:
      RequestError: a target names no matrix, or a matrix already has an adapter.
    """
    import jax

    from llmctl.model import functional, weights

    number = {path: i for i, path in enumerate(weights.flatten(params))}
    made: dict[str, weights.Adapter] = {}
    chosen = [m for m in weights.matrices(params, "block") if not targets or m.name in targets]
    if missing := sorted(set(targets) - {m.name for m in chosen}):
        raise RequestError(f"{setting}: the model has no matrix {', '.join(missing)} in its blocks")
    for m in chosen:
        if m.node.has_adapter:
            raise RequestError(
                f"{m.path}: has a low-rank pair already; merge the parent first (finetune with merge = true)"
            )
        made[m.path] = make(m, number[m.path])
    tree = weights.updated(params, made)
    return jax.device_put(tree, functional.shardings(cfg, tree, mesh))


def of_matrix(m: weights.Matrix, pattern: Mapping[str, T], default: T) -> T:
    """Return a matrix's entry in a pattern, or the default if the pattern has none.

    An entry for the matrix's module (attn/q) takes precedence over an entry for its name (q).
    """
    return pattern.get(m.module, pattern.get(m.name, default))


def check_pattern(params: Params, targets: Sequence[str], pattern: Iterable[str], setting: str) -> None:
    """Check that every key of a pattern names a matrix that gets an adapter.

    Raises:
      RequestError: a key names no such matrix.
    """
    from llmctl.model import weights

    found = [m for m in weights.matrices(params, "block") if not targets or m.name in targets]
    if missing := sorted({*pattern} - {m.name for m in found} - {m.module for m in found}):
        raise RequestError(f"{setting}: no matrix with an adapter is called {', '.join(missing)}")
