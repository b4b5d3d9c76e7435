"""`llmctl verify` finds what differs in artifacts, runs and prepared data, and then ends with exit code 2."""

import json

import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.cli import app
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.pretraining import prepare
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 259, "d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 16}


@pytest.fixture
def place(tmp_path):
    """A run with two artifacts, the second made from the first, and prepared data."""
    model = ModelConfig(**SIZES)
    flat = weights.flatten(functional.abstract(model))
    params = weights.unflatten({name: np.full(a.shape, 0.5, a.dtype) for name, a in flat.items()})
    ByteTokenizer.new().save(tmp_path / "words")
    about = {"key": "k", "config": {}, "tokenizer_dir": tmp_path / "words"}
    base = artifact.save(tmp_path / "run/base", params, model, stage="pretrain", **about)
    artifact.save(tmp_path / "run/made", params, model, stage="prune", parent=base, **about)
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} of a text" for i in range(40)))
    data = DataConfig(path=str(tmp_path / "t.txt"), documents="line", validation=0.2, test=0.1)
    prepare.prepare(data, TokenizerConfig(kind="bytes"), tmp_path / "p")
    return tmp_path


@pytest.fixture
def verify(place, capsys):
    """The exit code, the JSON object by path below the folder, and the line on standard error."""

    def verified(*names):
        code = app.run(["verify", *(str(place / n) for n in names), "--json"])
        out, err = capsys.readouterr()
        said = json.loads(out) if out else {"checked": []}
        return code, {e["path"].removeprefix(f"{place}/"): e for e in said["checked"]}, err

    return verified


def test_what_is_whole(verify, place):
    code, found, _ = verify("run", "p")
    assert code == 0 and list(found) == ["run/base", "run/made", "p"]
    assert {(e["state"], *e["differences"], *e["notes"]) for e in found.values()} == {("intact",)}
    assert found["run/base"]["digest"] == found["run/made"]["digest"] != found["run/made"]["content"]
    code, found, err = verify("words")
    assert code == 2 and "neither an artifact, nor a run, nor prepared data" in err


def edit(file, old, new):
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "difference"),
    [
        ("run/made/manifest.json", '"norm_eps": 0.00001', '"norm_eps": 0.1', "the manifest's `model` does not match"),
        ("run/made/manifest.json", '"stage": "prune"', '"stage": "x"', "the manifest's `stage` does not match"),
        ("run/made/tokenizer/llmctl_tokenizer.json", "true", "false", "tokenizer/llmctl_tokenizer.json does not match"),
        ("p/prepared.json", '"weight": 1.0', '"weight": 2.0', "does not match what was saved"),
    ],
)
def test_what_differs_is_named(verify, place, file, old, new, difference):
    edit(place / file, old, new)
    code, found, err = verify("run", "p")
    damaged = file.rpartition("/")[0].removesuffix("/tokenizer")
    assert code == 2 and f"{damaged}: damaged; remove what is damaged and make it again" in err
    assert {path for path, e in found.items() if e["state"] == "damaged"} == {damaged}
    assert difference in " ".join(found[damaged]["differences"])


def test_every_file_of_prepared_data_is_compared(verify, place):
    for file in [p for p in (place / "p").rglob("*") if p.is_file() and p.name != "prepared.json"]:
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        code, found, _ = verify("p")
        assert code == 2 and str(file.relative_to(place / "p")) in found["p"]["differences"][0]
        file.write_bytes(before)
    (place / "p/tokenizer/tokenizer_config.json").write_text("{}")
    assert "was not saved with it" in verify("p")[1]["p"]["differences"][0]


def test_a_child_of_another_parent_has_a_note(verify, place):
    base = artifact.load(place / "run/base")
    model = base.model.model_copy(update={"norm_eps": 0.5})
    artifact.save(place / "run/base", base.params, model, stage="pretrain", key="k", config={})
    code, found, _ = verify("run")
    assert code == 0 and found["run/made"]["notes"] == ["was made from another base than the one that is there"]


def test_what_an_earlier_llmctl_saved_is_checked_in_part(verify, place):
    for file, new in (("run/base/manifest.json", ("checksums",)), ("p/prepared.json", ("words", "digest"))):
        content = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps({k: v for k, v in content.items() if k not in new}))
    code, found, _ = verify("run", "p")
    assert code == 0 and {path: e["state"] for path, e in found.items()} == {
        "run/base": "unchecked in part",
        "run/made": "intact",
        "p": "unchecked in part",
    }
