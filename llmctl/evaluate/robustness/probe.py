"""Measure robustness: the metrics of a task on changed texts, and the fraction of predictions that change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.evaluate.probes.base import Probe

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.manifest import Manifest
    from llmctl.evaluate.setup import Held, Measured, Setup


class Robustness(Probe):
    """Measure accuracy on texts in upper case, and the flip rate: the fraction of predictions that change."""

    name = "robustness"
    title = "robustness"
    section = "robustness"

    def check_model(self, manifest: Manifest, settings: Any, where: str) -> None:
        """Check that the artifact is a classifier.

        Raises:
            RequestError: If the artifact has another task.
        """
        from llmctl.evaluate.tasks.registry import of

        if (task := of(manifest)).name != "classify":
            raise RequestError(f"{where}: task 'robustness' needs a model of task classify, this model has {task.name}")

    def measure(self, artifact: Artifact, held: Held | None, setup: Setup, settings: Any) -> Measured:
        """Classify each text, and the text in upper case."""
        import numpy as np

        from llmctl.evaluate.metrics.classification import wilson_interval
        from llmctl.evaluate.predict import Predictor
        from llmctl.evaluate.setup import Measured, label_map

        assert held is not None
        known, rows = artifact.manifest.labels, list(held.examples)
        label_N = label_map(held.examples.classes, known, str(artifact.path))[held.examples.labels]
        predictor = Predictor(artifact, setup.batch_size, setup.seq_len, setup.dtype)

        def predicted(change: Any) -> np.ndarray:
            found = predictor.predictions([{**row, "text": change(row["text"])} for row in rows])
            return np.stack(found).argmax(-1)

        clean_N, upper_N = predicted(str), predicted(str.upper)
        values = {
            "accuracy": clean_N == label_N,
            "accuracy_upper": upper_N == label_N,
            "flips_upper": clean_N != upper_N,
        }
        metrics: dict[str, Any] = {}
        for name, value_N in values.items():
            low, high = wilson_interval(int(value_N.sum()), len(value_N))
            metrics |= {name: float(value_N.mean()), f"{name}_low": low, f"{name}_high": high}
        protocol = f"{held.split} split, {len(rows)} examples, {setup.seq_len} tokens, {setup.dtype}"
        return Measured(self.title, protocol, metrics, values=values)


PROBE = Robustness()
