"""What a conversation leaves in the cache: keys and values of tokens that its next turn has not to read again.

A prompt that goes on from another has its tokens at other slots, for its padding on the left is another; the cache is
moved there, and from the first chunk of slots on that holds something new it is read as if alone. Keys hold positions
that count from the first token, so what was moved is what would have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


class Memory:
    """Of one conversation. A turn takes the cache and leaves it longer; one that was broken off leaves none."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._pad, self._cache = 0, None
        self.known = 0
        """Slots of the last prompt that were not read again."""

    def recall(self, prompt: Sequence[int], width: int, slots: int, multiple: int) -> tuple[int, Any]:
        """(slots that are known, the cache that holds them or None) of a prompt that ends at slot `width`.

        The first is a multiple of `multiple`, so that few lengths compile. The last token is always read: what
        follows it is in no cache. What a template writes otherwise than the model saw it is read again from there on.
        """
        cache, self._cache = self._cache, None
        pad, most = width - len(prompt), min(len(self._ids), len(prompt) - 1)
        same = next((i for i in range(most) if self._ids[i] != prompt[i]), most)
        self.known = (pad + same) // multiple * multiple if cache and same else 0
        return self.known, _moved(cache, pad - self._pad, slots) if self.known else None

    def keep(self, ids: list[int], pad: int, cache: Any) -> None:
        """The cache holds these tokens, from slot `pad` on."""
        self._ids, self._pad, self._cache = ids, pad, cache


@partial(jax.jit, static_argnums=2)
def _moved(cache: Any, by: int, slots: int) -> Any:
    """A cache of `slots` with everything `by` slots further on; what leaves one end is at the other, and unread."""

    def one(a: jax.Array) -> jax.Array:
        more = max(slots - a.shape[-2], 0)
        longer = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, more), (0, 0)])
        return jnp.roll(longer, by, axis=-2)[..., :slots, :]

    return jax.tree.map(one, cache)
