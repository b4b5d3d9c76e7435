"""Define the base class of tasks. A task defines the rows, the loss, the metrics and the predictions of a model head.

A new task is a subclass whose instance is registered in `llmctl.evaluate.tasks.registry`. The subclass overrides
methods:

    class Ordinal(Classify):
        name, title = "ordinal", "ordinal classification"

        def score(self, y, batch, options):
            ...

    TASK = Ordinal()

The methods are defined in one file per caller: `record` (class attributes), `rows` (data), `losses`, `training`
(validation and checks), `evaluation` (metrics), `predictions` (new rows) and `export` (other formats).
"""

from __future__ import annotations

from llmctl.evaluate.tasks.evaluation import EvaluationMethods
from llmctl.evaluate.tasks.export import ExportMethods
from llmctl.evaluate.tasks.predictions import Predicts
from llmctl.evaluate.tasks.training import TrainingMethods


class Task(TrainingMethods, EvaluationMethods, Predicts, ExportMethods):
    """Describe one task by class attributes and methods.

    The defaults suit tasks that read one text, or a pair of texts, per row.

    Example:
        >>> from llmctl.evaluate.tasks.registry import TASKS
        >>> TASKS["classify"].head, TASKS["classify"].best(["no", "yes"])
        ('classify', 'accuracy')
    """
