"""Measure the toxicity of a model's continuations, without and with the output filter.

Several continuations of each prompt are sampled and judged (Gehman et al., 2020, arXiv:2009.11462). The toxicity of a
continuation is 1 if it has a word of the judge's list. Otherwise it is the classifier's probability of the harmful
classes. Expected maximum toxicity is the mean over prompts of the largest toxicity. Toxicity probability is the
fraction of prompts with at least one continuation that is harmful according to the judge.

Shapes: N prompts, K continuations per prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.artifacts import artifact as artifacts
from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data import paths, prompt_files
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.harm import detector
from llmctl.evaluate.harm.detector import Detector, Finding
from llmctl.evaluate.harm.output_filter import Filtered, OutputFilter, attempt_seed
from llmctl.evaluate.harm.settings import FilterConfig, HarmConfig, ToxicityConfig
from llmctl.evaluate.metrics.classification import wilson_interval
from llmctl.evaluate.metrics.resampling import interval, resamples
from llmctl.evaluate.setup import Measured, Setup
from llmctl.evaluate.stored import identity
from llmctl.evaluate.tasks.predictions import short
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer
from llmctl.model.generate.continuations import end_ids
from llmctl.model.generate.sampling import Sampling

RESAMPLES = 2000
"""Number of bootstrap resamples of the prompts for the interval of a mean."""


def check(settings: ToxicityConfig) -> None:
    """Check the settings, and that the prompts, the lists and the classifiers can be read.

    Raises:
        RequestError: If a file or setting is missing or invalid.
    """
    if not settings.prompts:
        raise RequestError("toxicity.prompts: name a file with one prompt per line")
    if not settings.judge.active:
        raise RequestError("toxicity.judge: name a list in toxicity.judge.words, or a toxicity.judge.classifier")
    for name in ("prompts", "benign"):
        _prompts(settings, name)
    detector.check(settings.judge, "toxicity.judge")
    if settings.filter.active:
        detector.check(settings.filter, "toxicity.filter")
    if settings.filter.action == "resample" and not settings.temperature:
        raise RequestError("toxicity.filter.action: a resample at temperature 0 is the same text; raise it")
    if settings.benign and not settings.filter.active:
        raise RequestError("toxicity.benign: its continuations are filtered; name a list or classifier in the filter")


def definition(settings: ToxicityConfig) -> Any:
    """Return JSON data that determines the result: the settings without paths, and the digests of all files."""

    def own(config: HarmConfig) -> Any:
        return [config.model_dump(exclude={"words", "classifier"}), _digest(config.words), _classifier(config)]

    values = settings.model_dump(exclude={"prompts", "benign", "judge", "filter"})
    filtered = own(settings.filter) if settings.filter.active else None
    return [values, *(_prompts(settings, name) for name in ("prompts", "benign")), own(settings.judge), filtered]


def measure(title: str, artifact: Artifact, setup: Setup, settings: ToxicityConfig) -> Measured:
    """Sample and judge continuations, and measure the filter if there is one.

    Args:
        title: Title of the result.
        artifact: Model that generates.
        setup: Maximum number of tokens per prompt, batch size and dtype.
        settings: Settings of the probe.
    """
    sampler, judge = Sampler(artifact, setup, settings), Detector(settings.judge, "toxicity.judge")
    prompts = _prompts(settings, "prompts")
    texts = sampler(prompts)
    cut = sampler.cut
    found = judge(texts)
    metrics, values = scores(found, len(prompts), settings.seed)
    filtered = [Filtered(text) for text in texts]
    if settings.filter.active:
        output_filter = OutputFilter(settings.filter, "toxicity.filter")
        filtered = output_filter(texts, sampler.again(prompts))
        after = judge([one.text for one in filtered])
        more, more_values = scores(after, len(prompts), settings.seed)
        metrics |= {f"filtered_{name}": value for name, value in more.items()}
        values |= {f"filtered_{name}": value for name, value in more_values.items()}
        values["filtered"] = _changed(filtered, len(prompts))
        metrics |= _mean("filtered", values["filtered"], settings.seed)
        if settings.benign:
            benign = _prompts(settings, "benign")
            kept = output_filter(sampler(benign), sampler.again(benign))
            metrics |= _mean("false_refusals", _changed(kept, len(benign)), settings.seed)
            metrics["benign_prompts"] = len(benign)
    metrics |= {"prompts": len(prompts)}
    return Measured(
        title,
        _protocol(settings, len(prompts), cut),
        metrics,
        written=_records(prompts, texts, found, filtered),
        values=values,
    )


class Sampler:
    """Sample continuations of prompts with one model."""

    def __init__(self, artifact: Artifact, setup: Setup, settings: ToxicityConfig) -> None:
        """Load the tokenizer, and prepare the artifact's parameters for generation on one device."""
        self._settings, words = settings, tokenizers.load(artifact.tokenizer_dir)
        how: dict[str, Any] = {"seq_len": setup.seq_len, "batch_size": setup.batch_size, "dtype": setup.dtype}
        ends = end_ids(artifact.tokenizer_dir, words)
        self._write = Writer(artifact.model, words, GenerationConfig(max_new=settings.max_new), ends=ends, **how)
        self._write.hold(artifact.params)
        self._rules = Sampling(settings.temperature, top_p=settings.top_p if settings.temperature else 1.0)
        self.cut = 0
        """Number of continuations of truncated prompts in the last call."""

    def __call__(self, prompts: Sequence[str], attempt: int = 0, which: Sequence[int] | None = None) -> list[str]:
        """Return K continuations of each prompt: those of the first prompt, then those of the second, and so on.

        Args:
            prompts: Texts.
            attempt: Number of the attempt, which changes the seed.
            which: Indices of the continuations to sample; None samples all.
        """
        count = self._settings.samples
        chosen = range(len(prompts) * count) if which is None else which
        rows = self._write.rows([prompts[i // count] for i in chosen])
        self.cut, self._write.cut = self._write.cut, 0
        self._write.fill(rows, sampling=self._rules, seed=attempt_seed(self._settings.seed, attempt))
        return [row.text for row in rows]

    def again(self, prompts: Sequence[str]) -> Any:
        """Return a function that samples some continuations again, for an `OutputFilter`."""
        return lambda attempt, which: self(prompts, attempt, which)


def scores(findings: Sequence[Finding], prompts: int, seed: int = 0) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the metrics of judged continuations, and their values per prompt.

    Args:
        findings: Findings of N * K continuations. The K findings of a prompt follow each other.
        prompts: Number N of prompts.
        seed: Seed of the bootstrap.
    """
    toxicity_NK = np.array([1.0 if f.words else f.score or 0.0 for f in findings]).reshape(prompts, -1)
    harmful_NK = np.array([f.harmful for f in findings]).reshape(prompts, -1)
    any_N = harmful_NK.any(1)
    values = {"expected_max_toxicity": toxicity_NK.max(1), "toxicity_probability": any_N}
    values["toxic_fraction"] = harmful_NK.mean(1)
    low, high = wilson_interval(int(any_N.sum()), prompts)
    metrics = _mean("expected_max_toxicity", values["expected_max_toxicity"], seed)
    metrics |= {"toxicity_probability": float(any_N.mean())}
    metrics |= {"toxicity_probability_low": low, "toxicity_probability_high": high}
    return metrics | _mean("toxic_fraction", values["toxic_fraction"], seed), values


def _mean(name: str, value_N: np.ndarray, seed: int) -> dict[str, float]:
    """Return the mean of a metric over prompts, and its 95 % bootstrap interval."""
    sampled = [count_RN @ value_N / len(value_N) for count_RN in resamples(len(value_N), RESAMPLES, seed)]
    low, high = interval(np.concatenate(sampled))
    return {name: float(value_N.mean()), f"{name}_low": low, f"{name}_high": high}


def _changed(filtered: Sequence[Filtered], prompts: int) -> np.ndarray:
    """Return the fraction of each prompt's continuations that the filter changed, [N]."""
    return np.array([one.finding is not None for one in filtered], np.float64).reshape(prompts, -1).mean(1)


def _records(
    prompts: Sequence[str], texts: Sequence[str], found: Sequence[Finding], filtered: Sequence[Filtered]
) -> list[dict[str, Any]]:
    """Return a record per prompt: its most toxic continuation, with the findings and the action of the filter."""
    count, records = len(texts) // len(prompts), []
    for n, prompt in enumerate(prompts):
        i = max(range(n * count, (n + 1) * count), key=lambda i: (bool(found[i].words), found[i].score or 0.0))
        after = {"filtered": filtered[i].report()} if filtered[i].finding else {}
        records.append({"prompt": prompt, "continuation": texts[i], **found[i].reasons(), **after})
    return records


def _protocol(settings: ToxicityConfig, prompts: int, cut: int) -> str:
    """Describe the measurement in one line. `cut` is the number of continuations whose prompt was truncated."""
    rules = f"temperature {short(settings.temperature)}, top-p {short(settings.top_p)}, seed {settings.seed}"
    said = f"{prompts} prompts, {settings.samples} continuations each of at most {settings.max_new} tokens"
    said += (f" ({cut} with a truncated prompt)" if cut else "") + f", {rules}"
    said += f"; judged by {_described(settings.judge)}"
    if settings.filter.active:
        said += f"; filter: {settings.filter.action} by {_described(settings.filter)}"
    return said


def _described(config: HarmConfig | FilterConfig) -> str:
    parts = [f"the list {Path(config.words).name}"] if config.words else []
    if config.classifier:
        classes = " + ".join(config.classes)
        parts.append(f"{Path(config.classifier).name} ({classes} from {short(config.threshold)} on)")
    return " and ".join(parts)


def _prompts(settings: ToxicityConfig, name: str) -> list[str]:
    """Return the prompts of a file that a setting names; [] if the setting is empty.

    Raises:
        RequestError: If the file is missing, or has no prompt.
    """
    if not (spec := getattr(settings, name)):
        return []
    found = prompt_files.read(paths.folder(spec), f"toxicity.{name}:")
    if not found:
        raise RequestError(f"toxicity.{name}: {spec} has no prompts; write one per line")
    return found


def _digest(spec: str) -> str:
    """Return the digest of the files that `spec` names; "" if it is empty."""
    found = [path.read_bytes() for path in paths.resolve(spec)] if spec else []
    return hashlib.sha256(b"".join(found)).hexdigest() if found else ""


def _classifier(config: HarmConfig) -> str:
    return identity(artifacts.read_manifest(Path(config.classifier))) if config.classifier else ""
