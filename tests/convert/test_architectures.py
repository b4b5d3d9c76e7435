"""Sizes that transformers refuses are named before export writes them."""

import pytest

from llmctl.convert import architectures
from llmctl.model.config import ModelConfig

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("width", [64, 60])
@pytest.mark.parametrize("preset", ["llama-tiny", "gemma2-2b", "gemma3-1b", "mistral-7b", "qwen2.5-0.5b"])
def test_widths_are_refused_where_transformers_refuses_them(preset, width):
    model = ModelConfig(preset=preset, d_model=width, heads=8, kv_heads=4, head_dim=8, vocab_size=300)
    name = architectures.of(model)[0].model_type
    keys = {"hidden_size": width, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    refused = ""
    try:
        transformers.CONFIG_MAPPING[name](**keys)
    except Exception as e:
        refused = str(e)
    said = architectures.notice(model)
    assert ("not a multiple" in refused) == ("multiple of their heads" in said), (refused, said)
    assert bool(refused) == (width == 60 and not preset.startswith(("mistral", "qwen")))
