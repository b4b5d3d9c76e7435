"""The programs of an evaluation, for plan."""

from types import SimpleNamespace

import pytest

from llmctl.config.errors import RequestError
from llmctl.config.settings import MeshConfig
from llmctl.data.config import DataConfig
from llmctl.distributed import mesh as meshes
from llmctl.evaluate import acceptance, programs
from llmctl.evaluate.settings import MeasureConfig
from llmctl.model import flops, functional
from llmctl.model.config import ModelConfig

IDENTITY = {"base": None, "content": "", "digest": ""}


def test_every_task_of_an_artifact_has_a_program():
    sizes = {"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "max_seq_len": 32}
    cfg = ModelConfig(preset="bert-tiny", vocab_size=300, **sizes)
    manifest = SimpleNamespace(
        name="a", model=cfg, task="", seq_len=32, truncate="", config={}, generation={}, **IDENTITY
    )
    chosen = {"a": SimpleNamespace(model=cfg, params=functional.abstract(cfg), manifest=manifest)}
    config = MeasureConfig(tasks=["masked", "next_sentence"], batch_size=2)
    found = programs.scoring(config, DataConfig(), "a", chosen, meshes.make(MeshConfig()))  # pyright: ignore[reportArgumentType]
    assert [p.title for p in found] == [
        "scoring of a on masked tokens",
        "scoring of a on masked tokens, next sentences",
    ]
    assert ["next_label" in p.batch for p in found] == [False, True]


def test_tasks_of_the_harness_are_planned_as_rows_of_scored_positions():
    cfg = ModelConfig(preset="llama-tiny", vocab_size=300, layers=1, max_seq_len=64)
    manifest = SimpleNamespace(
        name="a", model=cfg, task="", seq_len=32, truncate="", config={}, generation={}, **IDENTITY
    )
    chosen = {"a": SimpleNamespace(model=cfg, params=functional.abstract(cfg), manifest=manifest)}
    config = MeasureConfig(harness=["piqa"], batch_size=2)
    (found,) = programs.scoring(config, DataConfig(), "a", chosen, meshes.make(MeshConfig()))  # pyright: ignore[reportArgumentType]
    assert found.title == "likelihoods of a for lm-evaluation-harness"
    assert (found.tokens, found.rows) == (4 * 64, 4)
    out = found.trace().out_info
    assert {name: a.shape for name, a in out.items()} == {"log_p": (4, 32), "best": (4, 32)}


def test_a_draft_is_measured_with_its_target():
    """The program reads both models, and its operations are those of both."""
    sizes = {"heads": 2, "kv_heads": 2, "head_dim": 8, "d_ff": 24, "max_seq_len": 32, "vocab_size": 300}
    models = [ModelConfig(preset="llama-tiny", d_model=d, layers=d // 8, **sizes) for d in (8, 16)]
    draft, target = (
        SimpleNamespace(
            model=cfg,
            params=functional.abstract(cfg),
            manifest=SimpleNamespace(
                name="b",
                tokenizer=tokenizer,
                model=cfg,
                task="",
                seq_len=32,
                truncate="",
                config={},
                generation={},
                **IDENTITY,
            ),
        )
        for cfg, tokenizer in zip(models, ("", "x"), strict=True)  # that of the draft is not trained yet
    )
    mesh = meshes.make(MeshConfig())
    _, found = programs.scoring(MeasureConfig(batch_size=2), DataConfig(), "a", {"a": draft}, mesh, target)  # pyright: ignore[reportArgumentType]
    assert found.title == "acceptance of a" and found.tokens == 64
    assert found.flops == 64 * sum(flops.flops(cfg, 32) for cfg in models)
    assert found.trace().out_info.keys() == {"acceptance", "agreement", "weight"}
    with pytest.raises(RequestError, match="draft_of: a: task choice predicts no tokens"):
        programs.scoring(MeasureConfig(tasks=["choice"]), DataConfig(), "a", {"a": draft}, mesh, target)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="draft_of: a: no task reads the texts"):
        acceptance.check_tasks([], "a")
    target.manifest.model = target.manifest.model.model_copy(update={"vocab_size": 301})
    with pytest.raises(RequestError, match="draft_of: a has 300 tokens, and b has 301"):
        programs.scoring(MeasureConfig(batch_size=2), DataConfig(), "a", {"a": draft}, mesh, target)  # pyright: ignore[reportArgumentType]
    draft.manifest.tokenizer = "y"
    with pytest.raises(RequestError, match="draft_of: a: has another tokenizer than b"):
        programs.scoring(MeasureConfig(batch_size=2), DataConfig(), "a", {"a": draft}, mesh, target)  # pyright: ignore[reportArgumentType]
