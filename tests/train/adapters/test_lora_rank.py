"""The rank of a low-rank pair is at most the smaller side of the largest matrix."""

import pytest

from llmctl.config.errors import RequestError
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.train.adapters.lora import check_rank
from llmctl.train.adapters.settings import LoraConfig

CONFIG = ModelConfig(vocab_size=16, d_model=8, layers=1, heads=2, kv_heads=1, head_dim=4, d_ff=16)


def test_a_rank_above_all_matrices_is_refused():
    params = functional.abstract(CONFIG)
    check_rank(params, LoraConfig(rank=8))
    check_rank(params, LoraConfig(rank=4, targets=["k"]))
    with pytest.raises(RequestError, match=r"^lora.rank = 1,000,000 is above the smaller side of every matrix \(8 at"):
        check_rank(params, LoraConfig(rank=10**6))
    for refused in (LoraConfig(rank=5, targets=["k"]), LoraConfig(rank=1, rank_pattern={"k": 5}, targets=["k"])):
        with pytest.raises(RequestError, match=r"lora.rank = 5 is above .* \(4 at most\)"):
            check_rank(params, refused)
