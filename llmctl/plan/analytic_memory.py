"""Estimate the memory of a step from its config and mesh, without compiling.

The estimate counts the arrays that XLA keeps in memory:

- the arguments, such as the training state
- the activations that the forward pass saves per layer
- further arrays at the memory peak

Memory is estimated at two moments of the step, and the larger value is the peak. The first moment is the loss, when the
output projection is gathered on every device. The second is the end of the backward pass, when the gradients of all
layers exist. `recipes/bench/plan_model.md` compares the estimates with compiled programs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmctl.model import flops
from llmctl.model.chunked_loss import CHUNK_BYTES
from llmctl.model.config import ModelConfig
from llmctl.plan.analytic_setup import Setup
from llmctl.train.optim import FACTORED_FROM

MOMENTS = {"adamw": 2.0, "sgd": 1.0, "lion": 1.0, "adafactor": 0.0, "muon": 1.0}
"""Number of float32 arrays that each optimizer stores per matrix of a layer. Muon uses AdamW for the other
parameters."""
REPEATS_PRODUCTS = ("full", "qkv")
"""Values of `remat` with which the backward pass repeats matrix products of the forward pass."""


@dataclass(frozen=True)
class Memory:
    """Store the bytes that each kind of array needs on one device."""

    parameters: float
    optimizer: float
    temporaries: float
    """Bytes of gradients, activations and intermediate results."""
    batch: float
    cache: float
    """Bytes of the key/value cache, or of calibration statistics."""

    @property
    def total(self) -> float:
        """Return the bytes of all kinds of arrays together."""
        return self.parameters + self.optimizer + self.temporaries + self.batch + self.cache


@dataclass(frozen=True)
class Entries:
    """Store the number of parameters on one device, by part of the model."""

    layers: float
    """Number of parameters in the matrices of the layers."""
    table: float
    """Number of parameters of the token embeddings."""
    head: float
    """Number of parameters of the output projection; 0 if embeddings are tied."""
    rest: float
    """Number of parameters that every device has completely: norms, biases and position tables."""

    @property
    def total(self) -> float:
        """Return the number of all parameters on one device."""
        return self.layers + self.table + self.head + self.rest


def entries(model: ModelConfig, size: Mapping[str, int]) -> Entries:
    """Return the number of parameters on each device of a mesh with these axis sizes.

    The axes fsdp, context and tensor split every matrix. The axis pipeline splits the layers.
    """
    found = flops.parameters(model)
    ways = math.prod(size.get(a, 1) for a in ("fsdp", "context", "tensor"))
    matrices = model.layers * flops._matrices(model, cross=model.encoder_layers > 0)
    matrices += model.encoder_layers * flops._matrices(model)
    table = model.vocab_size * model.d_model
    head = table if model.head_kind.vocabulary and not model.tied else 0
    rest = found["total"] - matrices - table - head
    rows = (
        model.token_types
        + model.prompt_tokens
        + (model.max_seq_len + model.prefix_tokens + model.position_offset) * (model.positions == "learned")
    )
    pooled = model.pools
    squares = pooled + (model.head_kind.vocabulary and model.head_transform)
    wide = model.d_model * (rows + model.d_model * squares)
    residual = size.get("fsdp", 1) * size.get("context", 1)  # as wide as the residual stream, but no matrices
    rest += wide / residual - wide
    return Entries(matrices / ways / size.get("pipeline", 1), table / ways, head / ways, rest)


def estimate(setup: Setup) -> Memory:
    """Return the bytes in use on one device at the memory peak of a step, by kind of array."""
    own = entries(setup.model, setup.mesh)
    trained = 4.0 * setup.trained * (2 if setup.ema else 1) if setup.optimizer else 0.0
    return Memory(
        parameters=own.total * (trained + setup.stored),
        optimizer=_optimizer(setup, own),
        temporaries=training(setup, own) if setup.optimizer else forward(setup, own),
        batch=20.0 * setup.tokens * setup.accumulate,
        cache=_cache(setup) + _statistics(setup),
    )


def _optimizer(setup: Setup, own: Entries) -> float:
    if not setup.optimizer:
        return 0.0
    if setup.optimizer == "adafactor":
        return setup.trained * _factored(setup, own)
    moments = MOMENTS[setup.optimizer]
    beside = 2.0 if setup.optimizer == "muon" else moments
    return 4.0 * setup.trained * (moments * own.layers + beside * (own.total - own.layers))


def _factored(setup: Setup, own: Entries) -> float:
    """Return the bytes of Adafactor's second moments on one device.

    A matrix with at least `FACTORED_FROM` rows and columns stores one float32 per row and one per column. Any other
    array stores one float32 per parameter.
    """
    model = setup.model
    D, F = model.d_model, model.d_ff
    sides = [(D, model.heads * model.head_dim)] * 2 + [(D, model.kv_heads * model.head_dim)] * 2
    sides += [(D, F)] * (3 if model.gated else 2)
    layer = sum(i + o if min(i, o) >= FACTORED_FROM else i * o for i, o in sides) / sum(i * o for i, o in sides)
    table = 1 / D + 1 / model.vocab_size
    return 4.0 * (own.layers * layer + (own.table + own.head) * table + own.rest)


def widths(setup: Setup) -> tuple[float, float, float]:
    """Return three widths, in elements per token on one device.

    The widths are, in this order: the residual stream; one feed-forward activation; q, k and v together.
    """
    model, tensor = setup.model, setup.size("tensor")
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    return float(model.d_model), model.d_ff / tensor, heads / tensor


def saved(setup: Setup) -> float:
    """Return the bytes of one layer's activations that the forward pass keeps for the backward pass, per device."""
    D, F, heads = widths(setup)
    ffs, item = (2 if setup.model.gated else 1), setup.item_bytes
    queries = setup.model.heads * setup.model.head_dim / setup.size("tensor")
    if setup.remat in ("full", "offload"):  # the layer's input; offload moves the rest to the host
        numbers = item * D
    elif setup.remat == "qkv":
        numbers = item * (D + heads)
    elif setup.remat == "minimal":  # and the results of the products; the last one is not read again
        numbers = item * (D + heads + D + ffs * F + adapters(setup.model))
        if not setup.fused:  # plain attention also keeps its result, and two numbers per head
            numbers += item * queries + 8.0 * setup.model.heads / setup.size("tensor")
    else:  # also norms in float32, operands of the products, and intermediate results of the activation
        numbers = 4 * 3 * D + item * (3 * D + 2 * heads + queries + (ffs + 2) * F + adapters(setup.model)) + 4.0
    return numbers * setup.tokens + (0.0 if setup.remat != "none" else scores(setup) / 3)


def adapters(model: ModelConfig) -> float:
    """Return the number of elements per token that the bottleneck adapters of one layer keep for the backward pass.

    Each adapter keeps its inner activation and its output.
    """
    return sum(model.has_adapter(part) for part in ("attn", "mlp")) * float(model.adapter_size + model.d_model)


def scores(setup: Setup) -> float:
    """Return the bytes of the attention scores on one device. If attention is fused, return 0.

    Plain attention holds three float32 arrays: the probabilities, their gradient and a copy. In ring attention, a
    device holds the scores of its own queries for one device's keys at a time.
    """
    if setup.fused:
        return 0.0
    length = setup.seq_len / setup.size("context")
    return 3 * 4.0 * setup.own_rows * setup.model.heads / setup.size("tensor") * length**2


def training(setup: Setup, own: Entries) -> float:
    """Return the bytes of temporaries of a training step on one device."""
    D, F, heads = widths(setup)
    queries = setup.model.heads * setup.model.head_dim / setup.size("tensor")
    unit = setup.item_bytes * setup.tokens
    kept = setup.depth * saved(setup)
    copies = setup.item_bytes * own.layers if setup.item_bytes < 4 else 0.0  # of the matrices, in the compute type
    projection = (
        setup.model.vocab_size * setup.model.d_model / setup.size("tensor") if setup.model.head_kind.vocabulary else 0
    )
    gradients = 4.0 * setup.trained * (own.layers + own.table + own.head)
    sums = gradients if setup.accumulate > 1 else 0.0  # of earlier microbatches
    # The loss gathers the projection, and its gradient is in float32.
    loss = projection * (setup.item_bytes + 4.0) + 3 * unit * D + 2 * logits(setup)
    # The backward pass of one layer holds five residual streams and four feed-forward activations ("minimal": without
    # the saved ones), queries, keys and values, and the result of attention.
    layer = 5 * D + 4 * F + heads + queries if setup.remat != "minimal" else 4 * D + 2 * F + queries
    backward = gradients + unit * layer + scores(setup) + gathered(setup, own)
    return kept + copies + sums + max(loss, backward)


def gathered(setup: Setup, own: Entries) -> float:
    """Return the bytes of gathered matrices that are in memory during a layer's backward pass.

    Usually only one matrix is gathered at a time. If `remat` recomputes the layer, all its matrices stay gathered from
    the recomputation until the gradients are computed.
    """
    ways = setup.size("fsdp", "context")
    if ways == 1:
        return 0.0
    if setup.remat in REPEATS_PRODUCTS:
        kept = setup.model.d_model * widths(setup)[2] if setup.remat == "qkv" else 0.0  # their matrices are not needed
        return setup.item_bytes * (own.layers * ways / setup.depth - kept)
    return setup.item_bytes * setup.model.d_model * setup.model.d_ff / setup.size("tensor")


def forward(setup: Setup, own: Entries) -> float:
    """Return the bytes of temporaries of a forward pass on one device.

    These are the activations of one layer, the logits, the gathered output projection, and the new keys and values.
    """
    projection = (
        setup.item_bytes * own.head * setup.size("fsdp", "context") if setup.size("fsdp", "context") > 1 else 0.0
    )
    written = _cache(setup) if setup.seq_len > 1 else 0.0
    return layer(setup) + logits(setup) + projection + written


def logits(setup: Setup) -> float:
    """Return the bytes of the float32 logits for one chunk of tokens, on one device.

    A chunk has at least one token of every sequence.
    """
    if not setup.model.head_kind.vocabulary:
        return 0.0
    a_token = 4.0 * setup.model.vocab_size / setup.size("tensor")
    return max(setup.own_rows * a_token, min(setup.last_tokens * setup.predicted * a_token, CHUNK_BYTES))


def layer(setup: Setup, times: int = 1) -> float:
    """Return the bytes of temporaries of a layer's forward pass, with `times` copies of its activations.

    The bytes are the sum of three parts:

    - two feed-forward activations, or the scores and probabilities of plain attention if these are larger
    - two residual streams
    - the largest matrix, if it is gathered
    """
    D, F, _ = widths(setup)
    unit = setup.item_bytes * setup.tokens
    matrix = setup.item_bytes * D * F if setup.size("fsdp", "context") > 1 else 0.0
    return times * max(scores(setup) * 2 / 3, 2 * F * unit) + 2 * D * unit + matrix


def _cache(setup: Setup) -> float:
    if not setup.cached:
        return 0.0
    a_token = flops.kv_cache(setup.model, setup.item_bytes)
    return setup.rows * setup.cached * a_token / setup.size("data", "fsdp", "tensor")


def _statistics(setup: Setup) -> float:
    """Return the bytes of one layer's calibration statistics: float32 second moments [I, I] of each matrix's inputs."""
    if not setup.hessians:
        return 0.0
    model = setup.model
    widths = [*[model.d_model] * (3 + (2 if model.gated else 1)), model.heads * model.head_dim, model.d_ff]
    return 4.0 * sum(w * w for w in widths)
