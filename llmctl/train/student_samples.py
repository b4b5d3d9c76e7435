"""Replace the completions of training batches by samples of the student, for on-policy distillation.

The teacher then scores the student's own texts (Agarwal et al., 2024, arXiv:2306.13649). Samples are generated on the
mesh of training, from the current parameters, by one compiled function. The choice of steps with samples, and all
random numbers, depend only on the seed and the step. A resumed run is therefore bit-identical to the uninterrupted run.

Shapes: B rows, T tokens per row, N new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.device_batches import DeviceBatches
from llmctl.data.shuffle import hashed
from llmctl.model import flops, functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.padded_prompts import NOTHING, Prompts, padded_ends
from llmctl.model.generate.sampling import Sampling
from llmctl.model.program import Pass, Program
from llmctl.train import fake_quantize
from llmctl.train import step as steps
from llmctl.train.job import Batch, Job, Params, joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmctl.data.tokenizers.base import Tokenizer

SAMPLES = 4
"""Constant that is folded into a run's random key. The resulting key is the key of the samples."""
STREAM = 2**40
"""Number that replaces the epoch in the hash that chooses the steps with samples. No epoch of the shuffle has this
number. The choice is therefore independent of the order of the training rows."""


def is_sampled(seed: int, step: int, fraction: float) -> bool:
    """Return whether the batch of a step is sampled from the student. `fraction` is the probability.

    >>> sum(is_sampled(0, step, 0.25) for step in range(1000))
    240
    """
    bits = int(hashed(np.array([step]), seed, STREAM)[0])
    return (bits >> 11) * 2.0**-53 < fraction


def sampled(
    model: ModelConfig,
    params: functional.Params,
    batch: Batch,
    key: jax.Array,
    *,
    ends: Sequence[int],
    pad: int,
    max_new: int,
    rules: Sampling,
    dtype: Any = jnp.float32,
) -> Batch:
    """Return the batch with completions that the model generates to the prompts of the batch.

    In a decoder, the prompt of a row ends before the first token that the loss predicts. All tokens after the prompt
    are replaced. In an encoder-decoder, the encoder's tokens are the prompt. A completion ends with an end token, after
    `max_new` tokens, or at the end of the row. Rows without a token to predict are returned unchanged.

    Args:
      model: config of the model.
      params: parameters of the model.
      batch: training batch of completions.
      key: random key.
      ends: end tokens.
      pad: padding token, with which a decoder of an encoder-decoder begins.
      max_new: maximum number of new tokens, N.
      rules: sampling rules.
      dtype: dtype of the computation.
    """
    B, T = batch["tokens"].shape
    decoder = Decoder(model, params, dtype, start=pad)
    learned_B = jnp.any(batch["weights"] > 0, axis=1)
    at_T = jnp.arange(T)
    if source := {name: a for name, a in batch.items() if name.startswith("encoder_")}:
        prompt_B, whole_BT = jnp.ones(B, jnp.int32), batch["tokens"][:, :1]
    else:
        prompt_B = jnp.argmax(batch["weights"] > 0, axis=1).astype(jnp.int32) + 1
        whole_BT = batch["tokens"]
    width = whole_BT.shape[1]
    from_BT = jnp.arange(width) - (width - prompt_B[:, None])  # prompts are padded on the left
    inside_BT = from_BT >= 0
    tokens_BT = jnp.where(inside_BT, jnp.take_along_axis(whole_BT, jnp.maximum(from_BT, 0), axis=1), 0)
    prompts = Prompts(tokens_BT, inside_BT.astype(jnp.int32), source)
    keys_B, ends_E = jax.random.split(key, B), jnp.asarray(padded_ends(ends))
    state = decoder.first(decoder.weights, prompts, keys_B, ends_E, width + max_new, rules)

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        n, state, new_BN = carry
        state = decoder.one(decoder.weights, state, keys_B, ends_E, rules)
        return n + 1, state, jax.lax.dynamic_update_slice(new_BN, state["token"][:, None], (0, n))

    new_BN = jnp.full((B, max_new), NOTHING, jnp.int32).at[:, 0].set(state["token"])
    going = lambda carry: (carry[0] < max_new) & ~jnp.all(carry[1]["done"])  # noqa: E731
    _, _, new_BN = jax.lax.while_loop(going, one, (jnp.int32(1), state, new_BN))

    count_B = jnp.minimum(jnp.sum(new_BN != NOTHING, axis=1), T + 1 - prompt_B)
    # The token at index i + 1 of prompt and completion is the target of position i.
    index_BT = at_T + 1 - prompt_B[:, None]
    made_BT = (index_BT >= 0) & (index_BT < count_B[:, None])
    new_BT = jnp.take_along_axis(new_BN, jnp.clip(index_BT, 0, max_new - 1), axis=1)
    own_BT = at_T + 1 < prompt_B[:, None]
    targets_BT = jnp.where(made_BT, new_BT, jnp.where(own_BT, batch["targets"], pad))
    segments_BT = (at_T + 1 < prompt_B[:, None] + count_B[:, None]).astype(jnp.int32)
    before_BT = jnp.concatenate([batch["tokens"][:, :1], targets_BT[:, :-1]], axis=1)
    before_BT = jnp.where(at_T < prompt_B[:, None], batch["tokens"], before_BT)
    found = {
        "tokens": jnp.where(segments_BT > 0, before_BT, pad),
        "targets": targets_BT,
        "weights": made_BT.astype(jnp.float32),
        "segments": segments_BT,
        "positions": at_T * segments_BT,
    }
    same_B1 = ~learned_B[:, None]
    return batch | {name: jnp.where(same_B1, batch[name], a.astype(batch[name].dtype)) for name, a in found.items()}


@dataclasses.dataclass(frozen=True)
class StudentSamples:
    """Generate completions with the student during a training run."""

    config: Any
    """Config of the stage `distill`."""
    model: ModelConfig
    """Config of the student."""
    mesh: jax.sharding.Mesh
    ends: Sequence[int]
    """Ids of the tokens that end a completion."""
    pad: int
    """Id of the padding token."""

    @classmethod
    def of(
        cls, config: Any, model: ModelConfig, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, ends: Sequence[int]
    ) -> StudentSamples:
        """Return the StudentSamples of a run, after a check of the mesh.

        Raises:
          RequestError: If the mesh shards sequences or layers.
        """
        for axis in ("context", "pipeline"):
            if mesh.shape[axis] > 1:
                raise RequestError(f'mode = "on_policy": generates text, and needs mesh.{axis} = 1')
        return cls(config, model, mesh, tuple(ends), tokenizer.pad_id)

    @property
    def max_new(self) -> int:
        """Return the maximum number of new tokens per row."""
        return min(self.config.answers.max_new or 64, self.config.train.seq_len)

    @property
    def rules(self) -> Sampling:
        """Return the sampling rules. The temperature is 1 by default, as in the paper."""
        answers = self.config.answers
        return Sampling(answers.temperature, answers.top_k, answers.top_p)

    def function(self, job: Job) -> Any:
        """Return a compiled function that replaces the completions of a batch by samples of the student.

        Its arguments are the job's arrays by name, the batch, and the step. It returns the batch with the samples.
        """
        train, seed = self.config.train, self.config.seed
        how: dict[str, Any] = {"ends": self.ends, "pad": self.pad, "max_new": self.max_new, "rules": self.rules}

        def run(named: Params, batch: Batch, step: jax.Array) -> Batch:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SAMPLES), step)
            params = fake_quantize.rounded(self.config.fake_quantize, joined(job, named))
            return sampled(self.model, params, batch, key, dtype=jnp.dtype(train.dtype), **how)

        return jax.jit(run)

    def attached(self, job: Job) -> Job:
        """Return the job, changed so that a fraction of the steps trains on samples of the student."""
        shapes = dataclasses.replace(job, params=jax.eval_shape(lambda: job.params), extra=dict(job.extra))
        run: Callable[..., Batch] = self.function(shapes)
        fraction, seed = self.config.on_policy_fraction, self.config.seed

        def prepare(named: Params, batch: Batch, step: int) -> Batch:
            if not is_sampled(seed, step, fraction):
                return batch
            found = run(named, batch, np.int32(step))
            return jax.device_put(found, {name: a.sharding for name, a in batch.items()})

        return dataclasses.replace(job, prepare=prepare)

    def program(self, job: Job, rows: Any) -> Program:
        """Describe the function that generates samples, for `llmctl plan`.

        Args:
          job: training job with abstract arrays.
          rows: training rows. Only the shapes of the rows are read.
        """
        train, model = self.config.train, self.model
        batch = DeviceBatches(self.mesh, train.batch_size).abstract(rows[0])
        runs = steps.program(job, train, self.config.optim, self.mesh, self.config.seed)
        named = dict(runs.state["params"]) | runs.fixed

        def trace() -> Any:
            with steps.context(self.mesh, train):
                return self.function(job).trace(named, batch, jax.ShapeDtypeStruct((), np.int32))

        T, source = batch["tokens"].shape[1], batch["encoder_tokens"].shape[1] if "encoder_tokens" in batch else 0
        read = source or T
        return Program(
            "samples of the student",
            model,
            self.mesh,
            trace,
            flops=train.batch_size * flops.row(model, self.max_new if source else T, source, self.max_new),
            tokens=train.batch_size * read,
            rows=train.batch_size,
            seq_len=read,
            dtype=train.dtype,
            steps=0 if train.epochs else round(train.steps * self.config.on_policy_fraction),
            parameters=named,
            batch=batch,
            work=Pass(attention=train.attention, predicted=self.max_new / T, written=self.max_new if source else 0),
        )
