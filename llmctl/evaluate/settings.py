"""Settings of a measurement."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmctl.config.base import Config
from llmctl.config.settings import Dtype
from llmctl.data.config import Split


class MeasureConfig(Config):
    """How artifacts are measured."""

    split: Split = "test"
    """Which split of the data."""
    examples: int = Field(default=0, ge=0)
    """Examples to measure on at most, chosen by their hash; 0 takes all."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens a text is cut to for a classifier, and the context of a prediction; 0 takes what was trained with."""
    truncate: Literal["", "tail", "head_tail"] = ""
    """What is cut from a text that is classified; empty takes what was trained with."""
    stride: int = Field(default=0, ge=0)
    """Perplexity: new tokens a window; 0 is the context, so that windows do not overlap."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences a batch; also the batch whose throughput is measured."""
    dtype: Dtype = "float32"
    """Compute type."""
    speed: bool = True
    """Measure latency (batch 1) and throughput, all artifacts in turn."""
    repeats: int = Field(default=15, ge=1)
    """Rounds of the speed measurement."""
