"""Select the matrices that get an adapter, such as LoRA, and replace each matrix by a weight node.

The weight node contains the matrix and the arrays of the adapter.
"""

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

OUTSIDE = ("embed", "lm_head")
"""Names of the matrices outside the layers that can get an adapter. The task's head gets no adapter, because the head
itself is trained.
"""


def wrap(
    cfg: ModelConfig,
    params: Params,
    targets: Sequence[str],
    make: Callable[[weights.Matrix, int], weights.Adapter],
    mesh: jax.sharding.Mesh,
    setting: str,
    *,
    table: bool = False,
) -> Params:
    """Return the parameters with an adapter around every target matrix.

    Args:
      cfg: config of the model.
      params: parameters of the model.
      targets: names of matrices (q, k, v, o, gate, up, down, lm_head, embed); empty means all matrices in the layers.
      make: function (matrix, index of the matrix among all arrays of the model) -> adapter.
      mesh: the devices over which the result is sharded.
      setting: name of the setting that lists the targets, for errors.
      table: whether the adapter can be used for the token embeddings, whose rows are looked up.

    Raises:
      RequestError: If a target names no matrix. If the adapter does not support the matrix. If the matrix has an
        adapter.
    """
    import jax

    from llmctl.model import functional, weights

    number = {path: i for i, path in enumerate(weights.flatten(params))}
    made: dict[str, weights.Adapter] = {}
    chosen = selected(params, targets)
    if missing := sorted(set(targets) - {m.name for m in chosen}):
        raise RequestError(f"{setting}: the model has no matrix {', '.join(missing)} in its blocks")
    for m in chosen:
        if m.place == "embedding" and not table:
            raise RequestError(f"{setting}: {m.name}: the token table has adapters of method 'lora' only")
        if m.node.has_adapter:
            raise RequestError(
                f"{m.path}: has a low-rank pair already; merge the parent first (finetune with merge = true)"
            )
        made[m.path] = make(m, number[m.path])
    tree = weights.updated(params, made)
    return jax.device_put(tree, functional.shardings(cfg, tree, mesh))


def selected(params: Params, targets: Sequence[str]) -> list[weights.Matrix]:
    """Return the matrices that get an adapter: all matrices whose names are in `targets`.

    If `targets` is empty, return all matrices in the layers except the matrices of bottleneck adapters.
    """
    from llmctl.model import weights

    if not targets:
        return [m for m in weights.matrices(params, "block") if not weights.parse(m.path).bottleneck]
    return [m for m in weights.matrices(params) if m.name in targets and (m.place == "block" or m.name in OUTSIDE)]


def of_matrix(m: weights.Matrix, pattern: Mapping[str, T], default: T) -> T:
    """Return the value for one matrix from the setting `pattern` ({name: value}). If `pattern` has no entry for the
    matrix, return the default.

    An entry with the module and the name ("attn/q") takes precedence over an entry with the name alone ("q").
    """
    return pattern.get(m.module, pattern.get(m.name, default))


def check_pattern(params: Params, targets: Sequence[str], pattern: Iterable[str], setting: str) -> None:
    """Check that every name in the setting `pattern` ({name: value}) is the name of a matrix that gets an adapter.

    Raises:
      RequestError: If a name belongs to no matrix, or to a matrix without an adapter.
    """
    found = selected(params, targets)
    if missing := sorted({*pattern} - {m.name for m in found} - {m.module for m in found}):
        raise RequestError(f"{setting}: no matrix with an adapter is called {', '.join(missing)}")
