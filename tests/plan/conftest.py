"""A recipe whose data is nowhere: planning reads settings alone."""

import pytest

RECIPE = """
name = "small"

[data]
source = "csv"
path = "there/is/no/such.csv"

[[stage]]
kind = "pretrain"
tokenizer = { kind = "bpe", vocab_size = 512 }
model = { family = "llama", d_model = 64, layers = 2, heads = 4, kv_heads = 2, head_dim = 16, d_ff = 128, tied = false }
mesh = { data = 2, fsdp = 2, tensor = 2 }
train = { steps = 10, batch_size = 8, seq_len = 32 }

[[stage]]
kind = "finetune"
mesh = { data = -1 }
train = { steps = 10, batch_size = 8, seq_len = 16 }
"""


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.toml"
    file.write_text(RECIPE)
    return file
