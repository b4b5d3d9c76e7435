"""Compute the FLOPs of one instruction of compiled HLO. A multiply-add counts as two FLOPs."""

from __future__ import annotations

import json
import math
import re

from llmctl.plan.hlo.parser import Array, Computation, Instruction

TYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8", "u8": "int8",
    "s4": "int4", "u4": "int4", "s32": "int32",
}  # fmt: skip
"""Name of each dtype in JAX, by its name in HLO. All float8 types are named "float8"."""


def matrix(computation: Computation, i: Instruction) -> tuple[float, str]:
    """Return (FLOPs, operand dtype) of a dot, a convolution or a library matrix product. For other instructions, return
    (0, "")."""
    if i.opcode == "dot":
        contracted = i.numbers("lhs_contracting_dims")
        left = computation.operand(i, 0).arrays[0]
        return 2.0 * i.arrays[0].size * math.prod(left.dims[d] for d in contracted), _dtype(computation, i)
    if i.opcode == "convolution":
        return _convolution(computation, i), _dtype(computation, i)
    if i.opcode == "custom-call" and re.search(r"\$(gemm|matmul|lt\$matmul)", i.target):
        config = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', i.attributes)
        left = computation.operand(i, 0).arrays[0]
        if config:
            contracted = [int(d) for d in json.loads(config[1])]
            return 2.0 * i.arrays[0].size * math.prod(left.dims[d] for d in contracted), _dtype(computation, i)
    return 0.0, ""


def _dtype(computation: Computation, i: Instruction) -> str:
    """Return the wider dtype of the two operands. This dtype determines the speed of the product."""
    wider = max((computation.operand(i, n).arrays[0] for n in (0, 1)), key=lambda a: a.bytes / max(a.size, 1))
    return "float8" if wider.dtype.startswith("f8") else TYPES.get(wider.dtype, wider.dtype)


def _convolution(computation: Computation, i: Instruction) -> float:
    """Return the FLOPs of a convolution, without products with padding.

    TPU programs express matrix products as convolutions.
    """
    left, right, out = (*(computation.operand(i, n).arrays[0] for n in (0, 1)), i.arrays[0])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    lhs, rhs, result = labels.groups()
    window = _window(i, sum(c.isdigit() for c in lhs))
    taps = 1.0
    for d, w in enumerate(window):
        taps *= _taps(left.dims[lhs.index(str(d))], right.dims[rhs.index(str(d))], out.dims[result.index(str(d))], **w)
    batch, features = out.dims[result.index("b")], out.dims[result.index("f")]
    groups = (i.numbers("batch_group_count") or [1])[0]
    return 2.0 * taps * batch * features * right.dims[rhs.index("i")] / groups


def _window(i: Instruction, spatial: int) -> list[dict[str, int]]:
    text = i.attributes.partition("window={")[2].partition("}")[0]
    fields = dict(part.split("=") for part in text.split())

    def values(key: str, default: str) -> list[str]:
        return fields[key].split("x") if key in fields else [default] * spatial

    found = []
    for stride, pad, input_dilation, kernel_dilation in zip(
        values("stride", "1"), values("pad", "0_0"), values("lhs_dilate", "1"), values("rhs_dilate", "1"), strict=True
    ):
        found.append(
            {
                "stride": int(stride),
                "padding": int(pad.split("_")[0]),
                "input_dilation": int(input_dilation),
                "kernel_dilation": int(kernel_dilation),
            }
        )
    return found


def _taps(
    size: int, kernel: int, out: int, *, stride: int, padding: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Return the number of multiply-adds for one dimension of a convolution. Multiply-adds with padding do not count.

    The result is the number of pairs (output position, kernel position) that read an element of the input.

    Args:
      size: length of the input.
      kernel: length of the kernel.
      out: length of the output.
      stride: step between outputs.
      padding: padding before the input.
      input_dilation: dilation of the input.
      kernel_dilation: dilation of the kernel.
    """
    last = (size - 1) * input_dilation
    if kernel == 1 and padding == 0 and input_dilation == 1:
        return out
    return sum(
        0 <= (at := o * stride + k * kernel_dilation - padding) <= last and at % input_dilation == 0
        for o in range(out)
        for k in range(kernel)
    )


PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
"""Number of matrix products [T, S, K] in each kernel of splash attention.

The forward kernel (fwd) computes scores and outputs. The kernel dkv computes the gradients of the probabilities, the
keys and the values, after it has recomputed the scores. The kernel dq computes the gradients of the probabilities and
the queries, after it has recomputed the scores.
"""


def attention(computation: Computation, i: Instruction) -> float:
    """Return the FLOPs of a splash attention kernel from its shapes. Only blocks inside the mask run.

    Queries are [B, H, T, K] and keys [B, G, S, K]. The axis B is absent if B is 1. For a causal mask or a sliding
    window, the first argument [., rows, columns] lists the blocks that the kernel computes. Each row of blocks is
    assumed to have at most `columns` blocks, of which the last is on the diagonal.
    """
    products = next((n for part, n in PRODUCTS.items() if f"_{part}_" in i.name), 0)
    if "splash" not in i.name or not products:
        return 0.0
    inputs = computation.inputs(i)
    heads = [a for a in inputs if len(a.dims) in (3, 4) and a.dtype in ("bf16", "f32", "f16")]
    if len(heads) < 2:
        return 0.0
    q, k = heads[:2]
    if products == PRODUCTS["dkv"] and '\\"use_fused_bwd_kernel\\": true' in i.attributes:
        products += 1
    return products * 2.0 * q.size * k.dims[-2] * _share(inputs)


def _share(inputs: list[Array]) -> float:
    """Return the fraction of the attention matrix's blocks (query block, key block) that the kernel computes."""
    table = inputs[0]  # absent if every block runs
    if len(table.dims) != 3 or not table.dtype.startswith("s"):
        return 1.0
    shortest, longest = sorted(table.dims[1:])
    return sum(min(r + 1, shortest) for r in range(longest)) / longest**2
