"""Select fused attention kernels: Pallas splash attention on TPUs, cuDNN on GPUs.

Fused kernels never store all scores (Dao et al., 2022, arXiv:2205.14135).

If no kernel supports the computation, attention runs in plain XLA (`llmctl.model.attention_xla`). On one CPU device,
large scores are computed in blocks (`llmctl.model.attention_blocks`). The kernel is selected at tracing time, from the
platform of the mesh and the shapes. `describe` returns the name of the kernel and the reason.

Several texts may be packed into one sequence. Each text is a segment, numbered from 1, and attention does not cross
segments. Segment 0 is padding. In these kernels, padding attends to padding; in plain XLA, padding attends to nothing.
The outputs of padding are never used.

Shapes: B batch, T sequence (queries), S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from llmctl.distributed import mesh as meshes
from llmctl.model import attention_blocks, attention_xla, relative_bias, ring_attention
from llmctl.model.attention import Shared
from llmctl.model.config import ModelConfig

LANES = 128
"""Block size of splash attention in tokens. Sequence lengths must be a multiple of this size."""

setting: ContextVar[str] = ContextVar("attention", default="auto")
"""Name of the kernel that `use` sets for the current context."""


class Choice(NamedTuple):
    """Store the name of a kernel and the reason for its selection."""

    kernel: str
    why: str


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Set the attention kernel for computations that are traced in a `with` block.

    Args:
        name: "auto", "xla" (always plain XLA) or "interpret" (splash attention on any platform).
    """
    token = setting.set(name)
    try:
        yield
    finally:
        setting.reset(token)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array | None,
    shared: Shared,
    local: jax.Array,
    cfg: ModelConfig,
    *,
    cross: bool,
) -> jax.Array:
    """Compute attention by ring attention, by the platform's fused kernel, or in plain XLA, as `choose` selects.

    Args:
        q_BTHK: Queries.
        k_BSGK: Keys.
        v_BSGK: Values.
        mask_BTS: Whether a query may attend to a key; None for ring attention.
        shared: Inputs that all layers share, such as masks.
        local: Whether this layer has the sliding window, a bool scalar.
        cfg: Config of the model.
        cross: Whether keys and values come from the encoder's output.

    Returns:
        Outputs [B, T, H, K].
    """
    causal = shared.causal_BT is not None
    segments_BT = shared.mutual_BT if shared.causal_BT is None else shared.causal_BT
    if mask_BTS is None:
        rows_BT = cast(jax.Array, segments_BT)
        if cross:
            memory_BS = cast(jax.Array, shared.memory_segments_BS)
            return ring_attention.attend(q_BTHK, k_BSGK, v_BSGK, rows_BT, memory_BS, cfg, causal=False)
        return ring_attention.attend(
            q_BTHK, k_BSGK, v_BSGK, rows_BT, rows_BT, cfg, causal=causal, local=local,
            table_UH=shared.bias_table_UH, bucket=partial(relative_bias.bucket_of, cfg, not causal),
        )  # fmt: skip
    if not cross and segments_BT is not None and shared.bias_HTS is None:
        kernel = choose(cfg, q_BTHK.shape[1], q_BTHK.dtype).kernel
        if kernel == "splash" and shared.branches_BT is None:
            return splash(q_BTHK, k_BSGK, v_BSGK, segments_BT, local, cfg, causal=causal)
        if kernel == "cudnn":
            return cudnn(q_BTHK, k_BSGK, v_BSGK, mask_BTS, cfg)
    bias_HTS = None if cross else shared.bias_HTS
    B, T, H, _ = q_BTHK.shape
    one_bias = bias_HTS is None or bias_HTS.ndim == 3  # blocks know no bias per row
    if uses_blocks() and one_bias and attention_blocks.pays(B, H, T, mask_BTS.shape[2]):
        only_before = shared.causal_BT is not None and not cross
        return attention_blocks.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, bias_HTS, cfg, causal=only_before)
    return attention_xla.attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, bias_HTS, cfg)


def choose(cfg: ModelConfig, length: int, dtype: Any) -> Choice:
    """Return the kernel for self-attention over `length` tokens: "ring", "splash", "cudnn" or "xla"."""
    device = meshes.device()
    wanted, platform = setting.get(), device.platform
    if meshes.splits_sequences():
        return Choice("ring", "keys and values travel around the devices that share a sequence")
    if wanted == "xla":
        return Choice("xla", "as asked for")
    if cfg.prefix_tokens:
        return Choice("xla", "trained keys and values before every text")
    if cfg.positions == "relative":
        return Choice("xla", "a learned position bias")
    if platform == "tpu" or wanted == "interpret":
        if length % LANES:
            return Choice("xla", f"{length} tokens are no multiple of {LANES}")
        return Choice("splash", "Pallas, on TPU" if platform == "tpu" else "Pallas, interpreted")
    if platform in ("gpu", "cuda"):
        return _on_gpu(cfg, length, dtype, device)
    return Choice("xla", f"on {platform}, large scores in blocks" if uses_blocks() else f"on {platform}")


def uses_blocks() -> bool:
    """Return whether plain XLA computes large attention scores in blocks (`attention_blocks`).

    Blocks are used only on a single CPU device.

    A mesh of several CPU devices is used only to test programs. On such a mesh, a loop over sequences would gather the
    sharded batch.
    """
    return setting.get() != "xla" and meshes.device().platform == "cpu" and meshes.size() == 1


def _on_gpu(cfg: ModelConfig, length: int, dtype: Any, device: Any) -> Choice:
    capability = tuple(int(x) for x in str(getattr(device, "compute_capability", "0.0")).split("."))
    widest = 256 if capability >= (9, 0) else 128
    reasons = {
        "it computes in float32": jnp.dtype(dtype) not in (jnp.dtype("bfloat16"), jnp.dtype("float16")),
        "its scores are capped": bool(cfg.attn_softcap),
        f"its heads are {cfg.head_dim} wide": cfg.head_dim > widest or bool(cfg.head_dim % 8),
        f"{length} tokens are odd": bool(length % 2),
        "the GPU is older than Ampere": capability < (8, 0),
        "cuDNN is not there": not _has_cudnn(),
    }
    refused = next((why for why, so in reasons.items() if so), "")
    return Choice("xla", refused) if refused else Choice("cudnn", "on GPU")


def _has_cudnn() -> bool:
    """Return True if a usable cuDNN is installed, that is, if JAX can trace cuDNN's attention."""
    q = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn"), q)
    except Exception:  # a missing or old library raises various types
        return False
    return True


def describe(cfg: ModelConfig, length: int, dtype: Any) -> str:
    """Return a description of the selected kernel for the log."""
    return "attention: {} ({})".format(*choose(cfg, length, dtype))


def splash(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    local: jax.Array,
    cfg: ModelConfig,
    *,
    causal: bool,
) -> jax.Array:
    """Compute self-attention with Pallas' splash kernel.

    On a mesh, every device runs the kernel on its own rows and heads.

    Args:
        q_BTHK: Queries.
        k_BTGK: Keys.
        v_BTGK: Values.
        segments_BT: Number of the packed text that each token belongs to; 0 is padding.
        local: Whether this layer has the sliding window, a bool scalar.
        cfg: Config of the model.
        causal: Whether tokens attend to earlier tokens only.

    Returns:
        Outputs [B, T, H, K].
    """
    mesh = meshes.current()

    def one(window: int) -> Any:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
            return _splash(q, k, v, segments, window, causal, cfg)

        if mesh is None or mesh.size == 1:
            return run
        heads, rows = (meshes.spec(n, mesh) for n in (("batch", None, "act_heads", None), ("batch", None)))
        return meshes.per_device(run, mesh, (heads, heads, heads, rows), heads)

    operands = (q_BTHK, k_BTGK, v_BTGK, segments_BT)
    if not cfg.window:
        return one(0)(*operands)
    if cfg.window_every == 1 and not cfg.window_layers:
        return one(cfg.window)(*operands)
    return jax.lax.cond(local, one(cfg.window), one(0), *operands)


def _splash(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    window: int,
    causal: bool,
    cfg: ModelConfig,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    T, H, K = q_BTHK.shape[1:]
    if window:
        mask: Any = sa.LocalMask((T, T), (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = sa.CausalMask((T, T)) if causal else sa.FullMask((T, T))
    block = next(b for b in (512, 256, LANES) if T % b == 0)
    blocks = sa.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    kernel = sa.make_splash_mha(
        sa.MultiHeadMask([mask] * H),
        block_sizes=blocks,
        attn_logits_soft_cap=cfg.attn_softcap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=setting.get() == "interpret",
    )
    q_BHTK = (q_BTHK * jnp.asarray(cfg.attn_scale or K**-0.5, q_BTHK.dtype)).swapaxes(1, 2)
    y_BHTK = jax.vmap(kernel)(
        q_BHTK, k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2), sa.SegmentIds(segments_BT, segments_BT)
    )
    return cast(jax.Array, y_BHTK).swapaxes(1, 2)


def cudnn(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask_BTS: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Compute self-attention with cuDNN's fused kernel; the arguments are those of `attention_xla.attend`.

    Returns:
        Outputs [B, T, H, K].
    """
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        mask=mask_BTS[:, None],
        scale=cfg.attn_scale or q_BTHK.shape[-1] ** -0.5,
        implementation="cudnn",
    )
