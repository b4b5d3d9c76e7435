"""The digests of a run are compared with those recorded for the same kind of machine."""

import json
import platform

import digests
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig


def test_kinds_of_machines_name_the_widest_vectors():
    kinds = [digests.kind(f"flags\t\t: fpu sse4_2 {words}\n") for words in ("avx avx2 avx512f", "avx avx2", "")]
    assert [k.split(",")[0] for k in kinds] == [
        f"{platform.machine()} {level}" for level in ("avx512f", "avx2", "unknown")
    ]


@pytest.mark.parametrize(
    ("record", "different"),
    [
        ({"a": "1", "b": "2"}, False),
        ({"a": "1", "b": "3"}, True),
        ({"a": "1"}, True),
        ({"a": "1", "b": "2", "c": "3"}, True),
    ],
)
def test_different_and_missing_digests(record, different):
    lines, found = digests.compare({"a": "1", "b": "2"}, {"here": record}, "here")
    assert found == different and ("DIFFERENT" in "".join(lines)) == different


def test_what_is_printed_can_be_recorded(tmp_path, monkeypatch, capsys):
    config = ModelConfig(vocab_size=16, d_model=8, layers=1, heads=2, kv_heads=2, head_dim=4, d_ff=16)
    flat = weights.flatten(functional.abstract(config))
    params = weights.unflatten({name: np.zeros(a.shape, a.dtype) for name, a in flat.items()})
    artifact.save(tmp_path / "run" / "base", params, config, stage="pretrain", key="k", config={})
    record = tmp_path / "record.json"
    monkeypatch.setattr("sys.argv", ["digests.py", str(tmp_path / "run"), str(record)])
    codes = []
    for change in (None, None, lambda text: text.replace(text[-10:-6], "....")):
        if change:
            record.write_text(change(record.read_text()))
        with pytest.raises(SystemExit) as end:
            digests.main()
        codes.append(end.value.code)
        if not record.exists():
            text = capsys.readouterr().out
            record.write_text(json.dumps(json.loads(text[: text.rindex("}") + 1])))
    assert codes == [0, 0, 1]
