"""Choose the format of each matrix by the loss on calibration data, within a budget of bits or of perplexity.

The search has these steps:

- Round one matrix at a time to each candidate format, and measure the loss. A matrix has the weights of all layers.
- Compute the Pareto front of average bits and predicted increase of the loss (`format_allocation`).
- For a budget of bits, choose the mixture of the front with the lowest increase within the budget.
- For a limit of the perplexity, measure mixtures of the front. The choice is the mixture with the fewest bits within
  the limit.

The search always rounds every weight to the nearest level. A method that reads calibration data, such as GPTQ, would
need one calibration walk per measurement. Every loss is saved, so that an interrupted run measures only what is
missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.artifacts.fingerprint import type_bits
from llmctl.compress.calibration import calibration_data
from llmctl.compress.calibration.calibration_loss import loss_program, mean_loss
from llmctl.compress.calibration.measurements import Measurements
from llmctl.compress.quantization import format_allocation, format_report, quantize
from llmctl.compress.quantization.format_allocation import Mixture, Option
from llmctl.compress.quantization.quantize import Target
from llmctl.compress.quantization.quantize_method import Quantization
from llmctl.compress.quantization.rules import NONE
from llmctl.compress.quantization.settings import QuantizeConfig
from llmctl.config.errors import RequestError
from llmctl.evaluate.tasks.registry import of
from llmctl.model import weights

Params = dict[str, Any]
Targets = dict[str, tuple[Target, ...]]
"""Candidate formats of each matrix, by the path of the matrix. A matrix whose format a rule sets has one."""


def targets(params: Params, method: Quantization, candidates: Sequence[str]) -> Targets:
    """Return the candidate formats of each selected matrix. Matrices that a rule leaves unquantized are omitted.

    Args:
      params: parameters of the model; they may be abstract.
      method: the quantization, with its rules.
      candidates: names of the formats to choose from.

    Raises:
      RequestError: If a matrix cannot have a candidate format, or if rules determine the formats of all matrices.
    """
    flat = weights.flatten(params)
    tried = [quantize.chosen(flat, replace(method, scheme=name)) for name in candidates]
    found = {path: tuple(dict.fromkeys(chosen[path] for chosen in tried)) for path in tried[0]}
    if all(len(own) == 1 for own in found.values()):
        raise RequestError("rules set the format of every matrix; leave out rules, or the budget")
    return found


def stored_bits(w: Any, target: Target) -> int:
    """Return the number of bits that a matrix occupies after rounding, including scales and zero points."""
    node, _ = jax.eval_shape(lambda a: quantize.measured(a, target), w)
    return sum(a.size * type_bits(str(a.dtype)) for a in weights.parts(node).values())


def front_of(params: Params, found: Targets, increase: Callable[[str, Target], float]) -> list[Mixture]:
    """Return the Pareto front of average bits and predicted increase of the loss.

    Args:
      params: parameters of the model; they may be abstract.
      found: candidate formats of each matrix (see `targets`).
      increase: function (path of a matrix, one of its roundings) -> increase of the loss.
    """
    flat = weights.flatten(params)
    options = [
        [Option(t.format.scheme, stored_bits(flat[path], t), increase(path, t)) for t in own]
        for path, own in found.items()
    ]
    return format_allocation.pareto_front(options)


def guessed_front(params: Params, found: Targets) -> list[Mixture]:
    """Return a Pareto front for planning, without any measurement.

    The loss increase of a matrix is guessed as n / 4^b, for n weights with b bits each. The reason is that one more
    bit per weight divides the squared rounding error of uniform levels by 4.
    """
    flat = weights.flatten(params)

    def guess(path: str, target: Target) -> float:
        size = flat[path].size
        return size * 4.0 ** (-stored_bits(flat[path], target) / size)

    return front_of(params, found, guess)


def with_formats(method: Quantization, found: Targets, mixture: Mixture) -> Quantization:
    """Return the quantization with one rule per matrix, so that each matrix gets its format in `mixture`."""
    chosen = {weights.module_path(path): name for path, name in zip(found, mixture.formats, strict=True)}
    unquantized = [rule for rule in method.rules if rule[1] == NONE]
    return replace(method, rules=tuple(sorted([*chosen.items(), *unquantized])))


def usable(increase: float) -> float:
    """Return the loss increase with which formats are allocated, given the measured `increase`.

    The result is 0 if the loss decreased, infinity if the loss is NaN, otherwise `increase` itself. A matrix whose
    rounding decreases the loss by chance therefore cannot outweigh other matrices.
    """
    return np.inf if np.isnan(increase) else max(0.0, increase)


def check_bits(average_bits: float, front: Sequence[Mixture], count: int) -> None:
    """Check that at least one mixture of the front has at most `average_bits` bits per weight.

    Args:
      average_bits: the budget; 0 if the budget limits the perplexity.
      front: mixtures in ascending order of bits.
      count: number of weights in the matrices.

    Raises:
      RequestError: If all mixtures have more bits.
    """
    if average_bits and front[0].bits > average_bits * count:
        raise RequestError(
            f"average_bits {average_bits:g} is below {front[0].bits / count:.4g}, the fewest bits per weight, scales "
            "included, that the candidates give; set more, or add a smaller format to candidates, or a larger group"
        )


@dataclass(frozen=True)
class FormatScan:
    """Measure the loss of a model in which some matrices are rounded."""

    params: Params
    batches: Sequence[dict[str, Any]]
    program: Any
    """Compiled function for the loss (`loss_program`)."""
    method: Quantization
    saved: Measurements
    """Losses that an interrupted run measured."""
    note: Callable[[Mapping[str, float]], None]
    """Function that is called with the name and the value of each measured loss."""
    losses: dict[str, float] = field(default_factory=dict)
    """Losses that this run has measured or read, by name."""

    def loss(self, chosen: Mapping[str, Target]) -> float:
        """Return the mean loss if the matrices in `chosen` are rounded, and all others are not."""
        told = json.dumps({path: str(target) for path, target in chosen.items()}, sort_keys=True)
        name = f"formats.{hashlib.sha256(told.encode()).hexdigest()[:32]}"
        if name not in self.losses:
            found = self.saved.get(name, lambda: {"value": np.array(self._measured(chosen), np.float64)})
            self.losses[name] = float(found["value"])
            self.note({"calibration_loss": self.losses[name]})
        return self.losses[name]

    def _measured(self, chosen: Mapping[str, Target]) -> float:
        flat, new = weights.flatten(self.params), {}
        for path, target in chosen.items():
            w = flat[path]
            node, _ = quantize.measured(w, target, self.method.clips)
            if self.method.activations:
                new[path] = quantize.with_activations(node, target.inputs, self.method.activations)
            else:  # all formats then run the same compiled program
                new[path] = jax.device_put(_dense(node, w.dtype), w.sharding)
        return mean_loss(self.program, weights.updated(self.params, new), self.batches)


@partial(jax.jit, static_argnums=1)
def _dense(node: Any, dtype: Any) -> jax.Array:
    return weights.dense(node, dtype)


class Log(Protocol):
    """Define the interface of a stage's log, such as `llmctl.train.run_log.Reporter`."""

    total: int

    def log_next(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics as the next step."""


@dataclass(frozen=True)
class Choice:
    """Store the chosen formats and the measurements of the search."""

    method: Quantization
    """The quantization, with the format of each matrix as a rule."""
    batches: Sequence[dict[str, Any]]
    """Calibration batches with labels or targets."""
    before: float
    """Loss of the unquantized model."""
    about: dict[str, Any]
    """JSON data for the metrics (see `choose`)."""

    def increase_of(self, config: QuantizeConfig, base: Artifact, params: Params) -> float | None:
        """Return the relative increase of a quantized model's perplexity on the calibration data.

        If the loss is not finite, return None.

        Args:
          config: settings of the stage.
          base: artifact of the model before quantization.
          params: the quantized parameters.
        """
        program = loss_program(of(base.manifest), base.model, config.dtype)
        loss = mean_loss(program, params, self.batches)
        return format_report.number(format_report.perplexity_increase(loss - self.before))


def choose(
    config: QuantizeConfig,
    base: Artifact,
    params: Params,
    *,
    mesh: Any,
    saved: Measurements,
    log: Log,
    walk_steps: int,
) -> Choice:
    """Choose the format of each matrix within a budget.

    The JSON data of the result has these entries:

    - `kind`: name of the setting that sets the budget
    - `limit`: value of this setting
    - `bits`: stored bits per weight of the quantized matrices
    - `predicted`, `measured`: relative increase of the perplexity on the calibration data
    - `formats`: the format of each module
    - `losses`: increase of the loss if only one module is rounded, by module and format
    - `front`: the mixtures of the Pareto front. Only measured mixtures have the entry `measured`.

    Args:
      config: settings of the stage `quantize`, with a budget.
      base: artifact that is compressed.
      params: parameters of the model. They do not change.
      mesh: the devices.
      saved: losses that an interrupted run measured.
      log: log of the measured losses. `log.total` is set to the number of losses plus `walk_steps`.
      walk_steps: number of steps that are logged after the search.

    Raises:
      RequestError: If no mixture meets the budget, or the calibration data cannot be read.
    """
    method = config.quantization
    found = targets(params, method, config.formats_to_choose)
    flat = weights.flatten(params)
    count = sum(flat[path].size for path in found)
    check_bits(config.average_bits, guessed_front(params, found), count)  # raises before the data is read
    batches = calibration_data.load(config, base, mesh, labels=True)
    program = loss_program(of(base.manifest), base.model, config.dtype)
    scan = FormatScan(params, batches, program, method, saved, log.log_next)
    log.total = loss_steps(params, found, config.average_bits) + walk_steps
    before = scan.loss({})
    increases = {(path, t): scan.loss({path: t}) - before for path, own in found.items() for t in own}
    front = front_of(params, found, lambda path, t: usable(increases[path, t]))
    measured: dict[Mixture, float] = {}

    def measure(mixture: Mixture) -> float:
        by_name = {path: {t.format.scheme: t for t in own} for path, own in found.items()}
        pairs = zip(found, mixture.formats, strict=True)
        loss = scan.loss({path: by_name[path][name] for path, name in pairs})
        return measured.setdefault(mixture, format_report.perplexity_increase(loss - before))

    if config.average_bits:
        mixture = format_allocation.best_within(front, config.average_bits * count)
        assert mixture is not None  # check_bits raises
        value = measure(mixture)
    else:
        mixture, value = format_allocation.smallest_within(front, config.max_perplexity_increase, measure)
    if mixture is None:
        raise RequestError(
            f"max_perplexity_increase {config.max_perplexity_increase:.4g}: the best mixture of "
            f"{', '.join(config.formats_to_choose)} has {value:.4g}; set more, or add a format with more bits"
        )
    log.total = len(scan.losses) + walk_steps
    about = {
        "kind": config.budget,
        "limit": getattr(config, config.budget),
        **format_report.record(mixture, count, measured),
        "losses": format_report.losses(increases),
        "front": [format_report.counted(each, count, measured, each == mixture) for each in front],
    }
    about["formats"] = {weights.module_path(path): name for path, name in zip(found, mixture.formats, strict=True)}
    return Choice(with_formats(method, found, mixture), batches, before, about)


def loss_steps(params: Params, found: Targets, average_bits: float) -> int:
    """Return the maximum number of losses that `choose` may have to measure."""
    single = 1 + sum(map(len, found.values()))
    return single + (1 if average_bits else 1 + len(guessed_front(params, found)).bit_length())
