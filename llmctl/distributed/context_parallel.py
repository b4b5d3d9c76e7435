"""How a sequence lies over the devices that share it, so that causal attention is even work for all of them.

For n devices a sequence is cut into 2n chunks, of which device i holds chunks i and 2n - 1 - i ("zig-zag"): everybody
has one early chunk, which sees little, and one late chunk, which sees much. Losses are sums over places and attention
is told which place a token has, so rows are brought into this order once, on the host, and stay in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.config.errors import RequestError

ALONG = frozenset({"tokens", "targets", "weights", "segments", "positions", "types", "among", "first", "last"})
"""Arrays [B, T] of a batch that run along the sequence; those of an encoder beside a decoder begin with `encoder_`, of
the second of two texts with `pair_`."""
PLACES = ("places", "start", "end")
"""Arrays of places in it."""


def runs_along(name: str) -> bool:
    """Whether the second axis of this array of a batch is the sequence."""
    return name.removeprefix("encoder_").removeprefix("pair_") in ALONG | {"order"}


def order(length: int, devices: int) -> np.ndarray:
    """[T]: the place in the text of the token in each slot; slots go to devices in equal, contiguous parts."""
    chunks = np.arange(length).reshape(2 * devices, -1)
    early, late = chunks[:devices], chunks[devices:][::-1]
    return np.stack([early, late], axis=1).reshape(-1)


def balanced(batch: Mapping[str, np.ndarray], devices: int) -> dict[str, np.ndarray]:
    """A batch in this order, with the order itself [B, T] as `order` (`encoder_order`).

    Lengths that 2 * devices does not divide are filled up with padding. The first token stays in the first slot.
    """
    if devices == 1:
        return dict(batch)
    out = {name: _permuted(np.asarray(a), devices) if runs_along(name) else a for name, a in batch.items()}
    for prefix in ("", "encoder_"):
        if f"{prefix}tokens" in out:
            B, T = out[f"{prefix}tokens"].shape
            out[f"{prefix}order"] = np.tile(order(T, devices).astype(np.int32), (B, 1))
    for name in PLACES:
        if name in out:
            slots_T = np.argsort(order(out["tokens"].shape[1], devices))
            out[name] = slots_T[out[name]].astype(np.int32)
    return out


def _permuted(a_BT: np.ndarray, devices: int) -> np.ndarray:
    missing = -a_BT.shape[1] % (2 * devices)
    a_BT = np.pad(a_BT, [(0, 0), (0, missing)]) if missing else a_BT
    return a_BT[:, order(a_BT.shape[1], devices)]


def check(length: int, devices: int) -> None:
    """Raises RequestError where the devices of the context axis cannot share a sequence evenly."""
    if devices > 1 and length % (2 * devices):
        raise RequestError(
            f"train.seq_len: {length} tokens do not divide into two chunks for each of mesh.context = {devices} "
            f"devices; take a multiple of {2 * devices}"
        )


def pairs(causal: bool, step: Any, device: Any, where: Any = np.where) -> list[tuple[Any, Any]]:
    """The block products of one device at one step of the ring: (chunk of its queries, chunk of the keys it holds).

    At step s, device i holds the keys of device i - s. Causal: of two chunks each, those that see nothing are left out.
    Its own keys: three products. Keys from before its first chunk: both its chunks see their first and not their last
    chunk. Keys from after it: its last chunk sees both. So at every later step all devices have two products.
    """
    if not causal:
        return [(0, 0)]
    if isinstance(step, int) and step == 0:
        return [(0, 0), (1, 0), (1, 1)]
    either = where(step <= device, 0, 1)
    return [(1, 0), (either, either)]
