"""Split sequences over devices so that causal attention takes equal work on each device (context parallelism).

For n devices, a sequence is split into 2n chunks. Device i gets the chunks i and 2n - 1 - i ("zig-zag" order). Each
device then has one early chunk and one late chunk. The early chunk attends to few keys, and the late chunk to many.

The tokens of each row are permuted once, on the host. The model needs no other change, because losses are sums over
tokens and attention receives the position of each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError

SEQUENCE_ARRAYS = frozenset(
    {"tokens", "targets", "weights", "segments", "positions", "types", "among", "first", "last"}
    | {"teacher_ids", "teacher_log_p", "teacher_rest", "teacher_token_outputs"}
)
"""Names of batch arrays [B, T, ...] whose second axis is the sequence (B rows of T tokens).

A batch may contain these names with a prefix. The prefix `encoder_` marks inputs of the encoder in an encoder-decoder
model. The prefix `pair_` marks the second text of a pair.
"""
_PREFIX = re.compile(r"^(pair_|choice\d+_)?(encoder_)?")
POSITION_ARRAYS = ("places", "start", "end")
"""Names of batch arrays whose values are positions in the sequence."""


def has_sequence_axis(name: str) -> bool:
    """Return True if the second axis of the batch array `name` is the sequence."""
    return _PREFIX.sub("", name) in SEQUENCE_ARRAYS | {"order"}


def order(length: int, devices: int) -> np.ndarray:
    """Return the zig-zag permutation of a sequence, int [length].

    Entry i is the text position of the token that is stored at index i. Each device gets an equal, contiguous part of
    the permuted sequence.
    """
    chunks = np.arange(length).reshape(2 * devices, -1)
    early, late = chunks[:devices], chunks[devices:][::-1]
    return np.stack([early, late], axis=1).reshape(-1)


def to_zigzag(batch: Mapping[str, np.ndarray], devices: int) -> dict[str, np.ndarray]:
    """Return a batch whose sequences are permuted to zig-zag order.

    The batch gets an additional array `order`, int32 [B, T], which contains the permutation. For an encoder's
    sequences, this array is called `encoder_order`. Sequences are first padded to a multiple of 2 * devices. The first
    token stays first. With one device, the batch is returned unchanged.

    Args:
        batch: Arrays of the batch by name, in text order.
        devices: Number of devices along the context axis.
    """
    if devices == 1:
        return dict(batch)
    out = {name: _permuted(np.asarray(a), devices) if has_sequence_axis(name) else a for name, a in batch.items()}
    for prefix in ("", "encoder_"):
        if f"{prefix}tokens" in out:
            B, T = out[f"{prefix}tokens"].shape
            out[f"{prefix}order"] = np.tile(order(T, devices).astype(np.int32), (B, 1))
    for name in POSITION_ARRAYS:
        if name in out:
            slots_T = np.argsort(order(out["tokens"].shape[1], devices))
            out[name] = slots_T[out[name]].astype(np.int32)
    return out


def _permuted(a_BT: np.ndarray, devices: int) -> np.ndarray:
    missing = -a_BT.shape[1] % (2 * devices)
    a_BT = np.pad(a_BT, [(0, 0), (0, missing)]) if missing else a_BT
    return a_BT[:, order(a_BT.shape[1], devices)]


def check(length: int, devices: int) -> None:
    """Check that a sequence of `length` tokens can be split evenly over the context axis.

    Raises:
        RequestError: If 2 * devices does not divide the length.
    """
    if devices > 1 and length % (2 * devices):
        raise RequestError(
            f"train.seq_len: {length} tokens do not divide into two chunks for each of mesh.context = {devices} "
            f"devices; take a multiple of {2 * devices}"
        )


def pairs(causal: bool, step: Any, device: Any, where: Any = np.where) -> list[tuple[Any, Any]]:
    """Return the pairs (query chunk, key chunk) that one device multiplies at one step of ring attention.

    In zig-zag order, each device has two chunks of the sequence: chunk 0 (early) and chunk 1 (late). At step s, device
    i has the keys of device i - s. With a causal mask, fully masked pairs are omitted:
    - At step 0, a device has its own keys and computes three products.
    - If the keys come from a device with a smaller index, both query chunks attend to key chunk 0 only.
    - If the keys come from a device with a larger index, only query chunk 1 attends, to both key chunks.

    Every device therefore computes two products at each later step.

    Args:
        causal: Whether attention is causal. If attention is not causal, a device has one chunk of queries and one chunk
            of keys. The only pair is then (0, 0).
        step: Ring step. A step other than 0 may be a traced value.
        device: Index of the device on the context axis. The index may be a traced value.
        where: `np.where`, or `jnp.where` for traced values.
    """
    if not causal:
        return [(0, 0)]
    if isinstance(step, int) and step == 0:
        return [(0, 0), (1, 0), (1, 1)]
    either = where(step <= device, 0, 1)
    return [(1, 0), (either, either)]
