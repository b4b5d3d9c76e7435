"""Define the settings of attributions. This module does not import JAX."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmctl.config.base import Config
from llmctl.config.settings import Dtype

ROLLOUT = "rollout"
Method = Literal["integrated_gradients", "gradient_input", "rollout"]
Baseline = Literal["", "zero", "pad"]


class AttributionConfig(Config):
    """Configure attributions: the method, its baseline, and the accuracy of the integral."""

    method: Method = "integrated_gradients"
    """integrated_gradients: attributions sum to the change of the output. gradient_input: first-order estimate of these
    attributions. rollout: product of the layers' attention."""
    baseline: Baseline = ""
    """Embedding that replaces each token's embedding at the start of the integral: zeros, or the embedding of the
    padding token. Special tokens, positions and segment types are not replaced. By default, models with RMSNorm use the
    padding token, because their outputs jump near zero embeddings. Other models use zeros."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Largest completeness error of integrated gradients, relative to the change of the output."""
    steps: int = Field(default=1024, ge=12)
    """Maximum number of gradients per text."""
    seq_len: int = Field(default=0, ge=0)
    """Maximum number of tokens per row; 0 uses the value of training or, if it is unknown, 512."""
    batch_size: int = Field(default=16, ge=1)
    """Number of gradients per call."""
    dtype: Dtype = "float32"
    """Dtype of the computation."""
