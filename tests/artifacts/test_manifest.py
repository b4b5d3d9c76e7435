"""An edit of any field or file that can change an answer is refused by name; other edits are found by a full check."""

import copy
import json
import re
import shutil

import jax
import numpy as np
import pytest

from llmctl.artifacts import abstract_artifact, artifact, integrity
from llmctl.artifacts.manifest import CONTENT, Manifest
from llmctl.artifacts.manifest_file import damaged_fields
from llmctl.config import checksums
from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig

SIZES = {"vocab_size": 259, "d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 16}
MODEL = ModelConfig(**SIZES, head="classify", labels=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An artifact in which every field of the manifest has a value."""
    place = tmp_path_factory.mktemp("manifest")
    ByteTokenizer.new().save(place / "words")
    (place / "words" / "chat_template.jinja").write_text("{{ messages }}")
    (place / "log.jsonl").write_text('{"step": 1}\n')
    flat = weights.flatten(functional.abstract(MODEL))
    params = weights.unflatten({name: np.full(a.shape, 0.5, a.dtype) for name, a in flat.items()})
    common = {"key": "k", "tokenizer_dir": place / "words", "metrics": {"loss": 0.5, "accuracy": 1.0}}
    common["config"] = {"train": {"seq_len": 16}, "truncate": "tail", "seed": 0}
    base = artifact.save(place / "base", params, MODEL, stage="pretrain", **common)
    about = {"labels": ["no", "yes"], "fitted": {"thresholds": {"yes": 0.25}}, "task": "classify"}
    about |= {"parent": base, "log": place / "log.jsonl"}
    artifact.save(place / "made", params, MODEL, stage="finetune", **about, **common)
    return place / "made"


def paths(value, at=()):
    """Every place in a JSON value, inner ones included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*at, key)
        yield from paths(part, (*at, key))


def edits(value):
    """Other values in the place of one: of the same type, and of others."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int):
        return [value + 1, -1, float(value) + 0.5]
    if isinstance(value, float):
        return [value * 2 + 0.125, 0.0 if value else 1.0]
    if isinstance(value, str):
        return [value + "x", value[:-1] if value else "tail"]
    if isinstance(value, list):
        return [value[::-1] if value[::-1] != value else [*value, "x"], []] if value else [["x"]]
    if isinstance(value, dict):
        return [value | {"added": 1}, {}] if value else [{"added": 1}]
    return [1, "x"]


GONE = object()


def edited(content, path, to):
    out = copy.deepcopy(content)
    at = out
    for key in path[:-1]:
        at = at[key]
    if to is GONE:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return out


def test_every_single_edit_of_a_manifest_is_refused_by_name_or_found_by_a_check(saved):
    """All of what can change an answer is refused when it is read; the rest is read, and a check names it."""
    file = saved / "manifest.json"
    before = file.read_text()
    content, known = json.loads(before), artifact.read_manifest(saved)
    count = refused = harmless = 0
    try:
        for path in paths(content):
            value = content
            for key in path:
                value = value[key]
            for to in [*edits(value), GONE]:
                file.write_text(json.dumps(edited(content, path, to)))
                count += 1
                try:
                    manifest = artifact.read_manifest(saved)
                except RequestError as e:
                    refused += 1
                    names = re.findall(r"\w+", str(e).partition(": ")[2])
                    assert path[0] in (*names, "checksums") and "\n" not in str(e), (path, to, str(e))
                    continue
                assert {n: getattr(manifest, n) for n in CONTENT} == {n: getattr(known, n) for n in CONTENT}, (path, to)
                if path == ("checksums",):  # taken for one of an earlier llmctl, with the same answers
                    assert manifest.checksums is None
                    continue
                harmless += 1
                assert path[0] not in CONTENT, (path, to)
                assert path[0] in damaged_fields(saved, "record") or path[0] == "checksums", (path, to)
    finally:
        file.write_text(before)
    assert count > 500 and refused > 300 and harmless > 50, (count, refused, harmless)
    assert integrity.full_check(saved) == integrity.Damage({}, {})


def test_each_field_is_under_one_digest_on_purpose():
    """A new field of the manifest is a line here: what can change an answer, or a later stage, goes into `CONTENT`."""
    words = {"format", "name", "stage", "key", "parameters", "bytes", "sparsity", "bits", "parent", "config", "metrics"}
    words |= {"fitted_for"}
    assert {*CONTENT, *words, "versions"} == Manifest.model_fields.keys() - {"checksums"}


def test_a_field_that_was_not_saved_is_refused(saved, tmp_path):
    """An earlier llmctl had no such field; by hand it would get a value that nothing covers."""
    shutil.copytree(saved, tmp_path / "a")
    content = json.loads((saved / "manifest.json").read_text())
    summed = artifact.write_manifest(tmp_path / "a", Manifest.model_validate(content)).model_dump(mode="json")
    fields = {n: c for n, c in summed["checksums"]["content"]["fields"].items() if n != "truncate"}
    summed["checksums"]["content"] |= {
        "fields": fields,
        "digest": checksums.of_json([fields, summed["checksums"]["content"]["files"]]),
    }
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(summed))
    with pytest.raises(RequestError, match="the manifest's `truncate` was not saved with it"):
        artifact.read_manifest(tmp_path / "a")
    del summed["truncate"]
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(summed))
    assert artifact.read_manifest(tmp_path / "a").truncate == ""


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            lambda t: (t / "chat_template.jinja").write_text("{{ messages[0] }}"),
            "tokenizer/chat_template.jinja does not",
        ),
        (lambda t: (t / "chat_template.jinja").unlink(), "tokenizer/chat_template.jinja is missing"),
        (lambda t: (t / "generation_config.json").write_text("{}"), "generation_config.json was not saved with it"),
        (lambda t: ByteTokenizer.new(3).save(t), "tokenizer/llmctl_tokenizer.json does not match"),
        (lambda t: shutil.rmtree(t), "is missing"),
    ],
)
def test_another_tokenizer_is_refused(saved, tmp_path, edit, line):
    shutil.copytree(saved, tmp_path / "a")
    edit(tmp_path / "a" / "tokenizer")
    with pytest.raises(RequestError, match=line):
        artifact.load(tmp_path / "a")
    found = integrity.full_check(tmp_path / "a")
    assert found.content and not found.record


def test_an_artifact_of_an_earlier_llmctl_is_read_and_its_tokenizer_compared(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    content = json.loads(file.read_text())
    del content["checksums"], content["parent"]["content"]
    file.write_text(json.dumps(content))
    found = artifact.load(tmp_path / "a").manifest
    assert (found.content, found.parent.content, found.labels) == ("", "", ["no", "yes"])
    (tmp_path / "a" / "tokenizer" / ".DS_Store").touch()
    assert integrity.full_check(tmp_path / "a") == integrity.Damage({}, {})
    ByteTokenizer.new(3).save(tmp_path / "a" / "tokenizer")
    with pytest.raises(RequestError, match=r"damaged \(the tokenizer is another \(\w+\) than the model's"):
        artifact.load(tmp_path / "a")


def test_the_content_digest_covers_what_is_determined_and_nothing_else(saved, tmp_path):
    """Equal but for name, metrics, key and config: equal content. Other labels: other content, of equal arrays."""
    base = artifact.load(saved)
    about = {"stage": "finetune", "key": "other", "config": {"train": {"seq_len": 16}, "truncate": "tail"}}
    about |= {"tokenizer_dir": saved / "tokenizer", "fitted": base.manifest.fitted, "task": "classify"}
    labels = ["no", "yes"]
    same = artifact.save(tmp_path / "same", base.params, base.model, labels=labels, metrics={"loss": 9.0}, **about)
    assert (same.content, same.digest) == (base.manifest.content, base.manifest.digest)
    other = artifact.save(tmp_path / "other", base.params, base.model, labels=labels[::-1], **about)
    assert other.digest == same.digest and other.content != same.content
    assert same == artifact.read_manifest(tmp_path / "same")


def test_damaged_arrays_are_named_and_a_model_keeps_its_damaged_metrics_apart(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a")
    for file in (tmp_path / "a/params").rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    (tmp_path / "a" / "log.jsonl").write_text('{"step": 2}\n')
    found = integrity.full_check(tmp_path / "a")
    assert list(found.content) == ["params"] and list(found.record) == ["log.jsonl"]
    with pytest.raises(RequestError, match=r"a: damaged \(params: .*remove this folder and run the stage"):
        artifact.load(tmp_path / "a")


@pytest.mark.parametrize("name", ["tokenizer/chat_template.jinja", "tokenizer", "params", "manifest.json"])
def test_a_link_out_of_an_artifact_is_refused(saved, tmp_path, name):
    """What a link stands for was copied into the artifacts that were made from this one."""
    shutil.copytree(saved, tmp_path / "a")
    shutil.move(tmp_path / "a" / name, tmp_path / "elsewhere")
    (tmp_path / "a" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=rf"a/{name}: is a link to (the folder )?{tmp_path}/elsewhere"):
        artifact.load(tmp_path / "a")


@pytest.mark.parametrize(("layers", "said"), [(10**9, "damaged manifest"), (99_999, "99,999 layers, and no array")])
def test_layers_beyond_those_of_the_arrays_are_refused(saved, tmp_path, layers, said):
    """As an earlier llmctl may have saved it, without checksums; lists of the layers filled the memory."""
    shutil.copytree(saved, tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text()) | {"checksums": None}
    manifest["model"]["layers"] = layers
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match=said):
        artifact.load(tmp_path / "a")


def test_arrays_beyond_the_memory_are_refused_before_they_are_read(saved, monkeypatch):
    monkeypatch.setattr(artifact.limits, "memory", lambda: 100)
    with pytest.raises(RequestError, match="its arrays would take"):
        artifact.load(saved)


@pytest.mark.parametrize(
    "record",
    [
        {"parts": {"": ["float31", [2]]}},
        {"parts": {"": ["float32", [-2]]}},
        {"parts": {"": ["float32", [2.5]]}},
        {"parts": {"": [None, [2]]}},
        {"parts": [1]},
        {"parts": {}},
        {},
        {"node": ["low_rank"], "parts": {}},
        {"node": "nobody's", "parts": {"": ["float32", [2]]}},
        {"node": "quantized", "parts": {"": ["float32", [2]]}},
        {"node": "low_rank", "parts": {"a": ["float32", [2]]}},
        {"node": "nf4", "parts": {"codes": ["int4", [3, 8, 4]], "scale": ["float32", [3, 3, 4]]}},
    ],
)
def test_records_of_weights_that_make_no_sense(saved, tmp_path, record):
    """An artifact of an earlier llmctl has no checksums."""
    shutil.copytree(saved, tmp_path / "odd")
    values = json.loads((saved / "manifest.json").read_text())
    name = next(iter(values["weights"]))
    values["weights"][name] = record
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(values | {"checksums": None}))
    with pytest.raises(RequestError, match=r"odd.*(damaged|parameters contradict|nobody's)"):
        artifact.abstract(tmp_path / "odd")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"format": 1, "config": ' + '{"a": ' * 5000, "nested deeper"),
        ("\udce9", "not UTF-8"),
        ("[]", "list"),
        ("", ""),
    ],
)
def test_manifests_that_are_no_manifests(tmp_path, text, why):
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RequestError, match=f"damaged manifest .*{why}"):
        artifact.read_manifest(tmp_path)


@pytest.mark.parametrize("sizes", [{"layers": 10**9}, {"vocab_size": 2**31}, {"d_ff": 10**30}])
def test_sizes_that_no_model_has(sizes):
    """Abstract parameters of 10^9 layers took minutes."""
    with pytest.raises(ValueError, match=r"less than|64 bits"):
        ModelConfig(**{**SIZES, **sizes})


def test_planned_dtypes_are_float32_for_trained_arrays_alone():
    a = jax.ShapeDtypeStruct((2,), jax.numpy.bfloat16)
    planned = abstract_artifact.masters({"frozen": a, "trained": a}, "trained".__eq__)
    assert {name: b.dtype.name for name, b in planned.items()} == {"frozen": "bfloat16", "trained": "float32"}
