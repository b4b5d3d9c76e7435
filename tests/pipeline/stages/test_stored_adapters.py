"""The commands of the README's section on adapters, on the tiny language model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from llmctl.artifacts import artifact
from llmctl.cli import app

README = Path(__file__).parents[3] / "README.md"
SMALL = "--train.steps 2 --train.batch-size 8 --train.seq-len 32 --train.eval-every 0 --no-train.tensorboard"
MORE = {"finetune": SMALL, "generate": "--max-new 4 --json", "eval": "--no-speed --no-plot --batch-size 8 --json"}


@pytest.mark.slow
def test_commands_of_the_readme(artifacts, reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(artifacts / "lm", "runs/demo/pretrain")
    shutil.copy(reviews.path, "reviews.csv")
    section = README.read_text(encoding="utf-8").partition("### Adapters\n")[2]
    block = re.search(r"^```sh\n(.*?)^```", section, flags=re.S | re.M)
    out = {}
    for line in block[1].splitlines():
        words = shlex.split(line, comments=True)[1:]
        assert app.run([*words, *shlex.split(MORE.get(words[0], ""))]) == 0, (line, capsys.readouterr().err)
        out[words[0]] = capsys.readouterr().out
    results = json.loads(out["generate"])["results"]
    assert [r["adapter"] for r in results] == ["one", "two"]
    measured = {Path(r["artifact"]).name: r for r in json.loads(out["eval"])["results"]}
    assert measured.keys() == {"pretrain", "one", "two"}
    one, back = (artifact.load(Path("runs/demo") / name) for name in ("one", "back"))
    assert measured["one"]["digest"] == one.manifest.digest and one.manifest.base.stored == back.manifest.base.stored
    assert artifact.load(Path("runs/merged")).plain
    assert {p.name for p in Path("runs/peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    first = shlex.split(block[1].splitlines()[0])[1:]
    assert app.run([*first, *shlex.split(SMALL)]) == 0 and "up to date" in capsys.readouterr().err
