"""List the memory, FLOP/s and bandwidths of accelerators, from the manufacturers' data sheets.

TPU figures come from the "Key specifications" of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. TPU memory is
the memory available to a program, as the out-of-memory message of libtpu 0.0.42 reports it. The data sheet gives a
slightly larger value. The data sheet's interconnect bandwidth counts both directions. The outgoing bandwidth is half of
this value. The bandwidth between slices is the "DCN bandwidth per chip" of the data sheet. For v5e, this bandwidth is
6.4 Tbps per pod divided by 256 chips.

GPU figures come from the data sheets of A100 80GB SXM, H100 SXM and H200 SXM, without sparsity. NVLink bandwidth is
halved in the same way. Between nodes, each GPU has one InfiniBand port. The port has 200 Gb/s in DGX A100, and 400 Gb/s
in DGX H100 and H200.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Store the hardware figures of one accelerator, per JAX device."""

    name: str
    kinds: tuple[str, ...]
    """Substrings of JAX's `device_kind` that identify the accelerator."""
    hbm_bytes: int
    """Device memory available to a program, in bytes; 0 if unknown (a CPU)."""
    flops: dict[str, float]
    """Peak FLOP/s by operand type (bfloat16, float32, int8, …), without sparsity."""
    hbm_bandwidth: float
    """Memory bandwidth in bytes per second."""
    ici_bandwidth: float
    """Outgoing bandwidth to neighboring chips over all links, in bytes per second."""
    dcn_bandwidth: float = 0.0
    """Outgoing bandwidth to other slices or nodes, in bytes per second."""
    dimensions: int = 0
    """Number of dimensions of the torus network (2 or 3); 0 if a switch connects all devices."""
    devices: int = 1
    """Number of JAX devices per physical chip."""

    def peak(self, dtype: str) -> float:
        """Return the peak FLOP/s for operands of type `dtype`.

        If the data sheet does not list the type, return the value for bfloat16. TPUs, for example, multiply float32
        operands in bfloat16.
        """
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
    # Each physical chip appears as two JAX devices with half of the memory and speed each.
    Chip(
        "tpu7x", ("TPU7x", "TPU v7"), int(94.75 * GIB), {"bfloat16": 1153.5e12, "float8": 2307e12},
        3690e9, 300e9, 6.25e9, dimensions=3, devices=2,
    ),
    Chip(
        "h200", ("H200",), 141 * 10**9,
        {"bfloat16": 989e12, "float32": 494.5e12, "int8": 1979e12, "float8": 1979e12}, 4800e9, 450e9, 50e9,
    ),
    # Throughput reports use these; `plan` does not, because they have no topology here.
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
"""All known accelerators. `of_kind` returns the first match, so more specific kinds come first."""

CPU = Chip("cpu", (), 0, {}, 0.0, 0.0)


def chip(name: str) -> Chip:
    """Return the accelerator called `name`, such as "v5e".

    Raises:
        KeyError: If the name is unknown.
    """
    return {c.name: c for c in (*CHIPS, CPU)}[name]


def of_kind(device_kind: str) -> Chip | None:
    """Return the accelerator that JAX reports as `device_kind`, or None if the kind is unknown."""
    kind = device_kind.lower()
    return next((c for c in CHIPS if any(k.lower() in kind for k in c.kinds)), None)
