"""Choose one scale for the inputs of a matrix from calibration data (static quantization of activations).

Dynamic quantization computes one scale per token in every product. A static scale is measured once, and is stored with
the weight. Matrices that read the same inputs share the statistics. The scales of these matrices are therefore equal.

Shapes: N tokens of a batch, I inputs of a matrix, B bins of a histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.model.weights.quantized import ACTIVATIONS, LARGEST

LOWEST, OCTAVES, PER_OCTAVE = -16, 32, 4
"""Range and resolution of the histogram. The bins cover magnitudes from 2^LOWEST to 2^(LOWEST + OCTAVES), with
PER_OCTAVE bins per factor of 2."""
BINS = OCTAVES * PER_OCTAVE
POINTS = 8
"""Number of magnitudes that represent a bin. These magnitudes are spread evenly over the bin."""
FACTORS = tuple(2.0 ** (-k / 8) for k in range(65))
"""Factors of the scales that `least_squares` tries, from 1 down to 1/256. A factor multiplies the smallest scale that
clips no input."""


@partial(jax.tree_util.register_dataclass, data_fields=["counts"], meta_fields=[])
@dataclass(frozen=True)
class Magnitudes:
    """Count the magnitudes of each input of a matrix in a histogram [I, B] with logarithmic bins.

    Magnitudes below the first bin are counted in the first bin. Magnitudes above the last bin are counted in the last
    bin.

    >>> found = Magnitudes.start(1).fold(jnp.array([[0.0], [1.0], [-1.1], [2.0]]), jnp.array([True, True, True, False]))
    >>> [(int(b), int(found.counts[0, b])) for b in jnp.flatnonzero(found.counts[0])]
    [(0, 1), (64, 2)]
    """

    counts: jax.Array

    @staticmethod
    def start(inputs: int) -> Magnitudes:
        """Return the statistic before any tokens are added."""
        return Magnitudes(jnp.zeros((inputs, BINS), jnp.float32))

    def fold(self, x_NI: jax.Array, real_N: jax.Array) -> Magnitudes:
        """Return the statistic with a batch added: the inputs `x_NI` of the tokens for which `real_N` is True."""
        octave_NI = jnp.log2(jnp.abs(x_NI.astype(jnp.float32))) - LOWEST
        bin_NI = jnp.clip(jnp.floor(octave_NI * PER_OCTAVE), 0, BINS - 1).astype(jnp.int32)
        # Integers, because a sum of float32 does not grow beyond 2^24 by additions of 1.
        channel_I = jnp.arange(self.counts.shape[0])
        counts = jnp.zeros(self.counts.shape, jnp.int32).at[channel_I, bin_NI].add(real_N[:, None].astype(jnp.int32))
        return Magnitudes(self.counts + counts)

    @property
    def inputs(self) -> int:
        """Return the number of inputs of the matrix."""
        return self.counts.shape[0]


def largest(peak_I: np.ndarray, kind: str) -> float:
    """Return the smallest scale that clips no input.

    If all inputs were 0, the scale is 1.

    >>> largest(np.array([1.0, 254.0]), "int8")
    2.0

    Args:
      peak_I: largest magnitude of each input.
      kind: "int8" or "fp8_e4m3".
    """
    scale = float(np.float32(peak_I.max()) / np.float32(LARGEST[kind]))
    return scale if scale > 0 else 1.0


def least_squares(peak_I: np.ndarray, counts_IB: np.ndarray, divisor_I: np.ndarray | None, kind: str) -> float:
    """Return the scale with the least squared error of the rounded inputs, among the scales that `FACTORS` gives.

    Each bin is represented by evenly spaced magnitudes, so the error of a scale is an estimate.

    Args:
      peak_I: largest magnitude of each input, after the division by `divisor_I`.
      counts_IB: histogram of each input, before the division (`Magnitudes`).
      divisor_I: numbers by which the inputs are divided; None if they are not divided.
      kind: "int8" or "fp8_e4m3".
    """
    top = largest(peak_I, kind)
    steps_BP = np.arange(BINS)[:, None] + (np.arange(POINTS) + 0.5) / POINTS
    value_BP = 2.0 ** (steps_BP / PER_OCTAVE + LOWEST)
    value_BP[0] = 0.0
    if divisor_I is None:
        counts_IB, divisor_I = counts_IB.sum(axis=0, dtype=np.float64)[None], np.ones(1)
    channel, place = np.nonzero(counts_IB)
    value_CP = np.minimum(value_BP[place] / divisor_I[channel][:, None], peak_I.max()).astype(np.float32)
    count_C1 = counts_IB[channel, place].astype(np.float64)[:, None]

    def error(factor: float) -> float:
        scale = np.float32(top * factor)
        return float(np.sum(count_C1 * np.square(rounded(value_CP / scale, kind) * scale - value_CP, dtype=np.float64)))

    return top * min(FACTORS, key=error)


def rounded(unit: np.ndarray, kind: str) -> np.ndarray:
    """Round nonnegative numbers to the nearest number of an 8-bit type, float32. Larger numbers are clipped."""
    unit = np.minimum(unit, LARGEST[kind])
    return (np.round(unit) if kind == "int8" else unit.astype(jnp.dtype(ACTIVATIONS[kind]))).astype(np.float32)
