"""Tasks whose answer is about places of a text: labels of words, and spans that answer questions.

Legend: B rows, T tokens a row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.examples.extractive_qa import AnswerRows
from llmctl.data.examples.token_labels import TagRows
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.metrics import classification, entities, squad
from llmctl.evaluate.setup import READ, Batch, Held, Measured, Setup, answers, first, label_map, programs
from llmctl.model import functional
from llmctl.model.losses import only

LONGEST = 200
"""Characters of an answer at most: a limit in tokens would mean something else for every tokenizer."""


def tag(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """Accuracy of word labels, and precision, recall and F1 of entities where the labels mark them."""
    model, names = artifact.model, artifact.manifest.labels
    truth_of = label_map(held.examples.classes, names, str(artifact.path))
    rows = TagRows(held.examples, tokenizers.load(artifact.tokenizer_dir), setup.seq_len, shuffle=False)

    @jax.jit
    def predict(params: functional.Params, batch: Batch) -> jax.Array:
        x_BTD = functional.hidden(model, params, batch, dtype=setup.dtype)
        return functional.outputs(model, params, x_BTD, batch, setup.dtype).argmax(-1)

    truth: list[np.ndarray] = []
    said: list[np.ndarray] = []
    for batch, said_BT in answers(predict, artifact.params, rows, setup):
        for places_T, truth_T, said_T in zip(batch["weights"] > 0, batch["targets"], said_BT, strict=True):
            truth.append(truth_of[truth_T[places_T]])
            said.append(said_T[places_T])
    confusion = classification.confusion_matrix(np.concatenate(truth), np.concatenate(said), len(names))
    scored = classification.scores(confusion, names)
    metrics = {k: scored[k] for k in ("accuracy", "macro_f1")} | {"examples": len(held.examples)}
    metrics |= {"words": rows.words, "words_cut": rows.cut}
    marks = entities.is_scheme(names)
    if marks:
        words = ([[names[i] for i in text] for text in side] for side in (truth, said))
        metrics |= entities.scores(*words)
    protocol = f"{held.split} split, {len(held.examples)} examples, labels at the first token of a word, "
    protocol += f"{rows.words - rows.cut} of {rows.words} words within {setup.seq_len} tokens, {setup.dtype}"
    protocol += ", entities exact in type and ends (conlleval)" if marks else ""
    single, batched = programs(predict, artifact.params, first(rows, setup), setup.mesh)
    units = {"examples_per_second": setup.batch_size}
    return Measured("token classification", protocol, metrics, single, batched, units)


def best_span(logits_BT2: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """(score, first character, last character + 1, score of no answer) of each row's best span, all [B].

    A span begins and ends at tokens of the context, ends no earlier than it begins and has LONGEST characters at most.
    Its score is the sum of its two logits; no answer is the first token, twice. A row without such a span scores -2e30.
    """
    start_BT, end_BT = (only(logits_BT2[..., k], batch["among"]) for k in (0, 1))
    first_BT, last_BT = batch["first"], batch["last"]
    T = first_BT.shape[1]
    length_BTT = last_BT[:, None, :] - first_BT[:, :, None]
    context_T = jnp.arange(T) > 0
    fits_BTT = (length_BTT <= LONGEST) & (jnp.arange(T)[:, None] <= jnp.arange(T)) & context_T[:, None]
    sums_BTT = jnp.where(fits_BTT, start_BT[:, :, None] + end_BT[:, None, :], -2e30)
    best_B = sums_BTT.reshape(len(sums_BTT), -1).argmax(1)
    rows_B = jnp.arange(len(best_B))
    score_B = sums_BTT.reshape(len(sums_BTT), -1)[rows_B, best_B]
    none_B = start_BT[:, 0] + end_BT[:, 0]
    return score_B, first_BT[rows_B, best_B // T], last_BT[rows_B, best_B % T], none_B


def find(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """Exact match and F1 of the best span over all windows of a context; of no answer, where the data has such."""
    model, examples = artifact.model, list(held.examples)
    rows = AnswerRows(held.examples, tokenizers.load(artifact.tokenizer_dir), setup.seq_len, shuffle=False)
    reads = (*READ, "among", "first", "last")

    @jax.jit
    def predict(params: functional.Params, batch: Batch) -> Any:
        x_BTD = functional.hidden(model, params, batch, dtype=setup.dtype)
        return best_span(functional.outputs(model, params, x_BTD, batch, setup.dtype), batch)

    N = len(examples)
    best_N, none_N, span_N2 = np.full(N, -np.inf), np.full(N, np.inf), np.zeros((N, 2), np.int64)
    for batch, found in answers(predict, artifact.params, rows, setup, reads):
        for n, score, begin, end, none in zip(batch["example"], *found, strict=True):
            none_N[n] = min(none_N[n], none)
            if score > best_N[n]:
                best_N[n], span_N2[n] = score, (begin, end)
    truth = [[text for text, _ in row["answers"]] for row in examples]
    impossible = sum(not t for t in truth)
    silent_N = (none_N > best_N) & (impossible > 0)
    said = ["" if silent_N[n] else row["context"][slice(*span_N2[n])] for n, row in enumerate(examples)]
    metrics = {
        "exact_match": float(np.mean([squad.exact(s, t) for s, t in zip(said, truth, strict=True)])),
        "answer_f1": float(np.mean([squad.f1(s, t) for s, t in zip(said, truth, strict=True)])),
        "examples": N,
        "unanswerable": impossible,
        "windows": len(rows),
    }
    protocol = f"{held.split} split, {N} questions in {len(rows)} windows of {setup.seq_len} tokens that overlap by "
    protocol += f"half, spans of at most {LONGEST} characters, SQuAD's normalization, {setup.dtype}"
    protocol += f", no answer where the first token scores more ({impossible} questions have none)" * (impossible > 0)
    single, batched = programs(predict, artifact.params, first(rows, setup, reads), setup.mesh)
    return Measured("answers", protocol, metrics, single, batched, {"examples_per_second": setup.batch_size})
