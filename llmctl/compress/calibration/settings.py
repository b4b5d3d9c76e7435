"""Define the settings of calibration. The settings select the examples that a compression method reads.

The module does not import JAX.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmctl.config.base import Config
from llmctl.config.settings import Dtype
from llmctl.data.config import DataConfig, Split, Truncate

DAMPING = 0.01
"""Fraction of a Hessian's mean diagonal entry that is added to the diagonal. The value is from the papers of GPTQ and
SparseGPT.
"""


class CalibrationConfig(Config):
    """Set the calibration data of a compression command.

    The config of each compression command inherits these fields. A recipe sets these fields in the command's
    `[[stage]]`.

    >>> CalibrationConfig(examples=128, seq_len=512).batch_size
    16

    `llmctl.compress.calibration.calibration_data.load(config, base, mesh)` builds the batches.
    """

    data: DataConfig = DataConfig()
    """Calibration data. Only methods that need gradients read the labels. Methods without calibration ignore the
    data."""
    split: Split = "train"
    """Split of the data that is used for calibration."""
    examples: int = Field(default=256, ge=1)
    """Number of calibration examples, selected by the hash of their texts. By default, up to 256. If the number is set,
    the data must have at least this many examples."""
    seq_len: int = Field(default=0, ge=0)
    """Number of tokens per sequence; 0 means the training length."""
    truncate: Literal["", Truncate] = ""
    """Truncation of long texts; if empty, the truncation of training."""
    batch_size: int = Field(default=16, ge=1)
    """Number of sequences per batch."""
    dtype: Dtype = "float32"
    """Dtype in which the model is computed during calibration."""
