"""Estimate the operations, memory traffic and collectives of a step from its config and mesh, without compiling.

The estimate follows XLA's compiled programs. Weights are gathered over the mesh axes fsdp and context, in the compute
dtype, once per pass. Gradients are reduce-scattered over the same axes. Activations are reduced over the tensor axis
after the attention and after the feed-forward part of each layer.
"""

from __future__ import annotations

from llmctl.distributed.mesh import AXES
from llmctl.model import flops as cost
from llmctl.plan.analytic_memory import REPEATS_PRODUCTS, entries, scores, widths
from llmctl.plan.analytic_setup import Setup
from llmctl.plan.hlo.counts import Collective, Counts

BLOCK = 512
"""Number of tokens per block of the attention kernel. The kernel skips blocks that are masked completely."""


def counts(setup: Setup) -> Counts:
    """Return the operations, memory traffic and collectives of a step on one device, summed over microbatches."""
    model, trains = setup.model, bool(setup.optimizer)
    recomputes = trains and setup.remat != "none"
    tokens = setup.tokens * setup.accumulate
    tensor = setup.size("tensor")
    own = entries(model, setup.mesh)
    whole = own.layers * setup.size("fsdp", "context")  # the gathered matrices, split over tensor alone
    passes = 3.0 if trains else 1.0
    layers = 2 * tokens * whole
    last = layers * model.d_model * model.d_ff / cost._matrices(model)  # its output is not needed again
    queries = 2 * tokens * setup.depth * model.d_model * widths(setup)[2] if setup.remat == "qkv" else 0.0
    flops = passes * layers + (layers - last - queries if recomputes and setup.remat in REPEATS_PRODUCTS else 0.0)
    if setup.trained < 1:  # a frozen matrix needs no gradient
        flops -= (1 - setup.trained) * layers
    types = {dtype: share * flops for dtype, share in setup.eight.items()}
    if model.head_kind.vocabulary:
        predicted = setup.last_tokens * setup.accumulate * setup.predicted
        flops += passes * 2 * predicted * model.d_model * model.vocab_size / tensor
    attention = _attention(setup, trains, recomputes)
    flops += setup.beside / setup.size(*AXES) + (0.0 if setup.fused else attention)
    types[setup.dtype] = flops - sum(types.values())
    kernels = {"attention": setup.depth * setup.accumulate} if setup.fused else {}
    return Counts(
        flops=flops,
        bytes=_traffic(setup, own.total, whole, passes + recomputes),
        collectives=_collectives(setup, whole, trains, recomputes),
        flops_by_type=types,
        kernels=kernels,
        kernel_flops=attention if setup.fused else 0.0,
    )


def _attention(setup: Setup, trains: bool, recomputes: bool) -> float:
    """Return the FLOPs of attention on one device per step.

    If `trains` is true, the backward pass is included. If `recomputes` is true, the products that the backward pass
    repeats are included too. The forward pass has 2 matrix products. The backward pass has 7 in the kernels, and 5 in
    plain attention.
    """
    model = setup.model
    T = setup.seq_len
    window = min(model.window or T, T)
    causal = model.architecture != "encoder"
    if setup.fused:
        blocks = max(1, T // BLOCK)
        share = (blocks + 1) / (2 * blocks) if causal else 1.0
        share *= min(1.0, 2 * window / T)
    elif (ring := setup.size("context")) > 1 and causal:  # of 2 x 2 pairs of chunks: 3 own, 2 of others
        share = (2 * ring + 1) / (4 * ring)
    else:
        share = 1.0
    # "minimal" keeps the results of the plain form. Recomputed scores are also those of the backward pass.
    repeated = recomputes * (2 if setup.fused else 0 if setup.remat == "minimal" else 1)
    products = 2 + (7 if setup.fused else 5) * trains + repeated
    tokens = setup.tokens * setup.accumulate
    width = model.heads * model.head_dim / setup.size("tensor")
    return products * 2 * tokens * T * share * width * setup.depth


def _traffic(setup: Setup, own: float, whole: float, passes: float) -> float:
    """Return the bytes of HBM traffic on one device per step.

    Weights are read in each pass. Activations are written and read. The training state is updated once per step. A
    forward pass of plain attention writes and reads the scores twice. A backward pass writes and reads the scores four
    times.
    """
    D, F, heads = widths(setup)
    weights = passes * setup.accumulate * setup.item_bytes * whole * 2
    a_token = setup.item_bytes * (10 * D + 6 * F + 3 * heads) * setup.depth * passes
    projection = setup.model.vocab_size * setup.model.d_model / setup.size("tensor")
    head = 3 * setup.accumulate * (setup.item_bytes + 4) * projection if setup.model.head_kind.vocabulary else 0.0
    state = 32.0 * own * setup.trained if setup.optimizer else 0.0
    if setup.accumulate > 1:  # gradients are added to those of earlier microbatches: two read, one written
        state += 12.0 * own * setup.trained * setup.accumulate
    seen = scores(setup) / 3 * setup.size("context") * setup.accumulate * setup.depth
    return weights + a_token * setup.tokens * setup.accumulate + head + state + 4 * passes * seen


def _collectives(setup: Setup, whole: float, trains: bool, recomputes: bool) -> list[Collective]:
    model, item = setup.model, setup.item_bytes
    D, _, heads = widths(setup)
    found: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], payload: float, count: float, hidden: float) -> None:
        names = [a for a in axes if setup.size(a) > 1]
        n = setup.size(*names)
        if n < 2 or not payload or not count:
            return
        sent = payload * {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        found.append(Collective(kind, sent, ",".join(names), count, count * hidden, payload, sent * hidden))

    layers, pieces = setup.depth, setup.accumulate
    projection = model.vocab_size * D / setup.size("tensor") if model.head_kind.vocabulary else 0.0
    shards = ("fsdp", "context")
    # The next layer's weights are gathered while this layer computes; nothing hides the projection's gather.
    # The backward pass uses the weights that its recomputation gathered.
    uses = 1 + trains
    add("all-gather", shards, uses * pieces * item * whole, uses * pieces * layers, 0.9)
    add("all-gather", shards, pieces * item * projection, pieces, 0.0)
    if trains:
        add("reduce-scatter", shards, pieces * item * whole * setup.trained, pieces * layers, 0.9)
        # Over data, each microbatch's gradients are summed in the compute type as soon as they exist. The table's are
        # summed once, in float32 if XLA does the lookup (`llmctl.model.embedding_lookup`).
        own, wide = entries(model, setup.mesh), item if setup.size(*shards) > 1 else 4.0
        add("all-reduce", ("data",), item * own.layers * setup.trained * pieces, pieces * layers, 0.0)
        add("all-reduce", ("data",), wide * own.table * setup.trained, 1, 0.0)
        add("all-reduce", ("data", *shards), item * projection * pieces * setup.trained, pieces, 0.0)
    # Embeddings: devices exchange columns of tokens, or gather the table and scatter its gradient.
    passes, table = pieces * (1 + trains), model.vocab_size / setup.size("tensor")
    if setup.tokens < table:
        add("all-to-all", shards, passes * item * D * setup.tokens, passes, 0.0)
    else:
        add("all-gather", shards, passes * item * D * table, passes, 0.0)
    # After attention and after the feed-forward layer, forward and backward; recomputation repeats only the first.
    halves = 2 * (1 + trains) + (recomputes and setup.remat in REPEATS_PRODUCTS)
    stream = item * D * setup.tokens
    add("all-reduce", ("tensor",), halves * pieces * layers * stream, halves * pieces * layers, 0.0)
    # Keys and values pass around the ring once per pass, plus one unused block that a recomputation leaves out. The
    # backward pass also sends their float32 gradients.
    ring = setup.size("context")
    sends = (ring * (1 + 3 * trains) + (ring - 1) * (recomputes and setup.remat in REPEATS_PRODUCTS)) * pieces * layers
    keys = heads - model.heads * model.head_dim / setup.size("tensor")
    add("collective-permute", ("context",), sends * item * keys * setup.tokens, sends, 0.9)
    return found
