"""Write the files by which the library sentence-transformers finds the pooling of an embedding model."""

from __future__ import annotations

import json
from pathlib import Path

from llmctl.model.config import ModelConfig

SENTENCE = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def save(cfg: ModelConfig, folder: Path) -> None:
    """Write the config files with an embedding model's pooling and normalization, for sentence-transformers."""
    modes = {flag: cfg.pooling == pooling for pooling, flag in SENTENCE.items()}
    (folder / "1_Pooling").mkdir()
    content = {"word_embedding_dimension": cfg.d_model, **modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n")
