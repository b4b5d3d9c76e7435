"""Test the zig-zag order of context parallelism: all arrays are permuted together, and the work is balanced."""

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.distributed import context_parallel


def test_the_order_of_two_devices_by_hand():
    assert context_parallel.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


def test_a_batch_moves_together_and_is_filled_up():
    tokens = np.arange(10, 17, dtype=np.int32)[None].repeat(2, 0)
    batch = {
        "tokens": tokens, "segments": np.ones_like(tokens), "places": np.array([[0, 3, 6], [1, 2, 5]], np.int32),
        "encoder_tokens": tokens[:, :4], "label": np.array([1, 2]),
    }  # fmt: skip
    out = context_parallel.to_zigzag(batch, 2)
    assert out["tokens"][0].tolist() == [10, 11, 16, 0, 12, 13, 14, 15]
    assert out["segments"][0].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert out["order"].tolist() == [context_parallel.order(8, 2).tolist()] * 2
    assert out["encoder_tokens"][0].tolist() == [10, 13, 11, 12]
    assert out["encoder_order"][1].tolist() == [0, 3, 1, 2]
    for row in range(2):  # a position still refers to the same token
        assert out["tokens"][row][out["places"][row]].tolist() == tokens[row][batch["places"][row]].tolist()
    assert out["label"] is batch["label"]
    assert context_parallel.to_zigzag(batch, 1) == batch


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_causal_work_is_even_and_complete(devices):
    """Each query chunk meets each key chunk that it attends to once, and every device has equal work."""
    met, work = [], []
    for device in range(devices):
        mine = (device, 2 * devices - 1 - device)
        work.append([])
        for step in range(devices):
            other = (device - step) % devices
            theirs = (other, 2 * devices - 1 - other)
            pairs = context_parallel.pairs(True, step, device)
            met += [(mine[a], theirs[int(b)]) for a, b in pairs]
            work[-1].append(len(pairs))
    assert sorted(met) == [(q, k) for q in range(2 * devices) for k in range(q + 1)]
    assert work == [[3] + [2] * (devices - 1)] * devices


def test_lengths_that_do_not_divide():
    context_parallel.check(48, 8)
    context_parallel.check(17, 1)
    with pytest.raises(RequestError, match=r"train.seq_len: 40 tokens .* mesh.context = 8 .* multiple of 16"):
        context_parallel.check(40, 8)
