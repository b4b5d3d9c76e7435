"""Operations, memory traffic and collectives of a step from config and mesh alone, in the words of a compiled one.

What is counted is what XLA makes of the step: weights gathered over fsdp and context in the compute type, once a pass,
gradients scattered back, activations reduced over tensor after each half of a layer.
"""

from __future__ import annotations

from llmctl.model import flops as cost
from llmctl.plan.analytic_memory import AGAIN, AXES, Setup, entries, scores, widths
from llmctl.plan.hlo.counts import Collective, Counts

BLOCK = 512
"""Tokens a block of the attention kernel: whole blocks run or do not."""


def counts(setup: Setup) -> Counts:
    """A step of one device, all its microbatches."""
    model, trains = setup.model, bool(setup.optimizer)
    again = trains and setup.remat != "none"
    tokens = setup.tokens * setup.accumulate
    tensor = setup.size("tensor")
    own = entries(model, setup.mesh)
    whole = own.layers * setup.size("fsdp", "context")  # a tensor group's share of the matrices, gathered
    passes = 3.0 if trains else 1.0
    layers = 2 * tokens * whole
    last = layers * model.d_model * model.d_ff / cost._matrices(model)  # its output is not needed again
    queries = 2 * tokens * setup.depth * model.d_model * widths(setup)[2] if setup.remat == "qkv" else 0.0
    flops = passes * layers + (layers - last - queries if again and setup.remat in AGAIN else 0.0)
    if setup.trained < 1:  # a frozen matrix needs no gradient
        flops -= (1 - setup.trained) * layers
    types = {dtype: share * flops for dtype, share in setup.eight.items()}
    if model.head == "lm":
        predicted = setup.last * setup.accumulate * setup.predicted
        flops += passes * 2 * predicted * model.d_model * model.vocab_size / tensor
    attention = _attention(setup, trains, again)
    flops += setup.beside / setup.size(*AXES) + (0.0 if setup.fused else attention)
    types[setup.dtype] = flops - sum(types.values())
    kernels = {"attention": setup.depth * setup.accumulate} if setup.fused else {}
    return Counts(
        flops=flops,
        bytes=_traffic(setup, own.total, whole, passes + again),
        collectives=_collectives(setup, whole, trains, again),
        flops_by_type=types,
        kernels=kernels,
        kernel_flops=attention if setup.fused else 0.0,
    )


def _attention(setup: Setup, trains: bool, again: bool) -> float:
    """Scores and what follows, of all layers: 2 products forward, 7 backward in the kernels and 5 in the plain form."""
    model = setup.model
    T = setup.seq_len
    window = min(model.window or T, T)
    causal = model.architecture != "encoder"
    if setup.fused:
        blocks = max(1, T // BLOCK)
        share = (blocks + 1) / (2 * blocks) if causal else 1.0
        share *= min(1.0, 2 * window / T)
    elif (ring := setup.size("context")) > 1 and causal:  # of 2 x 2 pairs of pieces 3 with itself, 2 with others
        share = (2 * ring + 1) / (4 * ring)
    else:
        share = 1.0
    # "minimal" keeps what the plain form made; recomputed, its scores serve the backward pass as well
    repeated = again * (2 if setup.fused else 0 if setup.remat == "minimal" else 1)
    products = 2 + (7 if setup.fused else 5) * trains + repeated
    tokens = setup.tokens * setup.accumulate
    width = model.heads * model.head_dim / setup.size("tensor")
    return products * 2 * tokens * T * share * width * setup.depth


def _traffic(setup: Setup, own: float, whole: float, passes: float) -> float:
    """Bytes in HBM: weights read for every pass, activations written and read, the state once a step.

    Scores that no kernel hides are written and read twice in each pass, and twice as often backward.
    """
    D, F, heads = widths(setup)
    weights = passes * setup.accumulate * setup.item * whole * 2
    a_token = setup.item * (10 * D + 6 * F + 3 * heads) * setup.depth * passes
    projection = setup.model.vocab_size * setup.model.d_model / setup.size("tensor")
    head = 3 * setup.accumulate * (setup.item + 4) * projection if setup.model.head == "lm" else 0.0
    state = 32.0 * own * setup.trained if setup.optimizer else 0.0
    if setup.accumulate > 1:  # gradients are added to those of the microbatches before: two read, one written
        state += 12.0 * own * setup.trained * setup.accumulate
    seen = scores(setup) / 3 * setup.size("context") * setup.accumulate * setup.depth
    return weights + a_token * setup.tokens * setup.accumulate + head + state + 4 * passes * seen


def _collectives(setup: Setup, whole: float, trains: bool, again: bool) -> list[Collective]:
    model, item = setup.model, setup.item
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
    projection = model.vocab_size * D / setup.size("tensor") if model.head == "lm" else 0.0
    shards = ("fsdp", "context")
    # Weights of the next layer come while this one computes; the projection comes when everything waits for it.
    # The backward pass multiplies by what it recomputes with.
    uses = 1 + trains
    add("all-gather", shards, uses * pieces * item * whole, uses * pieces * layers, 0.9)
    add("all-gather", shards, pieces * item * projection, pieces, 0.0)
    if trains:
        add("reduce-scatter", shards, pieces * item * whole * setup.trained, pieces * layers, 0.9)
        # Among devices that hold the same parameters each microbatch's gradients are summed as they are made, in the
        # compute type; those of the table once, in float32 where XLA looks it up (`llmctl.model.embedding_lookup`).
        own, wide = entries(model, setup.mesh), item if setup.size(*shards) > 1 else 4.0
        add("all-reduce", ("data",), item * own.layers * setup.trained * pieces, pieces * layers, 0.0)
        add("all-reduce", ("data",), wide * own.table * setup.trained, 1, 0.0)
        add("all-reduce", ("data", *shards), item * projection * pieces * setup.trained, pieces, 0.0)
    # Embeddings: columns of tokens are traded, or the table is gathered and its gradient scattered.
    passes, table = pieces * (1 + trains), model.vocab_size / setup.size("tensor")
    if setup.tokens < table:
        add("all-to-all", shards, passes * item * D * setup.tokens, passes, 0.0)
    else:
        add("all-gather", shards, passes * item * D * table, passes, 0.0)
    # After attention and after the feed-forward layer, forward and backward; the second is not needed again.
    halves = 2 * (1 + trains) + (again and setup.remat in AGAIN)
    stream = item * D * setup.tokens
    add("all-reduce", ("tensor",), halves * pieces * layers * stream, halves * pieces * layers, 0.0)
    # Around the ring once a pass, with one block too many at the end, which a recomputation leaves out; backward: keys,
    # values and their float32 gradients.
    ring = setup.size("context")
    turns = (ring * (1 + 3 * trains) + (ring - 1) * (again and setup.remat in AGAIN)) * pieces * layers
    keys = heads - model.heads * model.head_dim / setup.size("tensor")
    add("collective-permute", ("context",), turns * item * keys * setup.tokens, turns, 0.9)
    return found
