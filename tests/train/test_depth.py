"""Layers are scanned: a training step of 24 layers compiles to the program of 6 (`recipes/bench/compile_time.py`)."""

import compile_time
import pytest

SIZES = {"d_model": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_ff": 48, "vocab_size": 64}


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_instructions_do_not_grow_with_depth(stages):
    axes = {"pipeline": stages, "data": 8 // stages}
    few, many = (compile_time.lowered(layers, axes, **SIZES) for layers in (6, 24))
    compiled = [compile_time.instructions(program.compile().as_text()) for program in (few, many)]
    assert 1000 < compiled[1] <= 1.02 * compiled[0], compiled
