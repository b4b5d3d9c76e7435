"""Configure every test run: 8 fake CPU devices and a persistent compilation cache. Provide fake stages."""

import gc
import os
import sys
from pathlib import Path

import pytest

# JAX reads these once, so they are set before any module imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation is most of the time of the tests, and LLVM's part is most of compilation: a gradient of a tiny decoder
# takes 3.2 CPU seconds by default and 0.3 with these flags. They change the machine code, not the program that JAX
# traces. `make test-all` compiles as users do.
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("LLMCTL_TEST_COMPILATION", CHEAP),
        "--xla_force_host_platform_device_count=8",
        # With 8 devices on 2 busy cores, a late participant is not a deadlock.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
).strip()
ROOT = Path(__file__).parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Subprocesses of tests must neither use the network nor draw progress bars.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TERM", "dumb")
# Subprocesses import this checkout from any working directory.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def pytest_collection_finish(session):
    """Leave imported modules out of garbage collections: half of the collector's time."""
    gc.freeze()


FAKE = '''
"""A stage for tests: it writes what it was told, so that a test can see what reached it."""

import hashlib
import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from llmctl.artifacts import artifact, atomic
from llmctl.config.base import Config as Section
from llmctl.config.base import keyed
from llmctl.config.errors import Interrupted
from llmctl.model.config import ModelConfig
from llmctl.pipeline.stage import StageConfig


class Source(Section):
    """Where things come from."""

    path: str = ""
    """A file."""
    columns: dict[str, str] = {}
    """A table that is a value."""

    def inputs(self):
        return [self.path] if self.path else []


class Train(Section):
    """How long."""

    unkeyed: ClassVar[frozenset[str]] = frozenset({"log_every"})

    steps: int = Field(10, ge=1)
    """Steps."""
    log_every: int = 1
    """Steps between lines."""
    bold: bool = False
    """Whether."""


class Config(StageConfig):
    """Does KIND."""

    starts: ClassVar[bool] = STARTS
    produces: ClassVar[bool] = PRODUCES
    artifact_fields: ClassVar[tuple[str, ...]] = ARTIFACTS
    unshared: ClassVar[frozenset[str]] = StageConfig.unshared | {"sparsity"}

    kind: Literal["KIND"] = "KIND"
    data: Source = Source()
    """Data."""
    train: Train = Train(steps=30)
    """Length."""
    EXTRA


def run(config, parent, ctx):
    (ctx.work / "begun").touch()
    if config.train.steps == 13:
        raise Interrupted("KIND: stopped at step 6; the same command goes on from there")
    if config.train.steps == 14:
        raise KeyboardInterrupt
    if config.train.steps == 15:
        raise OSError(28, "No space left on device", str(ctx.work / "x"))
    if config.train.steps == 16:
        raise ValueError("two\\nlines")
    if config.train.steps == 17:
        return
    text = json.dumps([keyed(config), str(parent and parent.name), sorted(ctx.siblings)])
    before = artifact.read_manifest(parent) if parent else None
    with atomic.writing(ctx.out) as draft:
        digest = hashlib.sha256(text.encode()).hexdigest()
        manifest = artifact.Manifest(
            format=artifact.FORMAT, name=config.name, stage=config.kind, key=ctx.key, config=keyed(config),
            family="llama", model=ModelConfig(), parameters=1000, bytes=4000, sparsity=0.25, bits=32.0, digest=digest,
            parent=before.as_parent() if before else None,
            metrics={"loss": 0.5}, weights={"embed/tokens": {}} if config.produces else {},
        )
        (draft / "params").mkdir()
        (draft / "params" / "array").write_bytes(bytes(4000))
        (draft / "siblings.json").write_text(json.dumps({n: str(p) for n, p in ctx.siblings.items()}))
        if not config.produces:
            results = [
                {"artifact": n, "digest": artifact.read_manifest(p).digest, "task": "t", "protocol": "p",
                 "metrics": {"accuracy": 0.75}}
                for n, p in (ctx.siblings or {parent.name: parent}).items()
            ]
            (draft / "results.json").write_text(json.dumps(results))
        artifact.write_manifest(draft, manifest)
'''


@pytest.fixture
def fake_stages(tmp_path, monkeypatch):
    """Replace all stages by `make` (starts), `change` (sparsity), `teach` (teacher) and `score` (evaluates)."""
    from llmctl.pipeline import registry, stages

    folder = tmp_path / "fake_stages"
    folder.mkdir()
    sparsity = 'sparsity: float = Field(0.5, ge=0, le=1)\n    """Zeros."""'
    for kind, starts, produces, artifacts, extra in (
        ("make", True, True, (), ""),
        ("change", False, True, (), sparsity),
        ("teach", False, True, ("teacher",), 'teacher: str = ""\n    """Who."""'),
        ("score", False, False, ("of",), 'of: list[str] = []\n    """Which."""'),
    ):
        text = FAKE.replace("KIND", kind).replace("STARTS", str(starts)).replace("PRODUCES", str(produces))
        (folder / f"{kind}.py").write_text(text.replace("ARTIFACTS", repr(artifacts)).replace("EXTRA", extra))
    monkeypatch.setattr(registry, "STAGES", folder)
    monkeypatch.setattr(stages, "__path__", [str(folder)])
    yield folder
    for kind in ("make", "change", "teach", "score"):
        sys.modules.pop(f"llmctl.pipeline.stages.{kind}", None)
        if hasattr(stages, kind):
            delattr(stages, kind)
