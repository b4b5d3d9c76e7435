"""Describe how one matrix is stored. The module does not import JAX."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """Describe the storage format of one quantized matrix."""

    scheme: str
    """Name of the format in `llmctl.compress.quantization.schemes.SCHEMES`."""
    group: int
    """Number of inputs per scale; 0 for one scale per output."""
    symmetric: bool = True
    """Whether the values are symmetric around 0. Otherwise, the values are integers with zero points."""
    double_quantize: bool = False
    """Whether the scales of nf4 are stored in 8 bits."""
