"""The report of a run: what it reads, what it escapes, and that its figures are those of `llmctl show`."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmctl.artifacts.manifest import FORMAT, Manifest, Parent
from llmctl.artifacts.manifest_file import write_manifest
from llmctl.cli import app, summary
from llmctl.cli.report import (
    attributions,
    html_page,
    lineage,
    markdown,
    plots,
    quality,
    report,
    reproduction,
    run_contents,
)
from llmctl.cli.report.document import Document, Section, Table, cell
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.evaluate.attribution.explain import Explanation
from llmctl.evaluate.attribution.inputs import Piece
from llmctl.evaluate.attribution.record import record
from llmctl.evaluate.attribution.settings import AttributionConfig
from llmctl.model.config import ModelConfig
from llmctl.pipeline import recipe

pytest.importorskip("vl_convert")

ROOT = Path(__file__).parents[3]
HOSTILE = (
    "</script><script>alert('x')</script><img src=http://h.example/x onerror=alert(1)>\u2028&amp;|`]](javascript:1)"
)
SIZES = ModelConfig(preset="llama-tiny", vocab_size=300, layers=1)


def save(folder, name, stage, parent=None, **about):
    """Write the manifest of a model, or of an evaluation if `weights` is empty; no arrays."""
    folder.mkdir(parents=True)
    digest = hashlib.sha256(f"{folder.parent.name}{name}".encode()).hexdigest()
    fields = {"weights": {"a": {"kind": "plain", "parts": {"a": ["float32", [10, 100]]}}}, "config": {"kind": stage}}
    fields |= {"format": FORMAT, "name": name, "stage": stage, "key": "k", "family": "llama", "model": SIZES}
    fields |= {"parameters": 1000, "bytes": 4100, "sparsity": 0.5, "bits": 32.0, "digest": digest, "parent": parent}
    return write_manifest(folder, Manifest(**(fields | about)))


def log_lines(folder, steps=30, **more):
    lines = [
        {"step": i, "time": 100.0 + i, "loss": 5.0 / i, "tokens_per_second": 10.0 * i, "learning_rate": 1e-3, **more}
        | ({"validation_loss": 6.0 / i} if i % 10 == 0 else {})
        for i in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def result(manifest, accuracy, **metrics):
    """A classifier's result, and a probe's metrics of names that no registry knows."""
    counts = [[40, 10], [5, 45]]
    found = {"accuracy": accuracy, "accuracy_low": accuracy - 0.05, "accuracy_high": accuracy + 0.05}
    found |= {"accuracy_typos": accuracy / 2, "accuracy_typos_low": accuracy / 3, "accuracy_typos_high": accuracy}
    found |= {"confusion": counts, "per_class": {HOSTILE: {"f1": 0.5}, "b": {"f1": 0.75}}, "ece": 0.125}
    found |= {"reliability": [[60, 0.7, 0.65], [40, 0.9, 0.95]], "latency_p50": 0.1 / 3, "latency_p90": 0.04, **metrics}
    about = {"artifact": manifest.name, "digest": manifest.digest, "content": manifest.content, "task": "classify"}
    return about | {"protocol": HOSTILE, "metrics": found, "weight_bytes": manifest.weight_bytes, "record": "classify"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with hostile names and texts, an evaluation, a report of pruning, and a stage that did not finish."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    base = save(folder / "base", "base", "pretrain", metrics={"steps": 30, "validation_loss": 0.2})
    log_lines(folder / "base")
    layers = [
        {"stack": "decoder", "layer": i, "sparsity": 0.5, "error": 0.1 * (i + 1), "matrices": {}} for i in range(3)
    ]
    metrics = {"pruned_layers": layers, HOSTILE: {"x": [1, 2]}, "note": HOSTILE}
    config, parent = {"kind": "prune", "method": HOSTILE, "teacher": "base"}, Parent(name="base", digest=base.digest)
    evil = save(folder / "evil", HOSTILE, "prune", parent, labels=[HOSTILE, "b"], metrics=metrics, config=config)
    save(folder / "eval", "eval", "eval", weights={}, config={"kind": "eval"}, parameters=0)
    results = [result(base, 0.75), result(evil, 1 / 3, flip_rate=0.25, nested=[{"a": HOSTILE, "b": 1}])]
    (folder / "eval/results.json").write_text(json.dumps(results))
    records = [{"artifact": m.name, "task": "classify", "row": "f:1", "text": HOSTILE, "label": "b",
                "prediction": HOSTILE} for m in (base, evil)]  # fmt: skip
    (folder / "eval/predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    differences = {"value": 0.75, "against": 1 / 3, "difference": 0.4166, "difference_low": 0.4, "difference_high": 0.5,
                   "p_value": 0.01, "test": "McNemar"}  # fmt: skip
    about = {"artifact": "base", "against": HOSTILE, "task": "classify", "examples": 100, "resamples": 10, "seed": 0}
    (folder / "eval/comparisons.json").write_text(json.dumps([{**about, "metrics": {"accuracy": differences}}]))
    tokens = [{"text": HOSTILE, "kind": "text", "attribution": 0.5}, {"text": " b", "attribution": -0.25}]
    about = {"method": "gradient_input", "unit": HOSTILE, "averages": []}
    for model in (base, evil):
        texts = [{"texts": [HOSTILE + " b"], "target": HOSTILE, "output": 1.5, "tokens": tokens}]
        record = {"artifact": model.name, "digest": model.digest, **about, "texts": texts}
        (folder / f"{model.digest[:4]}.attributions.json").write_text(json.dumps(record))
    (folder / ".work/distill").mkdir(parents=True)
    log_lines(folder / ".work/distill")
    with (folder / ".work/distill/log.jsonl").open("a") as stream:
        stream.write('{"step": 31, "lo')  # a killed process leaves an incomplete line
    return folder


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    html, text = report.write(run, tmp_path_factory.mktemp("out"), HOSTILE)
    return html.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")


VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """The elements of a page; a page that is not well-formed is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.tables = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self.stack]}
        assert len(element["attrs"]) == len(attrs), f"an attribute of {tag} is there twice"
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1]["tag"] == tag, f"</{tag}> in {[e['tag'] for e in self.stack]}"
        self.stack.pop()

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def named(self, *tags):
        return [e for e in self.elements if e["tag"] in tags]


@pytest.fixture(scope="module")
def page(pages):
    return Page(pages[0])


def test_nothing_is_loaded_and_no_text_becomes_markup(pages, page):
    scripts = page.named("script")
    running = [s for s in scripts if "type" not in s["attrs"]]
    assert len(running) == 2 and all(s["attrs"].get("type") in (None, "application/json") for s in scripts)
    assert not page.named("img", "iframe", "object", "embed", "link", "base", "form", "image", "foreignobject")
    for element in page.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href"), element
            if name == "href":
                assert value.startswith("#")
            if name not in ("xmlns", "xmlns:xlink", "aria-label"):
                assert "://" not in (value or "") and "url(" not in (value or ""), element
    policy = next(e["attrs"]["content"] for e in page.named("meta") if "http-equiv" in e["attrs"])
    for script in running:
        digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "\u2028" not in pages[0] and len(pages[0]) < 3_000_000
    assert pages[0].count("alert(1)&gt;") > 10  # the hostile name is shown, as text
    text = re.sub(r"^(```+)\w*\n.*?\n\1$", "", pages[1], flags=re.S | re.M)
    assert "<" not in text.replace("<br>", "")
    assert "\u2028" not in pages[1]
    assert not re.search(r"(?<!\\)\]\(", text)


def test_data_in_scripts_is_what_was_stored(run, page):
    held = {e["attrs"]["id"]: json.loads(e["text"]) for e in page.named("script") if "id" in e["attrs"]}
    assert held.pop("run") == summary.run(run)
    assert len(held) >= 10 and all("marks" in spec for spec in held.values())


def test_figures_are_those_of_show(run, page, capsys):
    assert app.run(["show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert next(json.loads(e["text"]) for e in page.named("script") if e["attrs"].get("id") == "run") == shown
    tables = rows_of(page)
    overview = tables["All models, parents before children"]
    stages = [t for caption, t in tables.items() if caption.startswith("Metrics of the stage")]
    for artifact in shown["artifacts"]:
        row = next(r for r in overview if r[0][1] == artifact["name"].replace("\u2028", "\\u2028"))
        sizes = [artifact[k] for k in ("parameters", "weight_bytes", "bytes", "sparsity", "bits")]
        assert [value for value, _ in row[3:8]] == sizes
        ends = ("_low", "_high")
        numbers = {k: v for k, v in artifact["metrics"].items() if isinstance(v, (int, float)) and not k.endswith(ends)}
        assert any(sorted(row[1][0] for row in table) == sorted(numbers.values()) for table in stages)
        assert artifact["metrics"]["accuracy"] in [value for value, _ in row]


def rows_of(page):
    """{caption: rows of (exact value or None, text)}; captions that repeat get a number."""
    found = {}
    caption, order = "", [e for e in page.elements if e["tag"] in ("caption", "tr", "th", "td", "data")]
    for e in order:
        if e["tag"] == "caption":
            caption = e["text"] if e["text"] not in found else f"{e['text']} {len(found)}"
            found[caption] = []
        elif e["tag"] == "tr" and "tbody" in e["inside"]:
            found[caption].append([])
        elif e["tag"] in ("td", "th") and "tbody" in e["inside"]:
            found[caption][-1].append((None, e["text"]))
        elif e["tag"] == "data":
            found[caption][-1][-1] = (json.loads(e["attrs"]["value"]), e["text"])
    return found


def test_structure_for_readers_of_screens(page):
    headings = [int(e["tag"][1]) for e in page.named("h1", "h2", "h3", "h4", "h5", "h6")]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(headings))
    ids = [e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    assert {e["attrs"]["href"][1:] for e in page.named("a")} <= set(ids)
    assert page.named("html")[0]["attrs"]["lang"] == "en" and page.named("a")[0]["attrs"]["href"] == "#content"
    assert [len(page.named(tag)) for tag in ("main", "header", "footer", "nav")] == [1, 1, 1, 1]
    assert all(e["attrs"].get("scope") in ("row", "col") for e in page.named("th"))
    drawings = [e for e in page.elements if e["attrs"].get("class") == "drawing"]
    assert len(drawings) == len(page.named("figure")) == len(page.named("svg"))
    assert all(e["attrs"]["role"] == "img" and len(e["attrs"]["aria-label"]) > 20 for e in drawings)
    assert len([e for e in page.named("table") if "figure" in e["inside"] and "details" in e["inside"]]) == len(
        drawings
    )
    assert all(e["text"].strip() for e in page.named("th", "caption", "summary", "figcaption"))


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    """The ratio of WCAG 2.2."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colors_can_be_read_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = re.findall(r":root \{(.*?)\}", html_page._file("page.css"), flags=re.S)
    for block in (light, dark):
        colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        texts = [name for name in colors if name.startswith("series")] + ["ink", "quiet", "link"]
        assert len(texts) == 9
        for name in texts:
            for ground in ("paper", "panel"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
        most = plots.confusion([], ["a"], True)["layer"][0]["encoding"]["opacity"]["scale"]["range"][1]
        for name, share in (("series-1", most), ("series-1", 0.5), ("series-2", 0.5)):  # cells, and marked tokens
            pairs = [[int(colors[c][i : i + 2], 16) for c in (name, "paper")] for i in (1, 3, 5)]
            mixed = "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)
            assert contrast(colors["ink"], f"#{mixed}") >= 4.5, name


def test_tokens_are_marked_side_by_side(page):
    marks = page.named("mark")
    assert [(m["text"].strip()[-1], m["attrs"].get("class"), m["attrs"]["style"]) for m in marks] == [
        (")", None, "--strength: 1.0"), ("b", "against", "--strength: 0.5")
    ] * 2  # fmt: skip


def test_records_of_explain_are_read(run, tmp_path):
    """The report reads what `explain --json` writes, averages included, and shows spaces that no token has."""
    pieces = [Piece("[CLS]", "special"), Piece("so", "text", 0, 0, 2), Piece("so", "text", 0, 3, 5)]
    found = [Explanation(pieces, ["so so, cut off"], np.array([0, 0.5, -0.25]), "pos", 1.5, 0.0, 0.2)] * 2
    manifest = Manifest.model_validate_json((run / "base/manifest.json").read_text())
    about = {"manifest": manifest, "config": AttributionConfig(baseline="pad"), "unit": "nats"}
    explainer = SimpleNamespace(found=SimpleNamespace(**about), task=SimpleNamespace(title="classes"), **about)
    made = record(explainer, found, top=3)
    assert made["averages"]
    shutil.copytree(run / "base", tmp_path / "base")
    (tmp_path / "a.attributions.json").write_text(json.dumps(made))
    contents = run_contents.read(tmp_path, attributions.is_valid)
    ((part,),) = (s.blocks[-1].blocks for s in attributions.sections(contents))
    assert [[c.text for c in row] for row in part.rows] == [["so", "0.125", "4"]]
    tokens = attributions.sections(contents)[0].blocks[2].blocks[0]
    assert tokens.tokens == [("so", 0.5), (" so", -0.25)]
    assert tokens.note == "Completeness error 20.00%. Warning: this is more than the tolerance of 1.00%."


def test_long_logs_are_read_to_their_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_contents, "MOST_RECORDS", 1)
    shutil.copytree(run, tmp_path / "run")
    contents = run_contents.read(tmp_path / "run")
    assert contents.models[0].log[-1]["step"] == 30
    assert len(contents.evaluations[0].records) == 1


def test_the_same_run_gives_the_same_bytes(run, pages, tmp_path):
    html, text = report.write(run, tmp_path, HOSTILE)
    assert (html.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")) == pages


@pytest.mark.parametrize(("name", "text", "message"), [
    ("eval/results.json", "{", r"eval/results\.json: damaged"),
    ("eval/results.json", '[{"artifact": ["a"], "digest": "", "task": "", "protocol": "", "metrics": {}}]', "no text"),
    ("eval/comparisons.json", "[1]", r"eval/comparisons\.json: damaged"),
    ("eval/comparisons.json", json.dumps([dict.fromkeys(("artifact", "against", "task", "examples", "resamples"), "a")
                                          | {"seed": 0, "metrics": {}}]), r"eval/comparisons\.json: damaged"),
    ("eval/predictions.jsonl", '{"artifact": "a", "task": "t"}\n[]\n', r"predictions\.jsonl: line 2: damaged"),
    ("x.attributions.json", '{"artifact": "a", "texts": [1]}', r"x\.attributions\.json: damaged"),
    ("x.attributions.json", '{"artifact": "", "digest": "", "method": "", "unit": "", "texts": [1]}', "damaged"),
    ("base/log.jsonl", "nonsense\n", r"base/log\.jsonl: line 1: damaged"),
    ("base/manifest.json", '{"format": 1}', r"base/manifest\.json: damaged"),
])  # fmt: skip
def test_a_damaged_file_is_named_in_one_line(run, tmp_path, capfd, name, text, message):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(text)
    assert app.run(["report", str(tmp_path / "copy")]) == 2
    said = capfd.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "copy/report.html").exists()


def test_parts_that_are_missing(run, tmp_path):
    """A single artifact, and a run without an evaluation, logs or unfinished stages."""
    shutil.copytree(run / "base", tmp_path / "one")
    html, _ = report.write(tmp_path / "one", None)
    assert html.parent == tmp_path and "Artifact one: 1 model." in html.read_text(encoding="utf-8")
    save(tmp_path / "bare/model", "model", "pretrain")
    text = report.write(tmp_path / "bare", None)[1].read_text(encoding="utf-8")
    assert "This run has no evaluation." in text and "No stage of this run left a training log." in text
    shutil.copytree(run / "eval", tmp_path / "alone/eval")
    html = report.write(tmp_path / "alone/eval", tmp_path / "out")[0].read_text(encoding="utf-8")
    assert "Confusion matrix of base" in html
    for missing, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "out", "neither an artifact nor")):
        with pytest.raises(RequestError, match=message):
            report.write(missing, None)


def test_unfinished_stages_and_interrupted_logs(run, page):
    found = run_contents.read(run)
    assert [(u.name, len(u.log)) for u in found.unfinished] == [("distill", 30)]
    assert any(e["text"] == "distill (not finished)" for e in page.named("h3"))


def test_no_jax_and_one_line_without_the_package(run, tmp_path, monkeypatch, capfd):
    script = "import sys; sys.modules['jax'] = None; from llmctl.cli import app; sys.exit(app.run(sys.argv[1:]))"
    words = ["report", str(run), "--out", str(tmp_path / "out"), "--title", "t", "--json"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        n: str(tmp_path / f"out/report.{e}") for n, e in (("html", "html"), ("markdown", "md"))
    }
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert app.run(["report", str(run), "--out", str(tmp_path)]) == 2
    assert capfd.readouterr().err == "llmctl: report: the plots need vl-convert-python: pip install 'llmctl[report]'\n"


RECIPES = [
    f for f in sorted((ROOT / "recipes").rglob("*.toml")) if f.parent.name != "tasks" and f.parent.name != "harness"
]


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.name)
def test_the_recipe_of_a_report_has_the_settings_of_the_run(file, tmp_path):
    """The written recipe has the same settings, parents and other artifacts, so its stages have the same keys."""
    steps = recipe.read(file, tmp_path / "run").steps
    models, evaluations = [], []
    for step in steps:
        config = json.loads(json.dumps(keyed(step.config)))
        parent = Parent(name=step.parent, digest="d") if isinstance(step.parent, str) else None
        about = {"name": step.name, "stage": step.config.kind, "parent": parent, "config": config}
        sizes = {"parameters": 0, "bytes": 0, "sparsity": 0, "bits": 0}
        manifest = Manifest(format=FORMAT, key="", family="llama", model=SIZES, digest="d", **sizes, **about)
        if step.config.produces:
            models.append(run_contents.Model(step.name, manifest, {}, []))
        else:
            results = [{"artifact": name} for name in step.others or [step.parent]]
            evaluations.append(run_contents.Evaluation(step.name, manifest, results, [], []))
    written = reproduction.recipe(run_contents.Contents("run", {}, models, evaluations))
    (tmp_path / "recipe.toml").write_text(written, encoding="utf-8")
    again = {s.name: s for s in recipe.read(tmp_path / "recipe.toml", tmp_path / "run").steps}
    for step in steps:
        assert keyed(again[step.name].config) | {"of": 0} == keyed(step.config) | {"of": 0}
        assert (again[step.name].parent, again[step.name].others) == (step.parent, step.others)


def test_models_outside_the_run_are_not_those_of_the_same_name(tmp_path):
    base = save(tmp_path / "run/base", "base", "pretrain")
    save(tmp_path / "run/tuned", "tuned", "finetune", Parent(name="base", digest="another"))
    own = Parent(name="base", digest=base.digest)
    for name, path, digest in (("a", "base", base.digest), ("b", "../x/base", "another"), ("c", "../x/base", None)):
        metrics = {"teacher": digest} if digest else {}
        about = {"config": {"kind": "distill", "teacher": path}, "metrics": metrics}
        save(tmp_path / "run" / name, name, "distill", own, **about)
    save(tmp_path / "run/d", "d", "finetune", Parent(name="d", digest="another"))
    contents = run_contents.read(tmp_path / "run")
    table = lineage.section(contents).blocks[1].table
    other = "base (not that of this run)"
    assert {row[0].text: row[2].text for row in table.rows} == {
        "base": "–", "tuned": f"{other} (parent)", "a": "base (parent), base (teacher)",
        "b": f"base (parent), {other} (teacher)", "c": f"base (parent), {other} (teacher)",
        "d": "d (not that of this run) (parent)",
    }  # fmt: skip
    written = reproduction.recipe(contents)
    assert written.count('from = "base"') == 3
    assert 'from = "PATH OF base"' in written and 'from = "PATH OF d"' in written


def test_copies_of_a_model_keep_their_names(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    base = json.loads((run / "base/manifest.json").read_text())
    save(tmp_path / "run/zcopy", "zcopy", "finetune", digest=base["digest"])
    for name in ("base", "zcopy", "runs/other/base"):
        measured = json.loads((run / "eval/results.json").read_text())[0] | {"artifact": name}
        (tmp_path / "run/eval/results.json").write_text(json.dumps([measured]))
        (found,) = run_contents.read(tmp_path / "run").evaluations
        assert found.results[0]["artifact"] == name.rpartition("/")[2]


def test_captions_are_no_list_items_in_markdown():
    table = Table("- a|b", ["name"], [[cell("1. x")]])
    text = markdown.text(Document("t", "lead", [Section("s", [table])]))
    assert "\n\\- a\\|b:\n" in text


def test_pareto_front():
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, 6, (40, 2)).tolist()]
    best, kept = -1, set()
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):  # an independent way: sweep by cost
        if value > best:
            best, kept = value, kept | {(cost, value)}
    assert quality.front(points, maximize=True) == [p in kept for p in points]
    assert quality.front([(c, -v) for c, v in points], maximize=False) == [p in kept for p in points]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_opens_the_page_without_errors(run, tmp_path):
    html, _ = report.write(run, tmp_path)
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", html.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = [e for e in Page(done.stdout).elements if e["attrs"].get("class") == "drawing"]
    assert done.stdout.count('type="range"') >= 2 * 3 and "vega-embed" in done.stdout
    assert drawn and all(e["attrs"]["role"] == "img" and "Vega" not in e["attrs"]["aria-label"] for e in drawn)
