"""Measure how much of its training text a model repeats: extraction by prompts of increasing length.

The prompt of a sequence is the k tokens before its last m tokens. The sequence is extractable if the greedy
continuation of the prompt equals these m tokens (Carlini et al., 2023, arXiv:2202.07646; Carlini et al., 2021,
arXiv:2012.07805). Held-out text is measured in the same way. A match there is due to chance, or to text that both
splits share. All prompt lengths have the same continuations, so their results can be compared.

The common run is the length of the longest sequence of tokens that the generated and the true continuation share.

Shapes: N sequences, L tokens per sequence, m tokens per continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.harm.settings import MemorizationConfig
from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer
from llmctl.model.generate.continuations import Continuation, end_ids

DOCUMENTS = 8
"""Maximum number of documents to tokenize per requested sequence."""


def measure(title: str, artifact: Artifact, held: Held, setup: Setup, settings: MemorizationConfig) -> Measured:
    """Continue prompts from training text and held-out text, and compare with the true continuations.

    Args:
        title: Title of the result.
        artifact: A decoder.
        held: Held-out examples, and the train split of the same data.
        setup: Batch size and dtype.
        settings: Settings of the probe.

    Raises:
        RequestError: If the measured split is the train split, or if all documents of a split are too short.
    """
    if held.split == "train" or held.training is None:
        raise RequestError("memorization: the train split is compared with a held-out split; set split to test")
    words, m = tokenizers.load(artifact.tokenizer_dir), settings.continuation
    length = settings.prompts[-1] + m
    if (whole := len(words.begin) + length) > artifact.model.max_seq_len:
        raise RequestError(
            f"memorization: a prompt of {settings.prompts[-1]} tokens after {len(words.begin)} first tokens, and its "
            f"continuation, are {whole} tokens, and the model reads {artifact.model.max_seq_len}; lower "
            "memorization.prompts or memorization.continuation"
        )
    texts = {"train": held.training, held.split: held.examples}
    rows = {
        name: sequences(some, words, length, settings.sequences, settings.seed, name) for name, some in texts.items()
    }
    how: dict[str, Any] = {"seq_len": artifact.model.max_seq_len, "batch_size": setup.batch_size, "dtype": setup.dtype}
    ends = end_ids(artifact.tokenizer_dir, words)
    write = Writer(artifact.model, words, GenerationConfig(max_new=m), ends=ends, **how)
    write.hold(artifact.params)
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for name, row_NL in rows.items():
        truth_Nm = row_NL[:, -m:]
        found[name] = {}
        for k in settings.prompts:
            prompts = [Continuation("", [*words.begin, *ids]) for ids in row_NL[:, -m - k : -m].tolist()]
            write.fill(prompts)
            found[name][k] = agreement(truth_Nm, [row.ids for row in prompts])
    by_length = {
        str(k): _summary(found["train"][k], "") | _summary(found[held.split][k], "control_") for k in settings.prompts
    }
    exact_N, run_N = found["train"][settings.prompts[-1]]
    counts = {name: len(row_NL) for name, row_NL in rows.items()}
    metrics: dict[str, Any] = by_length[str(settings.prompts[-1])] | {
        "by_prompt_tokens": by_length, "sequences": counts["train"], "control_sequences": counts[held.split],
    }  # fmt: skip
    lengths = ", ".join(map(str, settings.prompts))
    protocol = (
        f"{counts['train']} sequences of the train split and {counts[held.split]} of the {held.split} split, seed "
        f"{settings.seed}; {m} greedy tokens after prompts of {lengths} tokens, {setup.dtype}"
    )
    return Measured(title, protocol, metrics, values={"extracted": exact_N, "common_run": run_N})


def sequences(examples: Examples, tokenizer: Tokenizer, length: int, count: int, seed: int, split: str) -> np.ndarray:
    """Return sequences of consecutive tokens from documents, int32 [N, L].

    All positions at which a sequence fits into a document are equally likely. A position is chosen at most once.

    Args:
        examples: Documents, or prompts with their completions.
        tokenizer: Tokenizer of the model.
        length: Number of tokens L per sequence.
        count: Maximum number N of sequences.
        seed: Seed of the choice.
        split: Name of the split, for error messages.

    Raises:
        RequestError: If all documents are shorter than a sequence.
    """
    some = examples.sample(DOCUMENTS * count)
    documents = tokenizer.encode_batch(list(_texts(some)))
    starts_D = np.array([max(len(ids) - length + 1, 0) for ids in documents])
    ends_D = np.cumsum(starts_D)
    if not len(ends_D) or not ends_D[-1]:
        longest = max(map(len, documents), default=0)
        raise RequestError(
            f"memorization: prompt and continuation have {length} tokens, and the longest document of the {split} "
            f"split {longest}; lower memorization.prompts or memorization.continuation"
        )
    rng = np.random.default_rng(seed)
    chosen_N = np.sort(rng.choice(ends_D[-1], min(count, int(ends_D[-1])), replace=False))
    document_N = np.searchsorted(ends_D, chosen_N, "right")
    first_N = chosen_N - (ends_D - starts_D)[document_N]
    return np.array([documents[d][at : at + length] for d, at in zip(document_N, first_N, strict=True)], np.int32)


def agreement(truth_Nm: np.ndarray, generated: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Compare generated continuations with the true continuations.

    Args:
        truth_Nm: True tokens.
        generated: Generated tokens of each sequence, at most m.

    Returns:
        Two arrays: whether all m tokens of a sequence are equal, bool [N], and the length of its common run, int [N].
    """
    exact = [list(ids) == truth.tolist() for truth, ids in zip(truth_Nm, generated, strict=True)]
    runs = [common_run(truth.tolist(), ids) for truth, ids in zip(truth_Nm, generated, strict=True)]
    return np.array(exact, bool), np.array(runs, np.int64)


def common_run(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest sequence of consecutive tokens that both sequences contain.

    Example:
        >>> common_run([1, 2, 3, 4], [9, 2, 3, 8, 4])
        2
    """
    longest, before_m = 0, np.zeros(len(other) + 1, np.int64)
    for token in one:
        now_m = np.zeros_like(before_m)
        now_m[1:] = np.where(np.asarray(other, np.int64) == token, before_m[:-1] + 1, 0)
        longest, before_m = max(longest, int(now_m.max())), now_m
    return longest


def _summary(found: tuple[np.ndarray, np.ndarray], prefix: str) -> dict[str, float]:
    """Return metrics whose names begin with `prefix`, from the arrays that `agreement` returned.

    The metrics are the mean common run, and the fraction of continuations that equal the true continuation. The
    fraction has Wilson's interval.
    """
    exact_N, run_N = found
    low, high = wilson_interval(int(exact_N.sum()), len(exact_N))
    metrics = {"extracted": float(exact_N.mean()), "extracted_low": low, "extracted_high": high}
    return {f"{prefix}{name}": value for name, value in (metrics | {"common_run": float(run_N.mean())}).items()}


def _texts(examples: Examples) -> Any:
    """Return the texts of documents. If the examples have completions, return each prompt with its completion."""
    if "completion" not in examples.columns:
        return examples.texts()
    return (p + c for p, c in zip(examples.texts("prompt"), examples.texts("completion"), strict=True))
