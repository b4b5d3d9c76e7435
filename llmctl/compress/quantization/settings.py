"""Define the settings of quantization: the format, the method, and the weights to quantize.

The module does not import JAX.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from llmctl.compress.calibration.settings import DAMPING, CalibrationConfig
from llmctl.compress.quantization.quantize_method import MethodName, Quantization
from llmctl.compress.quantization.rules import NONE
from llmctl.compress.quantization.schemes import BLOCKS, INTEGERS, SCHEMES, has_grid, inputs_per_scale

SHORT = {"int8": 8, "int4": 4}
"""Map from the name of a format to the value of the setting `bits` that selects the format."""
CALIBRATION = frozenset(CalibrationConfig.model_fields)
"""Names of the settings that have an effect only with calibration data."""
RTN = "rtn"
"""Name of the method without calibration data."""
BUDGETS = ("average_bits", "max_perplexity_increase")
"""Names of the settings that set a budget. With a budget, the format of each matrix is chosen by the loss on
calibration data."""


def known_scheme(name: str) -> str:
    """Return the name if it is empty, or if a quantization scheme has this name. Otherwise, raise an error."""
    return name and SCHEMES.check(name)


def known_rules(rules: dict[str, str]) -> dict[str, str]:
    """Return the rules, and raise an error if a pattern is empty or a scheme is not known."""
    for pattern, name in rules.items():
        if not pattern:
            raise ValueError("a pattern is empty; write one such as 'mlp/*'")
        if name != NONE:
            SCHEMES.check(name)
    return rules


def fraction(value: Any) -> Any:
    """Return a percentage such as "1%" as a number, such as 0.01. Return other values unchanged.

    >>> fraction("2.5%"), fraction(0.01)
    (0.025, 0.01)
    """
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return value
    try:
        return float(value.strip()[:-1]) / 100
    except ValueError:
        raise ValueError(f"must be a number or a percentage such as '1%', got {value!r}") from None


class QuantizeConfig(CalibrationConfig):
    """Set how a model is quantized. The config of the stage `quantize` inherits these fields."""

    added: ClassVar[frozenset[str]] = CALIBRATION | {
        *("format", "method", "damping", "act_order", "static_groups", "clip", "smooth", "alpha", "rules", "symmetric"),
        *("rotate", "tuning_steps", "average_bits", "max_perplexity_increase", "candidates"),
        *("static_activations", "plot", "double_quantize"),
    }

    bits: int = 8
    """Bits per weight: 8 or 4, for the formats `int8` and `int4`."""
    format: Annotated[str, AfterValidator(known_scheme), SCHEMES] = ""
    """Format of the weights. int8, int4, int3, int2: integers. fp8_e4m3, fp8_e5m2: 8-bit floats. mxfp4, nvfp4: 4-bit
    floats with 8-bit scales for blocks of 32 and of 16 inputs. nf4: 4-bit quantiles of the normal distribution, for
    unmerged LoRA (QLoRA). Installed packages may add formats. If empty, `bits` selects the format."""
    group: int = Field(default=0, ge=0)
    """Number of inputs per scale, which must divide the number of inputs of every matrix. 0 means one scale per output,
    except for nf4 (64 inputs per scale), mxfp4 (32) and nvfp4 (16)."""
    symmetric: bool = True
    """Use integers that are symmetric around 0. If false, each group has a zero point. The integers then cover the
    range from the group's lowest to its highest weight. A zero point has as many bits as a weight, but at least 4."""
    double_quantize: bool = False
    """Also quantize the scales of nf4 matrices, to 8 bits in groups of 256 after subtraction of their mean (QLoRA).
    With 64 inputs per scale, a weight then has 4.13 bits in place of 4.5."""
    rules: Annotated[dict[str, str], AfterValidator(known_rules)] = {}
    """Formats of single matrices, by patterns on the paths of their modules: { "mlp/*" = "int4", "o" = "none" }. The
    longest pattern that matches decides; its length does not include `*` and `?`. none: do not quantize the matrix. All
    layers of a stack have the same formats."""
    average_bits: float = Field(default=0.0, ge=0)
    """Highest number of bits per weight, such as 4.5, on average over the quantized matrices, scales included. The
    format of each matrix is then chosen from `candidates` by the loss on calibration data. `rules` still set the format
    of single matrices. 0: no budget."""
    max_perplexity_increase: Annotated[float, BeforeValidator(fraction)] = Field(default=0.0, ge=0)
    """Highest relative increase of the perplexity on calibration data, such as "1%" or 0.01. A search chooses formats
    from `candidates` that have few bits within this limit. The search measures the perplexity with weights rounded to
    the nearest level, whatever `method` is. Not with average_bits. 0: no limit."""
    candidates: list[Annotated[str, AfterValidator(known_scheme), SCHEMES]] = []
    """Formats to choose from, if average_bits or max_perplexity_increase is set. By default int8, int4 and int3. If
    activations are quantized, int8 and int4."""
    plot: bool = True
    """Plot the mixtures of formats that the search for a budget compared, bits per weight against perplexity, as
    formats.png in the artifact. Requires matplotlib (the `demo` extra)."""
    embeddings: bool = False
    """Also quantize the token embeddings, with one scale per token. If embeddings are tied, the output projection is
    quantized too."""
    head: bool = False
    """Also quantize the output projection and the task head."""
    activations: Literal["", "int8", "fp8_e4m3"] = ""
    """Also quantize the inputs of quantized matrices, with one scale per token (W8A8). int8: for the formats `int8` and
    `int4`. fp8_e4m3: for the format `fp8_e4m3`."""
    static_activations: Literal["", "max", "mse"] = ""
    """Use one stored scale for all inputs of a matrix, measured on calibration data, in place of one scale per token.
    max: the smallest scale that clips no input. mse: the scale with the least squared error, which may clip inputs.
    Only with `activations`."""
    method: MethodName = RTN
    """Method that chooses the rounded weights. rtn: round to nearest, without data. gptq: round one input after the
    other, and let later weights compensate for the errors, by the Hessian of calibration data. awq: scale the inputs of
    matrices by the inputs' magnitudes in calibration data, clip, and round to nearest. awq+gptq: the scales of awq,
    then gptq. autoround: tune the rounding of each layer's weights by gradient steps, to minimize the error of the
    layer's output. Token embeddings are always rounded to the nearest levels."""
    tuning_steps: int = Field(default=200, ge=1)
    """Number of gradient steps per layer, if the method is `autoround`. Each step reads one batch."""
    clip: bool = False
    """Search for scales with the least squared error. Such scales may clip the largest weights. The method `rtn`
    minimizes the error of the weights, and the other methods minimize the error of the outputs. The method `awq` always
    searches."""
    smooth: bool = False
    """Divide activations by one scale per channel, and multiply the channel's weights by the same scale (SmoothQuant).
    Outliers of activations then have less effect. Requires calibration data and activations = "int8"."""
    rotate: bool = False
    """Rotate the residual stream and the values of each head by random Hadamard matrices before rounding (QuaRot). The
    model's outputs do not change, and outliers spread over all channels. Only for models with RMSNorm before each
    sublayer. Tied embeddings become two matrices."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Migration strength of `smooth`: 0 scales by the weights alone, 1 by the activations alone."""
    damping: float = Field(default=DAMPING, gt=0, le=1)
    """Fraction of the Hessian's mean diagonal entry to add to the diagonal, if the method is `gptq`. If a Hessian has
    no inverse, the fraction is multiplied by 10, and the matrix is reported."""
    act_order: bool = True
    """Round inputs with larger sums of squares first, if the method is `gptq`."""
    static_groups: bool = True
    """Use scales of the unchanged weights, if the method is `gptq` and inputs have groups. If false, a group's scale is
    determined when the group's first input is rounded, and act_order must be false."""

    _unread: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="wrap")
    @classmethod
    def _without_unread(cls, given: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        """Drop the settings of calibration data if the method reads no data, and remember the names of these settings.

        A finished stage is therefore not repeated if only such settings change, such as a recipe's shared data.
        """
        unread = ()
        reads = ("smooth", "static_activations", *BUDGETS)
        if isinstance(given, dict) and given.get("method", RTN) == RTN and not any(map(given.get, reads)):
            unread = tuple(key for key in given if key in CALIBRATION)
            given = {key: value for key, value in given.items() if key not in CALIBRATION}
        made = make(given)
        if unread:
            made._unread = unread
        return made

    @property
    def unread(self) -> list[str]:
        """Return the names of settings that the user has set, but that the method does not read.

        `data` is omitted, because stages share it.
        """
        return [name for name in self._unread if name != "data"]

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """Normalize the settings: replace `format` by `bits` if `bits` can select the format.

        Equal results then have equal settings, so that a finished stage is not repeated.
        """
        if not isinstance(given, dict):
            return given
        if (bits := SHORT.get(str(given.get("format", "")))) is None:
            return given
        if given.get("bits", bits) != bits:
            raise ValueError(f"bits {given['bits']} contradicts format {given['format']}")
        return {key: value for key, value in given.items() if key != "format"} | {"bits": bits}

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: int) -> int:
        if bits not in (8, 4):
            raise ValueError(f"must be 8 or 4, got {bits}")
        return bits

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.format and "bits" in self.model_fields_set:
            raise ValueError(f"bits {self.bits} has no meaning for format {self.format}")
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        told = self.model_fields_set
        if all(getattr(self, name) for name in BUDGETS):
            raise ValueError(f"{' and '.join(BUDGETS)}: say one of them")
        if not self.budget:
            if "candidates" in told and self.candidates:
                raise ValueError(f"candidates: only with {' or '.join(BUDGETS)}")
            if "plot" in told and self.plot:
                raise ValueError(f"plot: only with {' or '.join(BUDGETS)}, whose mixtures it draws")
            return self
        if stray := sorted(told & {"bits", "format"}):
            raise ValueError(f"{self.budget} chooses the formats; leave out {stray[0]}, or name formats in candidates")
        if len(set(self.formats_to_choose)) < 2:
            raise ValueError("candidates: name at least two formats to choose from")
        return self

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        told = self.model_fields_set
        method = self.quantization
        first = self.formats_to_choose if self.budget else [self.scheme_name]
        formats = [name for name in (*first, *self.rules.values()) if name != NONE]
        stray = sorted(told & {"damping", "act_order", "static_groups"})
        if stray and not method.solves:
            raise ValueError(f"{', '.join(stray)}: not for method {self.method!r}; set method to 'gptq'")
        if "tuning_steps" in told and not method.tunes:
            raise ValueError(f"tuning_steps: not for method {self.method!r}; set method to 'autoround'")
        if method.tunes and (stray := sorted(set(formats) - set(INTEGERS))):
            raise ValueError(f"method 'autoround': not for format {stray[0]!r}; choose one of {', '.join(INTEGERS)}")
        if method.tunes and self.clip:
            raise ValueError("clip: not with method 'autoround', which tunes how far weights are clipped")
        name, block = self.scheme_name, BLOCKS.get(self.scheme_name)
        if block and self.group not in (0, block):
            raise ValueError(f"group {self.group}: {name} has one scale for every {block} inputs; leave it out")
        fitting = {"int8": list(SHORT), "fp8_e4m3": ["fp8_e4m3"]}.get(self.activations, [])
        for other in formats if self.activations else ():
            if has_grid(other) and other not in fitting:
                raise ValueError(f"activations: not for format {other!r}; choose {' or '.join(fitting)}")
        if not self.symmetric and not set(formats) & set(INTEGERS):
            raise ValueError(f"symmetric = false: not for format {name!r}; choose one of {', '.join(INTEGERS)}")
        if not self.symmetric and self.activations:
            raise ValueError("symmetric = false: not with quantized activations, whose products have no zero points")
        if self.double_quantize and "nf4" not in formats:
            raise ValueError(f"double_quantize: not for format {formats[0]!r}; set format to 'nf4'")
        if "alpha" in told and not self.smooth:
            raise ValueError("alpha: only with smooth = true")
        if self.static_activations and not self.activations:
            raise ValueError("static_activations: only with quantized activations; set activations = 'int8'")
        if self.smooth and not self.activations:
            raise ValueError("smooth: only with quantized activations; set activations = 'int8'")
        if self.smooth and method.scales_inputs:
            raise ValueError(f"smooth: not with method {self.method!r}, which scales the same inputs")
        for other in formats if method.calibrated or self.clip else ():
            if not has_grid(other):
                flags = ("smooth", "static_activations")
                what = next((name for name in flags if getattr(self, name)), "clip")
                what = f"method {self.method!r}" if self.method != RTN else what
                raise ValueError(f"{what}: not for format {other!r}, whose levels are not known; choose another")
        if "static_groups" in told and not any(inputs_per_scale(other, self.group) for other in formats):
            raise ValueError("static_groups: only with groups; set group, such as 128")
        if not self.static_groups and (self.act_order or method.clips):
            other = "act_order = true" if self.act_order else "clip = true" if self.clip else f"method {self.method!r}"
            raise ValueError(f"static_groups = false: not with {other}")
        return self

    @property
    def budget(self) -> str:
        """Return the name of the budget in `BUDGETS` that is set; empty if there is no budget."""
        return next((name for name in BUDGETS if getattr(self, name)), "")

    @property
    def formats_to_choose(self) -> list[str]:
        """Return the names of the formats from which the search for a budget chooses."""
        return self.candidates or (["int8", "int4"] if self.activations else ["int8", "int4", "int3"])

    @property
    def scheme_name(self) -> str:
        """Return the name of the quantization scheme."""
        return self.format or f"int{self.bits}"

    @property
    def quantization(self) -> Quantization:
        """Return the description of the quantization that `llmctl.compress` reads."""
        names = ("group", "symmetric", "embeddings", "head", "activations", "method", "clip", "smooth", "alpha")
        more = ("static_activations", "double_quantize", "damping", "act_order", "static_groups", "tuning_steps")
        given = {name: getattr(self, name) for name in (*names, *more)}
        return Quantization(self.scheme_name, rules=tuple(sorted(self.rules.items())), **given)
