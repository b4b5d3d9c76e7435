"""Describe how a model is quantized: the formats, the selected weights, and the method that rounds the weights.

The module does not import JAX, so that settings can be checked early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmctl.compress.calibration.settings import DAMPING
from llmctl.compress.quantization import rules
from llmctl.compress.quantization.formats import Format
from llmctl.compress.quantization.rules import Rules
from llmctl.compress.quantization.schemes import INTEGERS, inputs_per_scale

MethodName = Literal["rtn", "gptq", "awq", "awq+gptq", "autoround"]


@dataclass(frozen=True)
class Quantization:
    """Describe how a model is quantized.

    >>> Quantization("int4", group=128).calibrated, Quantization("nf4", method="gptq").calibrated
    (False, True)
    """

    scheme: str
    """Format of all matrices that no rule selects: a name in `llmctl.compress.quantization.schemes.SCHEMES`."""
    group: int = 0
    """Requested number of inputs per scale; 0 means the format's own number. Formats whose specification fixes this
    number ignore the request."""
    embeddings: bool = False
    """Whether the token embeddings are quantized."""
    head: bool = False
    """Whether the output projection, pooler and task head are quantized."""
    activations: str = ""
    """Dtype of quantized activations in products: "int8" or "fp8_e4m3" (W8A8); empty if activations are not
    quantized."""
    static_activations: str = ""
    """Criterion for the static scale of a matrix's inputs, which is measured on calibration data: "max" or "mse"
    (`llmctl.compress.quantization.static_inputs`). If empty, every token has its own scale."""
    method: MethodName = "rtn"
    """Method that chooses the rounded weights.

    - "rtn": round every weight to the nearest level.
    - "gptq": round input by input, and let later weights compensate (`llmctl.compress.quantization.gptq`).
    - "awq": scale inputs (`llmctl.compress.quantization.input_scales`), clip weights, and round to the nearest level.
    - "awq+gptq": scale inputs, clip weights, and round by GPTQ.
    - "autoround": tune the rounding of each layer by gradient steps (`llmctl.compress.quantization.autoround`).
    """
    damping: float = DAMPING
    act_order: bool = True
    static_groups: bool = True
    """Whether GPTQ computes scales from the unchanged matrix. `llmctl.compress.quantization.gptq.quantize` describes
    this setting, `damping` and `act_order`."""
    clip: bool = False
    """Whether to search for smaller scales that clip the largest weights (`llmctl.compress.quantization.grids.scales`).
    AWQ searches even if this field is false.
    """
    smooth: bool = False
    """Whether SmoothQuant moves outliers from activations to weights."""
    alpha: float = 0.5
    """Migration strength of SmoothQuant."""
    rules: Rules = ()
    """Formats of the matrices whose module paths match patterns (`llmctl.compress.quantization.rules`)."""
    tuning_steps: int = 200
    """Number of AutoRound's gradient steps per layer (`llmctl.compress.quantization.autoround`)."""
    symmetric: bool = True
    """Whether integers are symmetric around 0. Otherwise, each group has a zero point. Floats are always symmetric."""
    double_quantize: bool = False
    """Whether the scales of nf4 matrices are stored in 8 bits."""

    @property
    def calibrated(self) -> bool:
        """Return whether the method reads calibration data."""
        return self.hessian or self.smooth or self.tunes or bool(self.static_activations)

    @property
    def hessian(self) -> bool:
        """Return whether the method reads the Gram matrix X^T X of each matrix's inputs X."""
        return self.solves or self.scales_inputs

    @property
    def tunes(self) -> bool:
        """Return whether gradient steps tune the rounding of each layer (AutoRound)."""
        return self.method == "autoround"

    @property
    def solves(self) -> bool:
        """Return whether the weights that are rounded later compensate for earlier rounding errors (GPTQ)."""
        return self.method.endswith("gptq")

    @property
    def scales_inputs(self) -> bool:
        """Return whether AWQ scales the inputs of matrices."""
        return self.method.startswith("awq")

    @property
    def clips(self) -> bool:
        """Return whether the method searches for scales that clip the largest weights."""
        return self.clip or self.scales_inputs

    def format_of(self, module: str) -> Format | None:
        """Return the format of a module's matrix, or None if a rule leaves the matrix unquantized.

        >>> method = Quantization("int4", group=128, rules=(("attn/*", "nvfp4"), ("lm_head", "none")))
        >>> [method.format_of(module) for module in ("decoder/blocks/attn/q", "lm_head")]
        [Format(scheme='nvfp4', group=16, symmetric=True, double_quantize=False), None]

        Args:
          module: path of the module, such as `decoder/blocks/attn/q`.
        """
        name = rules.format_of(module, self.rules, self.scheme)
        if name == rules.NONE:
            return None
        double = self.double_quantize and name == "nf4"
        return Format(name, inputs_per_scale(name, self.group), self.symmetric or name not in INTEGERS, double)

    @property
    def rounding(self) -> dict[str, Any]:
        """Return the keyword arguments of `llmctl.compress.quantization.quantize.quantize`, by name."""
        names = ("scheme", "group", "embeddings", "head", "activations", "clip", "rules", "symmetric")
        return {name: getattr(self, name) for name in (*names, "double_quantize")}
