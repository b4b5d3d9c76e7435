"""Define the settings of structured pruning: the parts to remove, the amounts, and the importance that selects the
parts.

The module does not import JAX.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmctl.compress.pruning.settings import MethodSettings
from llmctl.compress.structured_pruning.budget import BudgetConfig
from llmctl.compress.structured_pruning.structured_method import ImportanceName

PARTS = ("heads", "ffn", "layers", "hidden")
"""Fields that set how much structured pruning removes. Each field X has the longer forms keep_X and remove_X."""


class StructuredSettings(MethodSettings):
    """Set the parts that structured pruning removes.

    >>> StructuredSettings(keep_layers=3).layers, StructuredSettings(remove_ffn=0.5).sized
    (3.0, ['ffn'])
    """

    added: ClassVar[frozenset[str]] = MethodSettings.added | {
        *(f"{verb}_{part}" for part in PARTS for verb in ("keep", "remove")),
        *("importance", "hidden", "budget", "vocabulary", "latency", "plot"),
    }

    heads: float = Field(default=0.0, ge=0)
    """Shorthand: a value of 1 or more sets keep_heads, a value below 1 sets remove_heads, and 0 keeps all heads."""
    keep_heads: int = Field(default=0, ge=0, strict=True)
    """Number of query heads to keep per layer, if the method is `structured`."""
    remove_heads: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Fraction of the query heads to remove per layer, if the method is `structured`."""
    heads_by: Literal["groups", "queries", "both"] = "groups"
    """Unit of the removed heads, if the method is `structured`. groups: remove key/value heads with all their query
    heads. queries: remove the same number of query heads from every key/value head. both: the search for a budget
    compares all combinations of groups and queries."""
    ffn: float = Field(default=0.0, ge=0)
    """Shorthand: a value of 1 or more sets keep_ffn, a value below 1 sets remove_ffn, and 0 keeps all neurons."""
    keep_ffn: int = Field(default=0, ge=0, strict=True)
    """Number of neurons to keep per feed-forward layer, if the method is `structured`."""
    remove_ffn: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Fraction of the neurons to remove per feed-forward layer, if the method is `structured`."""
    hidden: float = Field(default=0.0, ge=0)
    """Shorthand: a value of 1 or more sets keep_hidden, a value below 1 sets remove_hidden, and 0 keeps all
    channels."""
    keep_hidden: int = Field(default=0, ge=0, strict=True)
    """Number of hidden channels to keep (the width of the residual stream), if the method is `structured`."""
    remove_hidden: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Fraction of the hidden channels to remove, if the method is `structured`."""
    multiple: int = Field(default=1, ge=1)
    """Divisor of the numbers of kept neurons and hidden channels, if the method is `structured` (128 suits TPUs)."""
    layers: float = Field(default=0.0, ge=0)
    """Shorthand: a value of 1 or more sets keep_layers, a value below 1 sets remove_layers, and 0 keeps all layers."""
    keep_layers: int = Field(default=0, ge=0, strict=True)
    """Number of layers to keep, if the method is `structured`."""
    remove_layers: float = Field(default=0.0, ge=0, lt=1, strict=True)
    """Fraction of the layers to remove, if the method is `structured`."""
    vocabulary: Literal["", "unused"] | Annotated[int, Field(ge=1)] = ""
    """Tokens to keep, if the method is `structured`. unused: remove the tokens that no text of the data contains.
    A number: keep this number of the most frequent tokens. Special tokens and bytes stay. The tokenizer is
    rewritten."""
    budget: BudgetConfig = BudgetConfig()
    """Size of the pruned model, in place of heads, ffn, layers and hidden, if the method is `structured`. A search
    chooses these four sizes by the loss on the calibration data, and prints the candidates."""
    latency: bool = False
    """Whether structured pruning measures the latency before and after pruning, on one device. The latency is the time
    of a prompt and of each new token."""
    plot: bool = False
    """Plot the importance of layers, heads, neurons and channels as importance.png, if the method is `structured`.
    Requires matplotlib (the `demo` extra)."""
    importance: ImportanceName = "contribution"
    """Score of a head, neuron or channel, if the method is `structured`; the parts with the lowest scores are removed.
    contribution: norm of the part's contribution to the next outputs. activation: mean norm of the part's output.
    taylor: first-order change of the loss without the part. magnitude: norm of the part's weights. random: random
    numbers. Layers are always selected by block influence."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """Replace long forms by the short form: keep_layers = 3 becomes layers = 3.

        A finished stage is therefore not repeated if only the form changes. Long forms whose values are out of range
        are not replaced. The validation of the long forms then rejects the values.
        """
        if not isinstance(given, dict):
            return given
        given = dict(given)
        for part in PARTS:
            forms = [name for name in (part, f"keep_{part}", f"remove_{part}") if given.get(name)]
            if len(forms) > 1:
                raise ValueError(f"{' and '.join(forms)}: say one of them")
            if forms in ([], [part]):
                continue
            value, keeps = given[forms[0]], forms[0].startswith("keep_")
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            if right and (isinstance(value, int) and value >= 1 if keeps else 0 < value < 1):
                given[part] = float(given.pop(forms[0]))
        return given

    @property
    def sized(self) -> list[str]:
        """Return the names of the sizes that are set."""
        return [part for part in PARTS if getattr(self, part)]

    def check_structure(self) -> None:
        """Check that the sizes and the budget fit one another, and that something is removed.

        Raises:
          ValueError: If the sizes and the budget do not fit one another, or nothing is removed.
        """
        if self.budget.asked and self.sized:
            raise ValueError(f"budget chooses the sizes; leave out {' and '.join(self.sized)}, or budget")
        if self.heads_by == "both" and not self.budget.asked:
            raise ValueError("heads_by 'both' is for a budget, whose search compares groups and queries")
        if not (self.sized or self.budget.asked or self.vocabulary):
            raise ValueError(
                "structured pruning needs a budget, or at least one of heads, ffn, layers, hidden and vocabulary, such "
                "as keep_layers = 2 (--keep-layers 2) or remove_ffn = 0.5"
            )
        narrows = bool(self.heads or self.ffn or self.hidden or self.budget.asked)
        stray = sorted({"importance", *(["repair"] if self.repair else [])} & self.model_fields_set)
        if stray and not narrows:
            raise ValueError(f"{', '.join(stray)}: for heads, ffn and hidden; layers are selected by block influence")
