"""Chips by name: their memory and their speeds, by their makers' data sheets. The one place where such figures stand.

TPUs: the "Key specifications" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; memory is what libtpu 0.0.42
leaves to a program (its own message when one does not fit), a little below the data sheet. The interconnect there is
of both directions: half of it leaves a chip. The network between slices: their "DCN bandwidth per chip", v5e's from
6.4 Tbps a pod of 256. GPUs: the data sheets of A100 80GB SXM, H100 SXM and H200 SXM, without sparsity; NVLink halved
likewise; between nodes one InfiniBand port a GPU, as in DGX A100 (200 Gb/s) and DGX H100 and H200 (400 Gb/s).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    name: str
    kinds: tuple[str, ...]
    """What it calls itself: parts of JAX's `device_kind`."""
    hbm_bytes: int
    """Memory that a program can have; 0 where nobody knows (a CPU)."""
    flops: dict[str, float]
    """FLOP/s by type of the operands (bfloat16, float32, int8, …), without sparsity."""
    hbm_bandwidth: float
    """Bytes a second."""
    ici_bandwidth: float
    """Bytes a second that leave it for its neighbours, over all links."""
    dcn_bandwidth: float = 0.0
    """Bytes a second that leave it for another slice."""
    dimensions: int = 0
    """Of the torus of links; 0 where a switch joins all."""
    devices: int = 1
    """JAX devices of what is rented as one chip."""

    def peak(self, dtype: str) -> float:
        """FLOP/s with operands of this type; TPUs multiply float32 in bfloat16, and so does a type without a figure."""
        return self.flops.get(dtype) or self.flops.get("bfloat16", 0.0)


GIB = 2**30

CHIPS: tuple[Chip, ...] = (
    Chip(
        "v4", ("TPU v4",), int(30.75 * GIB), {"bfloat16": 275e12, "int8": 275e12},
        1200e9, 300e9, 6.25e9, dimensions=3,
    ),
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), {"bfloat16": 197e12, "int8": 393e12},
        819e9, 200e9, 3.125e9, dimensions=2,
    ),
    Chip(
        "v5p", ("TPU v5",), int(95.74 * GIB), {"bfloat16": 459e12, "int8": 918e12},
        2765e9, 600e9, 6.25e9, dimensions=3,
    ),
    Chip(
        "v6e", ("TPU v6",), int(31.25 * GIB), {"bfloat16": 918e12, "int8": 1836e12, "float8": 918e12},
        1638e9, 400e9, 12.5e9, dimensions=2,
    ),
    # A chip is two devices, each with half of it.
    Chip(
        "tpu7x", ("TPU7x", "TPU v7"), int(94.75 * GIB), {"bfloat16": 1153.5e12, "float8": 2307e12},
        3690e9, 300e9, 6.25e9, dimensions=3, devices=2,
    ),
    Chip(
        "h200", ("H200",), 141 * 10**9,
        {"bfloat16": 989e12, "float32": 494.5e12, "int8": 1979e12, "float8": 1979e12}, 4800e9, 450e9, 50e9,
    ),
    # Not to be planned for (no topology): what meters know of the slower relatives.
    Chip("h100-pcie", ("H100 PCIe",), 80 * 10**9, {"bfloat16": 756e12}, 2000e9, 64e9),
    Chip("h100-nvl", ("H100 NVL",), 94 * 10**9, {"bfloat16": 835e12}, 3900e9, 300e9),
    Chip(
        "h100", ("H100",), 80 * 10**9,
        {"bfloat16": 989e12, "float32": 494.5e12, "int8": 1979e12, "float8": 1979e12}, 3350e9, 450e9, 50e9,
    ),
    Chip(
        "a100", ("A100",), 80 * 10**9,
        {"bfloat16": 312e12, "float32": 156e12, "int8": 624e12}, 2039e9, 300e9, 25e9,
    ),
)  # fmt: skip
"""The first whose kind is part of a device's `device_kind` is that device's."""

CPU = Chip("cpu", (), 0, {}, 0.0, 0.0)


def chip(name: str) -> Chip:
    """The chip of this name; KeyError where there is none."""
    return {c.name: c for c in (*CHIPS, CPU)}[name]


def of_kind(device_kind: str) -> Chip | None:
    """The chip that calls itself `device_kind`, or None for one that the table lacks."""
    kind = device_kind.lower()
    return next((c for c in CHIPS if any(k.lower() in kind for k in c.kinds)), None)
