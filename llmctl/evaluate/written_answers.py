"""Generate answers to prompts in validation and evaluation, with parameters that change between calls.

Prompts are sorted by length and padded to few lengths. The programs are compiled once and run on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.beam import Beams, BeamSearch
from llmctl.model.generate.continuations import Continuation, continue_rows, search_rows
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.sampling import Sampling


class Writer:
    """Generate the most likely answer to each prompt, greedily or by beam search.

    A prompt that leaves no room for the answer is truncated, as in training. A decoder reads the end of the prompt, and
    an encoder reads the beginning.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        settings: GenerationConfig,
        *,
        seq_len: int,
        batch_size: int,
        dtype: Any,
        ends: Sequence[int] = (),
    ) -> None:
        """Create a Writer for one model and its tokenizer.

        Args:
            model: Config of the model.
            tokenizer: Tokenizer of the model.
            settings: Length of the answers, number of beams, and format of the key-value cache.
            seq_len: Maximum number of tokens per prompt.
            batch_size: Number of prompts per batch.
            dtype: Compute dtype.
            ends: End tokens, at which generation stops; the tokenizer's end-of-sequence token if empty.

        Raises:
            RequestError: If the answers leave no room for a prompt within the model's maximum sequence length.
        """
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.batch_size, self.dtype, self.ends = batch_size, dtype, list(ends) or [tokenizer.eos_id]
        self.encoded = model.architecture == "encoder_decoder"
        self.room, self.max_new = lengths(model, settings, seq_len)
        self.cut = 0
        """Number of prompts that were truncated in the last call."""
        self._device = jax.local_devices()[0]
        self._decoder: Decoder | None = None
        self._search: BeamSearch | None = None

    def __call__(
        self, params: functional.Params, prompts: Sequence[str], check_stop: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Return the answer to each prompt.

        Args:
            params: Parameters of the model.
            prompts: Texts.
            check_stop: Function that is called before each batch. The function may raise an exception to stop.

        Raises:
            RequestError: If a prompt is empty and the tokenizer has no begin-of-sequence token. If the parameters are
                sharded over several processes.
        """
        self.cut = 0
        rows = self.rows(prompts)
        decoder = self.hold(params)
        self.fill(rows, check_stop)
        decoder.drop_params()
        return [row.text for row in rows]

    def hold(self, params: functional.Params) -> Decoder:
        """Set the parameters for the next calls of `fill`, and return the decoder. Compiled programs are used again.

        Raises:
            RequestError: If the parameters are sharded over several processes.
        """
        with self._alone():
            moved = jax.tree.map(lambda a: _on(self._device, a), params)
            if self._decoder is None:
                self._decoder = Decoder(
                    self.model, moved, self.dtype, start=self.tokenizer.pad_id, kv_cache=self.settings.kv_cache
                )
                if self.settings.beams > 1:
                    self._search = BeamSearch(self._decoder, Beams(self.settings.beams))
            else:
                self._decoder.set_params(moved)
        return self._decoder

    def fill(
        self,
        rows: Sequence[Continuation],
        check_stop: Callable[[], None] = lambda: None,
        *,
        max_new: int = 0,
        sampling: Sampling | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        """Generate the answer to each row, with the parameters that `hold` set.

        Args:
            rows: Prompts, as the method `rows` returns them. Each answer is stored in its prompt's row.
            check_stop: Function that is called before each batch. The function may raise an exception to stop.
            max_new: Maximum number of tokens per answer; 0 uses the maximum that the settings define.
            sampling: Sampling rules; None generates greedily or by beam search.
            seed: Seed of the sampling.
            first: Index of the first row among all rows with the same seed.

        Raises:
            ValueError: If `hold` was not called.
        """
        if self._decoder is None:
            raise ValueError("hold the parameters first")
        order = np.argsort([len(r.source_ids or r.prompt_ids) for r in rows], kind="stable")
        with self._alone():
            for begin in range(0, len(order), self.batch_size):
                check_stop()
                batch = [rows[i] for i in order[begin : begin + self.batch_size]]
                # The last batch repeats a row, so that it runs in the same programs.
                last = batch[-1]
                batch += [
                    Continuation(last.prompt, last.prompt_ids, last.stops, source_ids=last.source_ids)
                    for _ in range(self.batch_size - len(batch))
                ]
                if self._search:
                    search_rows(self._search, self.tokenizer, batch, max_new or self.max_new, ends=self.ends)
                else:
                    how: dict[str, Any] = {"ends": self.ends, "sampling": sampling, "seed": seed}
                    for _ in continue_rows(
                        self._decoder, self.tokenizer, batch, max_new or self.max_new, first=first + begin, **how
                    ):
                        pass

    def _alone(self) -> Any:
        """Return a context manager that sets a mesh of one device, because generation runs on one device."""
        return meshes.use(meshes.make(MeshConfig(data=1), [self._device]))

    def rows(self, prompts: Sequence[str]) -> list[Continuation]:
        """Return one row per prompt, with the tokens that the model reads.

        Raises:
            RequestError: If a prompt is empty and the tokenizer has no begin-of-sequence token.
        """
        words = self.tokenizer
        encoded, stops = words.encode_batch(list(prompts)), [s for s in self.settings.stops if s]
        if self.encoded:
            room = self.room - len(words.template.row([]))
            self.cut += sum(len(ids) > room for ids in encoded)
            return [
                Continuation(p, [], stops, source_ids=words.template.row(ids[:room]).tolist())
                for p, ids in zip(prompts, encoded, strict=True)
            ]
        bos = list(words.begin)
        room = self.room - len(bos)
        self.cut += sum(len(ids) > room for ids in encoded)
        rows = [
            Continuation(p, bos + ids[max(len(ids) - room, 0) :], stops)
            for p, ids in zip(prompts, encoded, strict=True)
        ]
        if not all(row.prompt_ids for row in rows):
            raise RequestError("a prompt is empty, and this tokenizer has no token to begin with; drop such rows")
        return rows


def lengths(model: ModelConfig, settings: GenerationConfig, seq_len: int) -> tuple[int, int]:
    """Return the maximum number of tokens of a prompt, and of an answer.

    Args:
        model: Config of the model.
        settings: Length of the answers.
        seq_len: Maximum number of tokens per prompt.

    Raises:
        RequestError: If the answers leave no room for a prompt within the model's maximum sequence length.
    """
    max_new = settings.max_new or min(64, model.max_seq_len // 2)
    if max_new >= model.max_seq_len:
        raise RequestError(
            f"generation.max_new: {settings.max_new} new tokens leave no room within the model's longest sequence "
            f"({model.max_seq_len})"
        )
    return min(seq_len, model.max_seq_len - (max_new if model.architecture == "decoder" else 0)), max_new


def _on(device: Any, a: jax.Array) -> jax.Array:
    """Return an array on one device. If the array is already on this device, the array is not copied."""
    if a.is_fully_replicated:
        return next((s.data for s in a.addressable_shards if s.device == device), a.addressable_shards[0].data)
    if not a.is_fully_addressable:
        raise RequestError(
            "task seq2seq: generates with all parameters on one device, and they are sharded over several processes; "
            "use mesh.data, or task lm"
        )
    return jax.device_put(a, device)
