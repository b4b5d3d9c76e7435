"""Embeddings: whether a text is nearest to its own pair among all, or two texts as near as people say.

Legend: N texts, M different candidates, D width.
"""

from __future__ import annotations

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.examples.text_pairs import TwoTextRows
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.metrics import regression
from llmctl.evaluate.setup import KEPT, READ, Batch, Held, Measured, Setup, answers, first, programs
from llmctl.model import functional
from llmctl.model.losses import reads as woven

CHUNK = 1024
"""Texts that are compared with all candidates at a time."""


def ranks(text_ND: np.ndarray, candidate_MD: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """Place of each text's own candidate by similarity, from 1; a candidate just as near counts as nearer."""
    out = []
    for a in range(0, len(text_ND), CHUNK):
        near_CM = text_ND[a : a + CHUNK] @ candidate_MD.T
        own_C1 = np.take_along_axis(near_CM, own_N[a : a + CHUNK, None], 1)
        out.append((near_CM >= own_C1).sum(1))
    return np.concatenate(out)


def scores(rank_N: np.ndarray, candidates: int) -> dict[str, float]:
    """Share of texts whose own pair is first, among the first ten, and the mean of 1 / rank; `candidates` in all."""
    return {
        "recall_at_1": float(np.mean(rank_N <= 1)),
        "recall_at_10": float(np.mean(rank_N <= 10)),
        "mrr": float(np.mean(1 / rank_N)),
        "candidates": candidates,
        "examples": len(rank_N),
    }


def embed(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """Recall of every text's pair among all pairs; with scores their correlation with the cosine."""
    model = artifact.model
    if "pair" not in held.examples.columns:
        raise RequestError(f"{artifact.path}: embeds texts, and the data has no pairs; map a second text to pair")
    tokenizer = tokenizers.load(artifact.tokenizer_dir)
    rows = TwoTextRows(held.examples, tokenizer, setup.seq_len, truncate=setup.truncate, shuffle=False)
    reads = (*READ, *(f"pair_{name}" for name in READ))

    @jax.jit
    def predict(params: functional.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch = woven(batch)
        x_BTD = functional.hidden(model, params, batch, dtype=setup.dtype)
        z_B2D = functional.outputs(model, params, x_BTD, batch, setup.dtype).reshape(-1, 2, model.d_model)
        return z_B2D[:, 0], z_B2D[:, 1]

    found = [said for _, said in answers(predict, artifact.params, rows, setup, reads)]
    text_ND, pair_ND = map(np.concatenate, zip(*found, strict=True))
    protocol = f"{held.split} split, {len(held.examples)} pairs, {KEPT[setup.truncate]} {setup.seq_len} tokens, "
    if held.examples.labels is None:
        # The same text twice is one candidate: no model can tell which is meant.
        _, first_M, own_N = np.unique(list(held.examples.texts("pair")), return_index=True, return_inverse=True)
        metrics = scores(ranks(text_ND, pair_ND[first_M], own_N), len(first_M))
        protocol += f"cosine to {len(first_M)} candidates, {setup.dtype}"
    else:
        found = regression.scores(held.examples.labels, (text_ND * pair_ND).sum(-1))
        metrics = {k: found[k] for k in ("spearman", "pearson", "examples")}
        protocol += f"cosine against the score, {setup.dtype}"
    single, batched = programs(predict, artifact.params, first(rows, setup, reads), setup.mesh)
    return Measured("embedding", protocol, metrics, single, batched, {"examples_per_second": setup.batch_size})
