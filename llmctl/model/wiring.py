"""Derive from a ModelConfig how the matrices of a model are connected: which module produces the input of a matrix.

Structured pruning needs to know which columns and rows of matrices belong to a head or a neuron. SmoothQuant
(arXiv:2211.10438) and AWQ (arXiv:2306.00978) move scales from a matrix to the module before it, without changing the
outputs. Rotations need to know which matrices write to and read from the residual stream (QuaRot, arXiv:2404.00456).

Modules are given by their paths in the parameter tree. For example, "decoder/blocks/attn/q" is the query projection in
all layers of the decoder. This module does not import JAX.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.model.config import ModelConfig


@dataclass(frozen=True)
class Feed:
    """Describe one activation: the module that produces it, and all matrices whose input is this activation.

    >>> cfg = ModelConfig(preset="llama-tiny")
    >>> next(f for f in feeds(cfg) if f.producer == "decoder/blocks/mlp_norm").readers
    ('decoder/blocks/mlp/gate', 'decoder/blocks/mlp/up')
    """

    producer: str
    """Path of the norm or matrix whose output is the activation; empty if the activation is a residual stream."""
    readers: tuple[str, ...]
    """Paths of the matrices whose input is the activation. The paths include the table `embed/tokens` if the output
    projection is tied."""
    foldable: bool
    """Whether scales can be folded. The producer then multiplies a channel by a positive factor. The readers divide
    their rows of this channel by the same factor. The outputs of the model do not change. The field is false if a
    module other than the readers reads the activation. It is also false if a nonlinearity f between producer and
    readers does not satisfy f(c x) = c f(x)."""
    repeat: int = 1
    """Number of query heads per value head, if the producer is a value projection in grouped-query attention; otherwise
    1."""


@dataclass(frozen=True)
class Units:
    """Describe the heads or neurons of one sublayer. Structured pruning removes heads and neurons together with their
    columns and rows.
    """

    name: str
    """Kind of the units: "attn/heads" or "cross/heads" (query heads), "attn/groups" or "cross/groups" (key and value
    heads), or "mlp/neurons". Names with "cross/" are for cross-attention."""
    writers: tuple[str, ...]
    """Paths, relative to the layer, of the modules whose outputs (columns, bias elements) are the heads or neurons."""
    readers: tuple[str, ...]
    """Paths, relative to the layer, of the matrices whose inputs (rows) are the outputs of the heads or neurons."""
    count: int
    """Number of the heads or neurons per layer."""
    width: int
    """Number of matrix columns or rows per head or neuron."""
    tables: tuple[str, ...] = ()
    """Paths of parameters that all layers share, relative to the stack. These parameters have one element per head on
    the last axis. An example is the table of relative position biases."""


@dataclass(frozen=True)
class Residual:
    """Describe the residual stream of a stack by the modules that write to it, and the modules that read it."""

    stack: str
    writers: tuple[str, ...]
    """Paths of the embedding tables, matrices and norms whose output is added to the residual stream. The norms of a
    post-norm model replace the stream by their output, and are included."""
    readers: tuple[str, ...]
    """Paths of the norms and matrices whose input is the residual stream. Sequential adapters are included, although
    their input is the output of a sublayer, not the stream."""


def stacks(cfg: ModelConfig) -> list[str]:
    """Return the names of the model's stacks, "encoder", "decoder" or both, in the order in which they run."""
    return {"decoder": ["decoder"], "encoder": ["encoder"]}.get(cfg.architecture, ["encoder", "decoder"])


def has_cross_attention(cfg: ModelConfig, stack: str) -> bool:
    """Return True if the layers of a stack attend to the output of an encoder."""
    return stack == "decoder" and cfg.encoder_layers > 0


def feeds(cfg: ModelConfig) -> list[Feed]:
    """Return all activations that are inputs of matrices. Each matrix has exactly one of these activations as its
    input."""
    found: list[Feed] = []
    for stack in stacks(cfg):
        found += _block_feeds(cfg, stack)
    if cfg.encoder_layers:  # cross-attention of every decoder layer reads the encoder's output
        memory = ("decoder/blocks/cross/k", "decoder/blocks/cross/v")
        found.append(Feed(end(cfg, "encoder"), memory, cfg.norm_position != "post"))
    return found + _head_feeds(cfg)


def first_readers(cfg: ModelConfig, stack: str) -> dict[str, str]:
    """Map each matrix of a layer to the first matrix that has the same input.

    Paths are relative to the layer.

    >>> first_readers(ModelConfig(preset="llama-tiny"), "decoder")["attn/v"]
    'attn/q'
    """
    block, found = f"{stack}/blocks/", {}
    for feed in feeds(cfg):
        own = [reader.removeprefix(block) for reader in feed.readers if reader.startswith(block)]
        found |= dict.fromkeys(own, next(iter(own), ""))
    return found


def _block_feeds(cfg: ModelConfig, stack: str) -> list[Feed]:
    block, post = f"{stack}/blocks", cfg.norm_position == "post"
    parts = ["attn", "cross", "mlp"] if has_cross_attention(cfg, stack) else ["attn", "mlp"]
    found: list[Feed] = []
    for i, part in enumerate(parts):
        # A post-norm's output is also the residual stream, so no scale can be moved out of it.
        norm = (f"{block}/{parts[i - 1]}_norm" if i else "") if post else f"{block}/{part}_norm"
        names = {"attn": "qkv", "cross": "q"}.get(part) or (("gate", "up") if cfg.gated else ("up",))
        adapter = f"{block}/{part}_adapter" if cfg.has_adapter(part) else ""
        beside = (f"{adapter}/reduce",) if adapter and cfg.adapter_form == "parallel" else ()
        found.append(Feed(norm, (*(f"{block}/{part}/{name}" for name in names), *beside), not post))
        if part == "mlp":
            # down(act(gate) * up) is linear in up; down(act(up)) is only if act(s x) = s act(x) for s > 0.
            linear = cfg.gated or cfg.activation == "relu"
            found.append(Feed(f"{block}/mlp/up", (f"{block}/mlp/down",), linear))
        else:  # attention averages values, which is linear
            repeat = cfg.heads // cfg.kv_heads
            alone = part != "attn" or not cfg.of_stack(stack).prefix_tokens  # trained values are averaged as well
            found.append(Feed(f"{block}/{part}/v", (f"{block}/{part}/o",), alone, repeat))
        if adapter and not beside:  # the adapter's input is also added to the residual stream
            found.append(Feed(_output(cfg, block, part), (f"{adapter}/reduce",), False))
        if adapter:  # parallel adapters use relu, which is positively homogeneous; sequential ones use gelu
            found.append(Feed(f"{adapter}/reduce", (f"{adapter}/expand",), bool(beside)))
    return found


def _output(cfg: ModelConfig, block: str, part: str) -> str:
    """Return the path of the matrix or norm whose output the sublayer `part` adds to the residual stream."""
    last = f"{block}/{part}/{'down' if part == 'mlp' else 'o'}"
    return f"{block}/{part}_post_norm" if cfg.norm_position == "sandwich" else last


def end(cfg: ModelConfig, stack: str) -> str:
    """Return the path of the norm that produces the output of a stack, "encoder" or "decoder"."""
    return f"{stack}/blocks/mlp_norm" if cfg.norm_position == "post" else f"{stack}/norm"


def _head_feeds(cfg: ModelConfig) -> list[Feed]:
    """Return the activations that are inputs of the output heads' matrices.

    Pooling is linear, so a scale can be moved from the final norm to a matrix after the pooling.
    """
    last, found, readers = end(cfg, stacks(cfg)[-1]), [], []
    tied, alone = False, True
    if cfg.head_kind.vocabulary:
        output = "embed/tokens" if cfg.tied else "lm_head"
        if cfg.head_transform:
            readers.append("lm_head/transform")
            found.append(Feed("lm_head/norm", (output,), not cfg.tied))
        else:
            readers.append(output)
            tied = cfg.tied  # the tied table is also the input embedding
    bare = cfg.head_kind.bare
    if cfg.task_head:
        if cfg.pools:
            readers.append("head/pooler")
            if not bare:
                found.append(Feed("head/pooler", ("head/out",), False))  # tanh is between
        elif not bare:
            readers.append("head/out")
        alone = not bare  # the output of an embedding model is the pooled hidden state itself
    foldable = alone and not tied and cfg.norm_position != "post"
    return [*([Feed(last, tuple(readers), foldable)] if readers else []), *found]


def matrices(cfg: ModelConfig) -> list[str]:
    """Return the path of every matrix that multiplies activations, sorted."""
    return sorted(reader for feed in feeds(cfg) for reader in feed.readers)


def units(cfg: ModelConfig, stack: str) -> list[Units]:
    """Return descriptions of the heads and neurons that structured pruning can remove from each layer of `stack`."""
    found: list[Units] = []
    for part in ("attn", "cross") if has_cross_attention(cfg, stack) else ("attn",):
        tables = ("relative_bias/table",) if part == "attn" and cfg.positions == "relative" else ()
        heads = Units(f"{part}/heads", (f"{part}/q",), (f"{part}/o",), cfg.heads, cfg.head_dim, tables)
        prefix = ("attn/prefix",) if part == "attn" and cfg.of_stack(stack).prefix_tokens else ()
        writers = (f"{part}/k", f"{part}/v", *prefix)
        found += [heads, Units(f"{part}/groups", writers, (), cfg.kv_heads, cfg.head_dim)]
    neurons = ("mlp/gate", "mlp/up") if cfg.gated else ("mlp/up",)
    return [*found, Units("mlp/neurons", neurons, ("mlp/down",), cfg.d_ff, 1)]


def residual(cfg: ModelConfig, stack: str) -> Residual:
    """Return the modules that write to the residual stream of a stack ("encoder" or "decoder") or read it."""
    block = f"{stack}/blocks"
    tables = ["embed/tokens"]
    tables += ["embed/positions"] if cfg.positions == "learned" else []
    tables += ["embed/types"] if cfg.token_types else []
    tables += ["embed/prompt"] if cfg.prompt_tokens else []
    writers = ["embed/norm"] if cfg.embed_norm else tables
    readers: list[str] = []
    for part in ("attn", "cross", "mlp") if has_cross_attention(cfg, stack) else ("attn", "mlp"):
        norm = f"{block}/{part}_norm"
        if cfg.norm_position == "post":  # the sum is normalized, and the norm's output is the stream from there on
            inner = next(f.readers for f in _block_feeds(cfg, stack) if f.readers[0].startswith(f"{block}/{part}/"))
            readers += [*inner, norm]
            writers.append(norm)
        readers += [norm] if cfg.norm_position != "post" else []
        writers.append(_output(cfg, block, part))
        if cfg.has_adapter(part):
            sequential = cfg.adapter_form == "sequential"
            readers += [f"{block}/{part}_adapter/reduce"] if sequential else []
            writers += [f"{block}/{part}_adapter/expand"] if sequential or cfg.norm_position != "sandwich" else []
    if cfg.norm_position != "post":
        readers.append(f"{stack}/norm")
    return Residual(stack, tuple(writers), tuple(readers))
