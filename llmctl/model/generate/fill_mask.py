"""Fill masks in texts with an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.base import with_article
from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.base import MASK, Tokenizer
from llmctl.data.tokenizers.vocabulary import Vocabulary
from llmctl.model import functional
from llmctl.model.config import ModelConfig

ROUND = 32
"""Multiple to which lengths in tokens are rounded up, so that programs are compiled for few lengths."""


@dataclass(frozen=True)
class Filled:
    """Store one text and the predictions for its masks."""

    prompt: str
    text: str
    """Text with the most probable token at every mask. Each mask is predicted independently of the others."""
    masks: list[list[tuple[str, float]]]
    """Most probable tokens of every mask, as pairs (text, probability), best first."""


class Filler:
    """Predict masked tokens with an encoder. One program is compiled per sequence length."""

    def __init__(self, model: ModelConfig, params: Any, tokenizer: Tokenizer, dtype: Any = jnp.float32):
        """Store the model and the tokenizer, and wrap the prediction function in `jax.jit`.

        Raises:
            RequestError: If the model or the tokenizer cannot fill masks.
        """
        if model.architecture != "encoder" or not model.head_kind.vocabulary:
            raise RequestError(f"{with_article(model.architecture)} with the head {model.head!r} does not fill masks")
        if tokenizer.mask_id is None:
            raise RequestError("the tokenizer has no mask token")
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self._pieces = tokenizer.pieces()
        special_V = Vocabulary(tokenizer).special
        never_V = np.full(model.vocab_size, -np.inf, np.float32)  # the table may have rows without a token
        never_V[: len(special_V)][~special_V] = 0

        def likeliest(params: Any, batch: dict[str, jax.Array], places_P: jax.Array, k: int) -> Any:
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            logits_PV = functional.lm_logits(model, params, x_BTD[0, places_P], dtype)
            return jax.lax.top_k(jax.nn.softmax(logits_PV + never_V, axis=-1), k)

        self._likeliest = jax.jit(likeliest, static_argnames="k")

    def fill(self, prompts: Sequence[str], k: int = 5) -> list[Filled]:
        """Predict the `k` most probable tokens for every `<mask>` of every text.

        Raises:
            RequestError: If a text has no mask or exceeds the model's maximum sequence length.
        """
        return [self._one(prompt, k) for prompt in prompts]

    def _one(self, prompt: str, k: int) -> Filled:
        tokenizer = self.tokenizer
        ids = tokenizer.template.row(tokenizer.encode_masked(prompt)).tolist()
        places = [i for i, token in enumerate(ids) if token == tokenizer.mask_id]
        if not places:
            raise RequestError(f"{prompt!r}: has no {MASK}; an encoder fills masks")
        if len(ids) > self.model.max_seq_len:
            raise RequestError(
                f"{len(ids)} tokens are more than the model's longest sequence ({self.model.max_seq_len})"
            )
        T = min(-(-len(ids) // ROUND) * ROUND, self.model.max_seq_len)
        tokens_1T = np.full((1, T), tokenizer.pad_id, np.int32)
        tokens_1T[0, : len(ids)] = ids
        segments_1T = (np.arange(T) < len(ids)).astype(np.int32)[None]
        batch = {"tokens": tokens_1T, "segments": segments_1T, "positions": np.arange(T, dtype=np.int32) * segments_1T}
        p_Pk, token_Pk = map(
            np.asarray, self._likeliest(self.params, batch, np.array(places), min(k, self.model.vocab_size))
        )
        for place, best in zip(places, token_Pk[:, 0], strict=True):
            ids[place] = int(best)
        found = [
            [(self._pieces[int(t)].strip() or self._pieces[int(t)], float(p)) for t, p in zip(tokens, ps, strict=True)]
            for tokens, ps in zip(token_Pk, p_Pk, strict=True)
        ]
        return Filled(prompt, tokenizer.decode(ids), found)
