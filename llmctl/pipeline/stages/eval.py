"""eval: measures artifacts on held-out data. Every result carries the digest of the weights that were scored."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from llmctl.config import keyed
from llmctl.data import DataConfig, Split
from llmctl.errors import RequestError
from llmctl.settings import Dtype
from llmctl.stages import Context, StageConfig

if TYPE_CHECKING:
    from llmctl.artifact import Manifest


class Config(StageConfig):
    """Measure artifacts: accuracy, perplexity, size and speed, on the same held-out examples."""

    produces: ClassVar[bool] = False
    unkeyed: ClassVar[frozenset[str]] = frozenset({"name", "parent"})  # what is timed depends on where
    artifact_fields: ClassVar[tuple[str, ...]] = ("of",)

    kind: Literal["eval"] = "eval"
    of: list[str] = []
    """Artifacts to measure; every one before this stage by default."""
    data: DataConfig = DataConfig()
    """What to measure on."""
    split: Split = "test"
    """Which split of the data."""
    examples: int = Field(default=0, ge=0)
    """Examples to measure on at most, chosen by their hash; 0 takes all."""
    seq_len: int = Field(default=0, ge=0)
    """Tokens a text is cut to for a classifier, and the context of a prediction; 0 takes what was trained with."""
    truncate: Literal["", "tail", "head_tail"] = ""
    """What is cut from a text that is classified; empty takes what was trained with."""
    stride: int = Field(default=0, ge=0)
    """Perplexity: new tokens a window; 0 is the context, so that windows do not overlap."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences a batch; also the batch whose throughput is measured."""
    dtype: Dtype = "float32"
    """Compute type."""
    speed: bool = True
    """Measure latency (batch 1) and throughput, all artifacts in turn."""
    repeats: int = Field(default=15, ge=1)
    """Rounds of the speed measurement."""
    plot: bool = True
    """Draw accuracy against bytes (needs matplotlib, which the extra `demo` brings)."""


def run(config: Config, parent: Path | None, ctx: Context) -> None:
    """Scores `ctx.siblings` (or the parent alone) and leaves results.json, table.md and tradeoff.png in `ctx.out`."""
    from llmctl import artifact, console, mesh
    from llmctl.data import splits
    from llmctl.evaluate import measure

    chosen = dict(ctx.siblings) or ({parent.name: parent} if parent else {})
    if not chosen:
        raise RequestError("eval: nothing to measure; say --from ARTIFACT, or name artifacts in `of`")
    if config.plot:
        _can_draw()
    examples = splits.examples(config.data, config.split)
    if config.examples:
        examples = examples.sample(config.examples)
    with mesh.use(mesh.make(config.mesh)) as devices:
        results = measure.results(config, chosen, examples, devices, ctx.work / "corpus", console.say)
    write(ctx, config, results, artifact.read_manifest(list(chosen.values())[-1]))


def _can_draw() -> None:
    """Says that there will be no picture before the work, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("eval: the picture needs matplotlib: pip install 'llmctl[demo]', or say plot = false")


def write(ctx: Context, config: Config, results: list[dict[str, Any]], last: Manifest) -> None:
    """The report as an artifact without parameters; its digest is that of the results."""
    from llmctl import artifact, atomic, hosts
    from llmctl.evaluate import picture, report

    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic.writing(ctx.out) as draft:
        if not hosts.first():
            return
        (draft / "results.json").write_text(text + "\n", encoding="utf-8")
        (draft / "table.md").write_text(report.markdown(results), encoding="utf-8")
        if config.plot:
            picture.tradeoff(results, draft / "tradeoff.png")
        manifest = artifact.Manifest(
            format=artifact.FORMAT,
            name=config.name or ctx.out.name,
            stage="eval",
            key=ctx.key,
            family=last.family,
            model=last.model,
            parameters=0,
            bytes=0,
            sparsity=0.0,
            bits=0.0,
            digest=hashlib.sha256(text.encode()).hexdigest(),
            parent=artifact.Parent(name=last.name, digest=last.digest),
            config=keyed(config),
            versions=artifact.versions(),
        )
        (draft / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
