"""Define what a task does in training besides its losses: checks, validation metrics, and values fitted at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from llmctl.config.settings import TrainConfig
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.losses import Losses, Options
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.program import Program

if TYPE_CHECKING:
    from llmctl.data.device_batches import Rows


class TrainingMethods(Losses):
    """Define the methods of a task that training stages call."""

    def tokenizer_dir(self, folder: Path, settings: Any, work: Path) -> Path:
        """Return the folder of the tokenizer that a finetuned artifact gets.

        Args:
            folder: Folder of the parent's tokenizer, which is returned if the task changes nothing.
            settings: The task's own settings (`section`).
            work: Folder to write a changed tokenizer to.

        Raises:
            RequestError: If the tokenizer lacks what the task needs.
        """
        return folder

    def check_method(self, adapts: bool, options: Options) -> None:
        """Check that the task can be trained with a finetuning method.

        Args:
            adapts: Whether the method adds adapters to a frozen model.
            options: Settings of the loss.

        Raises:
            RequestError: If the method does not suit the task.
        """

    def extra_passes(self, settings: Any) -> int:
        """Return the number of forward passes per training step in addition to the differentiated pass.

        Args:
            settings: The task's own settings (`section`).
        """
        return 0

    def reads_adapters(self, settings: Any) -> bool:
        """Return True if the loss compares the model with and without its adapters. If so, the adapters must not be
        merged.

        Args:
            settings: The task's own settings (`section`).
        """
        return False

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return the name of the validation metric that selects the best checkpoint."""
        return "loss"

    def validator(
        self,
        model: ModelConfig,
        text: Text,
        tokenizer: Tokenizer,
        settings: Any,
        train: TrainConfig,
        ends: Sequence[int],
    ) -> Callable[[functional.Params, Callable[[], None]], dict[str, float]] | None:
        """Return a function that computes further validation metrics during training; None if there are none.

        The function takes (parameters, check_stop). The function must call `check_stop()` often. `check_stop` raises an
        exception if training must stop.

        Args:
            model: Config of the model.
            text: The stage's data.
            tokenizer: Tokenizer of the model.
            settings: The task's own settings (`section`).
            train: Settings of training.
            ends: End tokens, at which generation stops.

        Raises:
            RequestError: If the metrics cannot be computed.
        """
        return None

    def generation_programs(
        self,
        model: ModelConfig,
        params: functional.Params,
        settings: Any,
        mesh: Mesh,
        *,
        seq_len: int,
        batch_size: int,
        dtype: str,
    ) -> list[Program]:
        """Return the programs that generate answers in validation and evaluation; [] if the task generates none.

        Args:
            model: Config of the model.
            params: Abstract parameters of the model.
            settings: Settings for generating answers.
            mesh: The device mesh.
            seq_len: Maximum number of tokens per prompt.
            batch_size: Number of prompts per batch.
            dtype: Dtype of the computation.
        """
        return []

    def calibrated(
        self, model: ModelConfig, params: functional.Params, rows: Rows, setup: Setup
    ) -> tuple[functional.Params, dict[str, Any]]:
        """Return parameters whose probabilities are calibrated on `rows`, and metrics of the calibration.

        Only tasks whose `calibrates` is true define this method.
        """
        raise NotImplementedError

    def fit(self, model: ModelConfig, params: functional.Params, rows: Rows, setup: Setup) -> dict[str, Any]:
        """Return values that are fitted on validation rows after training, such as the decision threshold of each
        class; {} if there are none.

        The artifact stores the values as `fitted`.
        """
        return {}

    def validation_note(self, model: ModelConfig, rows: Rows) -> str:
        """Return a note on how validation in training differs from `evaluate`, or "" if it does not differ."""
        return ""
