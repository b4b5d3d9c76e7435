"""Define the interface of finetuning methods.

A method defines the parameters that it adds, the parameters that it trains, and the models that it rejects.

A new method is a subclass of `Method`. An instance of the subclass is registered in `llmctl.train.adapters.registry`.
The subclass overrides methods:

    class Norms(Method):
        name = "norms"

        def trains(self, config, model, params):
            return lambda name: "norm" in name

    METHOD = Norms()

The modules of settings import the modules of methods, and must load without JAX. Modules of methods therefore import
JAX only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmctl.config.errors import RequestError

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.artifact import Artifact
    from llmctl.model.config import ModelConfig

Params = dict[str, Any]


class Method:
    """Define a finetuning method. By default, only the task's head is trained, and the parent model is frozen.

    The parent is the model that is finetuned. The argument `config` of every method is the config of the stage
    `finetune`, and has the fields that `settings` names.

    Example:
      >>> from llmctl.train.adapters.registry import METHODS
      >>> METHODS["lora"].adapts, METHODS["lora"].settings, METHODS["full"].changes_base
      (True, ('lora', 'merge'), True)
    """

    name: ClassVar[str]
    """Name of the method in the registry of finetuning methods."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Names of the config's fields that this method reads. Fields that every method reads are not listed."""
    changes_base: ClassVar[bool] = False
    """Whether the method trains the matrices of the parent model. Such a method rejects quantized models."""
    adapts: ClassVar[bool] = False
    """Whether the method adds adapters that can be merged. If the setting `merge` is true, the adapters are merged into
    the matrices at the end of training.
    """
    fills_zeros: ClassVar[bool] = True
    """Whether merging an adapter makes the zeros of a pruned matrix nonzero."""

    def check(self, config: Any, base: Artifact) -> None:
        """Raise RequestError if training would undo the pruning or quantization of the model that is finetuned."""
        from llmctl.model import weights

        merges = self.merges(config)
        integers = any(weights.as_node(w).is_integer for w in weights.flatten(base.params).values())
        if integers and (self.changes_base or merges):
            raise RequestError(
                f"{base.path}: is quantized, and integers cannot be trained; use method = 'lora' with merge = false "
                "(QLoRA), or finetune before quantizing"
            )
        if merges and self.fills_zeros and base.manifest.pruned:
            raise RequestError(
                f"{base.path}: is pruned to {base.manifest.sparsity:.0%} zeros, which merged low-rank pairs would "
                "fill; use method = 'full', which keeps the zeros, or merge = false"
            )

    def merges(self, config: Any) -> bool:
        """Return whether adapters are merged into their matrices after training."""
        return self.adapts and config.merge and config.store == "model"

    def network(self, config: Any, model: ModelConfig) -> ModelConfig:
        """Return the model's config with the layers that the method adds. The default adds no layers.

        Raises:
          RequestError: If the settings do not fit the model.
        """
        return model

    def tokenizer_dir(self, config: Any, model: ModelConfig, folder: Path, work: Path) -> Path:
        """Return the folder of the finetuned model's tokenizer. The default is `folder`, the parent model's tokenizer.

        A method that changes the tokenizer writes the changed tokenizer to the folder `work`.
        """
        return folder

    def check_rows(self, config: Any, model: ModelConfig, rows: Any) -> None:
        """Raise RequestError if the method cannot train on these rows (token sequences). The default accepts all
        rows."""

    def attach(
        self, config: Any, model: ModelConfig, params: Params, key: jax.Array, mesh: jax.sharding.Mesh
    ) -> Params:
        """Return the parameters with the method's adapters, sharded over `mesh`. The default adds no adapters.

        Raises:
          RequestError: If the settings do not fit the model.
        """
        return params

    def trains(self, config: Any, model: ModelConfig, params: Params) -> Callable[[str], bool]:
        """Return a predicate on array names: True for arrays that are trained. By default these are adapters and the
        task's head.

        Raises:
          RequestError: If the model has no parameters that the method trains.
        """
        from llmctl.model import weights

        adapters = weights.adapter_names(params)
        return lambda name: name in adapters or weights.parse(name).task_head

    def trains_extra(self, config: Any) -> bool:
        """Return whether the method trains arrays outside the model, such as a network that computes a prefix.

        `during` returns these arrays as the field `extra`.
        """
        return False

    def rate(self, config: Any, name: str) -> float:
        """Return the factor by which the learning rate of a trained array is multiplied; by default 1."""
        return 1.0

    def during(self, config: Any, params: Params, steps: int) -> dict[str, Any]:
        """Return the settings of the training job that this method needs: fields of `llmctl.train.job.Job`, by name.

        The job has `steps` training steps.
        """
        return {}

    def finish(self, config: Any, params: Params) -> Params:
        """Convert the trained parameters to the parameters to save. Adapters are merged afterwards."""
        return params
