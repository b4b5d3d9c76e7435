"""Define the settings of quantization-aware training, the section `fake_quantize` of every training stage.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.rules import NONE
from llmctl.compress.quantization.schemes import BLOCKS, INTEGERS, SCHEMES
from llmctl.compress.quantization.settings import known_rules, known_scheme
from llmctl.config.base import Config


class FakeQuantizeConfig(Config):
    """Set quantization-aware training: the loss reads rounded matrices, and the parameters stay floats.

    >>> FakeQuantizeConfig(format="int4", group=128).active
    True
    """

    common: ClassVar[tuple[str, ...] | None] = ()
    added: ClassVar[frozenset[str]] = frozenset({"scales"})

    format: Annotated[str, AfterValidator(known_scheme), SCHEMES] = ""
    """Format to which the loss rounds the matrices in every step, as the stage `quantize` does without data. Gradients
    ignore the rounding. The artifact stores the weights before rounding. Quantize the artifact with the same settings.
    If empty, nothing is rounded."""
    group: int = Field(default=0, ge=0)
    """Number of inputs per scale, as in the stage `quantize`."""
    rules: Annotated[dict[str, str], AfterValidator(known_rules)] = {}
    """Formats for single matrices, by patterns of module paths, as in the stage `quantize`."""
    embeddings: bool = False
    """Also round the token embeddings."""
    head: bool = False
    """Also round the output projection and the task head."""
    scales: Literal["current", "learned"] = "current"
    """Scales of the rounded matrices. current: computed from the weights in every step. learned: trained with the
    weights (LSQ), for integers. The artifact then also has the scales, and the stage `quantize` uses these scales."""

    @model_validator(mode="after")
    def _fits(self) -> FakeQuantizeConfig:
        given, block = self.model_fields_set, BLOCKS.get(self.format)
        if not self.active and (stray := sorted(given - {"format"})):
            raise ValueError(f"{', '.join(stray)}: round nothing without a format; set format, such as int4")
        if block and self.group not in (0, block):
            raise ValueError(f"group {self.group}: {self.format} has one scale for every {block} inputs; leave it out")
        if self.learns:
            for name in (self.format, *self.rules.values()):
                if name not in (*INTEGERS, NONE):
                    raise ValueError(
                        f"scales = 'learned': not for format {name!r}; choose one of {', '.join(INTEGERS)}"
                    )
        return self

    @property
    def active(self) -> bool:
        """Return whether the training rounds matrices."""
        return bool(self.format)

    @property
    def learns(self) -> bool:
        """Return whether the training learns the scales of the rounded matrices."""
        return self.active and self.scales == "learned"

    @property
    def quantization(self) -> Quantization:
        """Return the description of the quantization that the training simulates."""
        rules = tuple(sorted(self.rules.items()))
        return Quantization(self.format, self.group, embeddings=self.embeddings, head=self.head, rules=rules)
