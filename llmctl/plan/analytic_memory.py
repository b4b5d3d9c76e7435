"""Memory of a step from config and mesh alone: arithmetic, no compiler and no arrays.

It follows what XLA keeps: the state (arguments), what the forward scan saves of every layer, and the fullest of three
moments: the loss, with the output projection whole on every device; the backward pass of the layer that runs first,
beside the gradients of all; the update. `recipes/bench/plan_model.md` holds it against compiled programs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmctl.config.settings import OptimConfig, TrainConfig
from llmctl.model import flops
from llmctl.model.config import ModelConfig

ITEM = {"float32": 4, "bfloat16": 2}
AXES = ("pipeline", "data", "fsdp", "context", "tensor")
LOGITS = 16 * 2**20
"""Bytes of the float32 logits that a chunk of the loss makes (`llmctl.model.chunked_loss.CHUNK_BYTES`)."""
MOMENTS = {"adamw": 2.0, "sgd": 1.0, "lion": 1.0, "adafactor": 0.0, "muon": 1.0}
"""Float32 arrays of the optimizer beside a matrix of a layer; muon leaves the rest to AdamW."""
AGAIN = ("full", "qkv")
"""Recomputations that repeat matrix products."""
FACTORED_FROM = 128
"""As `llmctl.train.optim` has it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parameters: float
    optimizer: float
    temporaries: float
    """Gradients, activations and what lives between operations."""
    batch: float
    cache: float
    """Keys and values, or calibration statistics."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.optimizer + self.temporaries + self.batch + self.cache


@dataclass(frozen=True)
class Setup:
    """A step to be estimated."""

    model: ModelConfig
    mesh: Mapping[str, int]
    """Axis -> size; axes that are not there are 1."""
    rows: int
    """Sequences a step, over all devices and microbatches."""
    seq_len: int
    """Tokens of one, of an encoder's where there is one."""
    dtype: str = "bfloat16"
    """Compute type."""
    remat: str = "none"
    accumulate: int = 1
    optimizer: str = ""
    """Empty: nothing is trained."""
    ema: bool = False
    trained: float = 1.0
    """Share of the parameters that is trained (LoRA's pairs: entries over the model's)."""
    stored: float = 0.0
    """Bytes held besides, a parameter of the model: a frozen base, a teacher; without training the model itself."""
    fused: bool = True
    """The platform's attention kernel, which holds no scores."""
    eight: Mapping[str, float] = field(default_factory=dict)
    """Share of the layers' products that are in 8 bits, by type: int8, float8."""
    beside: float = 0.0
    """Operations of a step, over all devices, of what runs beside the model (a teacher)."""
    cached: int = 0
    """Tokens a row in the cache of keys and values."""
    predicted: float = 1.0
    """Share of the tokens that the output projection runs over."""
    written: int = 0
    """Tokens a sequence of the decoder beside an encoder, where they are others."""
    hessians: bool = False
    """Whether calibration keeps the second moments [I, I] of every matrix's input, of one layer."""

    def size(self, *axes: str) -> int:
        """Devices along these axes."""
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    @property
    def item(self) -> int:
        """Bytes a number of activations."""
        return ITEM[self.dtype]

    @property
    def own_rows(self) -> float:
        """Sequences of one device and one microbatch."""
        return self.rows / self.accumulate / self.size("data", "fsdp")

    @property
    def last(self) -> float:
        """Tokens of one device and one microbatch, in the stack that runs last."""
        return self.own_rows * (self.written or self.seq_len) / self.size("context")

    @property
    def tokens(self) -> float:
        """Tokens of one device and one microbatch, on average over the layers."""
        first, layers = self.model.encoder_layers, self.model.layers
        read = self.own_rows * self.seq_len / self.size("context")
        return (first * read + layers * self.last) / (first + layers) if self.written else read

    @property
    def depth(self) -> float:
        """Layers of one device, both stacks."""
        return (self.model.layers + self.model.encoder_layers) / self.size("pipeline")


def of_training(model: ModelConfig, train: TrainConfig, optim: OptimConfig, mesh: Mapping[str, int]) -> Setup:
    """The step of `pretrain` or a full `finetune`; `replace` fields for LoRA, a teacher or the plain attention."""
    return Setup(
        model=model, mesh=mesh, rows=train.batch_size, seq_len=train.seq_len, dtype=train.dtype, remat=train.remat,
        accumulate=train.accumulate, optimizer=optim.name, ema=bool(optim.ema),
        fused=has_kernel(model, train.attention, mesh),
    )  # fmt: skip


def has_kernel(model: ModelConfig, attention: str, mesh: Mapping[str, int]) -> bool:
    """Return whether attention may run in the platform's kernel."""
    return attention == "auto" and model.positions != "relative" and mesh.get("context", 1) == 1


@dataclass(frozen=True)
class Entries:
    """Parameters of one device."""

    layers: float
    """Matrices of the layers."""
    table: float
    """Input embeddings."""
    head: float
    """Output projection of its own; 0 where it is the table."""
    rest: float
    """Norms and biases, whole everywhere, and tables of positions."""

    @property
    def total(self) -> float:
        """All."""
        return self.layers + self.table + self.head + self.rest


def entries(model: ModelConfig, size: Mapping[str, int]) -> Entries:
    """What a device of a mesh holds: fsdp, context and tensor split every matrix, pipeline the layers."""
    found = flops.parameters(model)
    ways = math.prod(size.get(a, 1) for a in ("fsdp", "context", "tensor"))
    matrices = model.layers * flops._matrices(model, cross=model.encoder_layers > 0)
    matrices += model.encoder_layers * flops._matrices(model)
    table = model.vocab_size * model.d_model
    head = table if model.head == "lm" and not model.tied else 0
    rest = found["total"] - matrices - table - head
    rows = model.token_types + (model.max_seq_len + model.position_offset) * (model.positions == "learned")
    pooled = model.pooler and model.head not in ("tokens", "span") and (model.head != "lm" or model.next_sentence)
    squares = pooled + (model.head == "lm" and model.head_transform)
    wide = model.d_model * (rows + model.d_model * squares)
    residual = size.get("fsdp", 1) * size.get("context", 1)  # what is as wide as the residual stream, but no matrix
    rest += wide / residual - wide
    return Entries(matrices / ways / size.get("pipeline", 1), table / ways, head / ways, rest)


def estimate(setup: Setup) -> Memory:
    """Bytes of one device at the fullest moment of a step."""
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
    """Adafactor: a row and a column of statistics of a matrix whose sides are long enough, else all of it."""
    model = setup.model
    D, F = model.d_model, model.d_ff
    sides = [(D, model.heads * model.head_dim)] * 2 + [(D, model.kv_heads * model.head_dim)] * 2
    sides += [(D, F)] * (3 if model.gated else 2)
    layer = sum(i + o if min(i, o) >= FACTORED_FROM else i * o for i, o in sides) / sum(i * o for i, o in sides)
    table = 1 / D + 1 / model.vocab_size
    return 4.0 * (own.layers * layer + (own.table + own.head) * table + own.rest)


def widths(setup: Setup) -> tuple[float, float, float]:
    """Numbers a token of one device: (residual stream, a feed-forward activation, queries, keys and values)."""
    model, tensor = setup.model, setup.size("tensor")
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    return float(model.d_model), model.d_ff / tensor, heads / tensor


def saved(setup: Setup) -> float:
    """Bytes that the forward pass keeps of one layer for the backward pass."""
    D, F, heads = widths(setup)
    ffs, item = (2 if setup.model.gated else 1), setup.item
    queries = setup.model.heads * setup.model.head_dim / setup.size("tensor")
    if setup.remat in ("full", "offload"):  # its input; the rest of what "minimal" keeps waits in the host's memory
        numbers = item * D
    elif setup.remat == "qkv":
        numbers = item * (D + heads)
    elif setup.remat == "minimal":  # and what the products made, but the last one, which nothing reads again
        numbers = item * (D + heads + D + ffs * F)
        if not setup.fused:  # the plain form's backward pass finds its result as well, and two numbers a head
            numbers += item * queries + 8.0 * setup.model.heads / setup.size("tensor")
    else:  # norms in float32 as well, what is multiplied, and the steps of the activation
        numbers = 4 * 3 * D + item * (3 * D + 2 * heads + queries + (ffs + 2) * F) + 4.0
    return numbers * setup.tokens + (0.0 if setup.remat != "none" else scores(setup) / 3)


def scores(setup: Setup) -> float:
    """Bytes of attention's scores where no kernel hides them: probabilities, their gradient and a copy, float32.

    Around a ring a device sees its own queries against one device's keys at a time.
    """
    if setup.fused:
        return 0.0
    length = setup.seq_len / setup.size("context")
    return 3 * 4.0 * setup.own_rows * setup.model.heads / setup.size("tensor") * length**2


def training(setup: Setup, own: Entries) -> float:
    """Temporary bytes of a training step."""
    D, F, heads = widths(setup)
    queries = setup.model.heads * setup.model.head_dim / setup.size("tensor")
    unit = setup.item * setup.tokens
    kept = setup.depth * saved(setup)
    copies = setup.item * own.layers if setup.item < 4 else 0.0  # of the matrices, in the compute type
    projection = setup.model.vocab_size * setup.model.d_model / setup.size("tensor") if setup.model.head == "lm" else 0
    gradients = 4.0 * setup.trained * (own.layers + own.table + own.head)
    sums = gradients if setup.accumulate > 1 else 0.0  # of the microbatches so far
    # The projection and its gradient, in float32, are whole while the loss is taken.
    loss = projection * (setup.item + 4.0) + 3 * unit * D + 2 * logits(setup)
    # What the last layer's backward pass has in hand: five times the residual stream and four of the feed-forward
    # activations ("minimal": without what was saved), queries, keys and values, and what attention made of them.
    layer = 5 * D + 4 * F + heads + queries if setup.remat != "minimal" else 4 * D + 2 * F + queries
    backward = gradients + unit * layer + scores(setup) + whole(setup, own)
    return kept + copies + sums + max(loss, backward)


def whole(setup: Setup, own: Entries) -> float:
    """Bytes of the gathered matrices that the backward pass of a layer holds: the one at hand.

    Those that it recomputes with it keeps for what follows: a pass gathers them once.
    """
    ways = setup.size("fsdp", "context")
    if ways == 1:
        return 0.0
    if setup.remat in AGAIN:
        kept = setup.model.d_model * widths(setup)[2] if setup.remat == "qkv" else 0.0  # whose matrices are not needed
        return setup.item * (own.layers * ways / setup.depth - kept)
    return setup.item * setup.model.d_model * setup.model.d_ff / setup.size("tensor")


def forward(setup: Setup, own: Entries) -> float:
    """Temporary bytes of a forward pass: of one layer, of the logits, and keys and values on their way to the cache."""
    gathered = setup.item * own.head * setup.size("fsdp", "context") if setup.size("fsdp", "context") > 1 else 0.0
    written = _cache(setup) if setup.seq_len > 1 else 0.0
    return layer(setup) + logits(setup) + gathered + written


def logits(setup: Setup) -> float:
    """Bytes of the float32 logits of a chunk: of a token of every row at least."""
    if setup.model.head != "lm":
        return 0.0
    a_token = 4.0 * setup.model.vocab_size / setup.size("tensor")
    return max(setup.own_rows * a_token, min(setup.last * setup.predicted * a_token, LOGITS))


def layer(setup: Setup, times: int = 1) -> float:
    """Temporary bytes of so many forward passes through a layer: scores and their probabilities where no kernel hides
    them, else two feed-forward activations; the residual stream twice; the largest matrix, where it is gathered."""
    D, F, _ = widths(setup)
    unit = setup.item * setup.tokens
    matrix = setup.item * D * F if setup.size("fsdp", "context") > 1 else 0.0
    return times * max(scores(setup) * 2 / 3, 2 * F * unit) + 2 * D * unit + matrix


def _cache(setup: Setup) -> float:
    if not setup.cached:
        return 0.0
    a_token = flops.kv_cache(setup.model, setup.item)
    return setup.rows * setup.cached * a_token / setup.size("data", "fsdp", "tensor")


def _statistics(setup: Setup) -> float:
    """Float32 second moments of the inputs of every matrix of one layer."""
    if not setup.hessians:
        return 0.0
    model = setup.model
    widths = [*[model.d_model] * (3 + (2 if model.gated else 1)), model.heads * model.head_dim, model.d_ff]
    return 4.0 * sum(w * w for w in widths)
