"""Create the training state, and compute the shardings of its arrays.

The state is a dictionary:

- "params": the trained arrays, by name. Arrays that are not trained are not in the state.
- "optimizer": the state of the optimizer.
- "step": the number of finished steps.
- "skipped" and "skips": the number of consecutive bad steps, and of all bad steps. A bad step has no labels, or a loss
  or gradient that is not finite or is an outlier.
- "ema": the moving average of the trained arrays, if `optim.ema` is set.
- "usual": the running mean and variance of loss and gradient norm, if outliers are skipped.
- "memory": further arrays that the job keeps between steps, if there are any (`Job.memory`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmctl.config.settings import OptimConfig
from llmctl.distributed import mesh as meshes
from llmctl.train import optim
from llmctl.train.job import Params, State

Memory = Callable[[Params], Any] | None
"""Function from the trained arrays to further arrays that are kept between steps (`Job.memory`); None if nothing
is kept.
"""


def fresh(optimizer: Any, config: OptimConfig, named: Params, memory: Memory = None) -> State:
    """Return the training state before the first step. `memory` creates the arrays that are kept between steps."""

    def zero() -> jax.Array:  # a buffer per counter, because the step donates each buffer of its input
        return jnp.zeros((), jnp.int32)

    state = {"params": named, "optimizer": optimizer.init(named), "step": zero(), "skipped": zero(), "skips": zero()}
    if config.ema:
        state["ema"] = jax.tree.map(jnp.copy, named)
    if config.spike:
        state["usual"] = {"mean": jnp.zeros(2), "variance": jnp.zeros(2), "count": zero()}
    if memory:
        state["memory"] = memory(named)
    return state


def state_shardings(
    optimizer: Any, config: OptimConfig, named: Params, mesh: jax.sharding.Mesh, memory: Memory = None
) -> State:
    """Return the sharding of each array of a training state, in the state's structure.

    Arrays of the optimizer, of moving averages and of "memory" are sharded like the parameters of the same name.
    Counters are replicated.
    """
    params = {name: a.sharding for name, a in named.items()}
    replicated = meshes.replicated(mesh)
    shapes = jax.eval_shape(lambda n: fresh(optimizer, config, n, memory), named)
    found = jax.tree.map(lambda _: replicated, shapes)
    found |= {key: params for key in ("params", "ema") if key in found}
    parts = {key: shapes[key] for key in ("optimizer", "memory") if key in shapes}
    return found | optim.shardings(parts, params, shapes["params"], replicated)
