"""Train bottleneck adapters in the layers of a frozen model. The model may be quantized.

An adapter follows each sublayer (Houlsby et al., 2019, arXiv:1902.00751), or runs in parallel to the feed-forward layer
(He et al., 2022, arXiv:2110.04366). The adapters are part of the network, so ModelConfig contains their size. Adapters
cannot be merged into other matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.train.adapters.method import Method, Params

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.config import ModelConfig

SCALE = {"sequential": 1.0, "parallel": 4.0}
"""Default scale of the adapters' output, by form. Each default is from the paper that introduced the form."""


class Houlsby(Method):
    """Train bottleneck adapters and the task's head.

    If the form is sequential, the layers' norms are trained too, as in the paper of Houlsby et al.
    """

    name = "houlsby"
    settings = ("houlsby",)

    def check(self, config: Any, base: Artifact) -> None:
        """Check the config as Method.check does, and check that no layer of a pruned model gets an untrained adapter.

        The weights of an untrained adapter stay zero. If the model is pruned, later training would treat these zeros as
        pruned weights and never change them.

        Raises:
          RequestError: If the model's adapters are quantized. If a setting freezes layers, and the model is pruned and
              has no adapters yet. If Method.check fails.
        """
        from llmctl.model import weights

        super().check(config, base)
        old = {path: w for path, w in weights.flatten(base.params).items() if weights.parse(path).bottleneck}
        if any(weights.as_node(w).is_integer for w in old.values()):
            raise RequestError(
                f"{base.path}: has bottleneck adapters that are quantized, and integers cannot be trained; train the "
                "adapters before quantizing, or use method = 'lora' with merge = false"
            )
        frozen = (
            "freeze_layers" if config.freeze_layers else "trained.last_layers" if config.trained.last_layers else ""
        )
        if frozen and base.manifest.pruned and not base.model.adapter_size:
            raise RequestError(
                f"{frozen}: {base.path} is pruned, so later stages would hold the zeros of new adapters in frozen "
                "layers; leave it out with method = 'houlsby', or use method = 'lora' with merge = false"
            )

    def network(self, config: Any, model: ModelConfig) -> ModelConfig:
        """Return the config of the model with adapters. Existing adapters are trained further.

        Raises:
          RequestError: If existing adapters have another size, form or scale, or `houlsby.size` exceeds the model
              width.
        """
        settings = config.houlsby
        if settings.size > model.d_model:
            raise RequestError(f"houlsby.size = {settings.size:,} is above the width of the layers ({model.d_model:,})")
        fields = {
            "adapter_size": settings.size,
            "adapter_form": settings.form,
            "adapter_scale": settings.scale or SCALE[settings.form],
        }
        found = {name: getattr(model, name) for name in fields}
        if model.adapter_size and found != fields:
            raise RequestError(
                f"houlsby: the parent has bottleneck adapters already (size {model.adapter_size}, "
                f"{model.adapter_form}, scale {model.adapter_scale:g}), which these settings must repeat"
            )
        return model.model_copy(update=fields)

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with adapters, sharded over `mesh`. Adapters that the model already has are kept.

        New adapters do not change the model's outputs.
        """
        import jax

        from llmctl.model import functional, weights

        missing = sorted(weights.flatten(functional.abstract(model)).keys() - weights.flatten(params).keys())
        if not missing:
            return params
        layout = weights.flatten(functional.shardings(model, functional.abstract(model), mesh))

        def fresh(key: jax.Array) -> dict[str, Any]:
            made = weights.flatten(functional.init(model, key))
            return {path: made[path] for path in missing}

        new = jax.jit(fresh, out_shardings={path: layout[path] for path in missing})(key)
        return weights.updated(params, new)

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for arrays that are trained.

        These are the adapters and the task's head. If the form is sequential, the layers' norms are trained too.
        """
        from llmctl.model import weights

        norms = model.adapter_form == "sequential"

        def trained(name: str) -> bool:
            found = weights.parse(name)
            return found.bottleneck or found.task_head or (norms and found.stacked and found.norm)

        return trained


METHOD = Houlsby()
