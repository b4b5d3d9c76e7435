"""Adapters: what is stored, what is shared, where the base is looked for, and what is refused."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import abstract_artifact, artifact, integrity
from llmctl.artifacts.adapters import find_base
from llmctl.artifacts.drafts import check_draft
from llmctl.cli import app
from llmctl.cli.named_models import Draft, load_models
from llmctl.compress.quantization.quantize import quantize
from llmctl.config.errors import RequestError
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.evaluate import programs
from llmctl.model import functional, weights
from llmctl.model.array_bytes import bytes_of
from llmctl.model.config import ModelConfig
from llmctl.model.generate.decode import Decoder
from llmctl.model.generate.decoders import Decoders
from llmctl.pipeline import up_to_date
from llmctl.pipeline.recipe import Step
from llmctl.pipeline.stage import StageConfig
from llmctl.pipeline.stages import finetune

SIZES = {"vocab_size": 259, "d_model": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "d_ff": 64}
MODEL = ModelConfig(**SIZES, max_seq_len=32)
TARGETS = ("decoder/blocks/attn/q/kernel", "decoder/blocks/mlp/down/kernel")


def pairs(params, seed, rank=2):
    """The parameters with low-rank pairs on two matrices."""
    rng, flat = np.random.default_rng(seed), weights.flatten(params)
    for path in TARGETS:
        *lead, inputs, outputs = flat[path].shape
        a, b = (jnp.asarray(rng.normal(size=(*lead, *s)), jnp.float32) for s in ((inputs, rank), (rank, outputs)))
        flat[path] = weights.LowRank(flat[path], a, b, 0.5)
    return weights.unflatten(flat)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run: `base`, the same in int8 as `integers`, and adapters `one` and `two` of each (`int_one`, `int_two`)."""
    folder = tmp_path_factory.mktemp("adapters")
    ByteTokenizer.new().save(folder / "words")
    flat, rng = weights.flatten(functional.abstract(MODEL)), np.random.default_rng(0)
    params = weights.unflatten({n: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype) for n, a in flat.items()})
    common = {"key": "k", "tokenizer_dir": folder / "words", "config": {"train": {"seq_len": 16}}}
    base = artifact.save(folder / "base", params, MODEL, stage="pretrain", **common)
    small = quantize(params, scheme="int8", group=0, embeddings=False, head=False, activations="")[0]
    integers = artifact.save(folder / "integers", small, MODEL, stage="quantize", parent=base, **common)
    for prefix, tree, parent in (("", params, base), ("int_", small, integers)):
        for seed, name in enumerate(("one", "two")):
            about = {"stage": "finetune", "parent": parent, "base": tree, **common}
            artifact.save(folder / f"{prefix}{name}", pairs(tree, seed), MODEL, **about)
    artifact.save(folder / "whole", pairs(params, 0), MODEL, stage="finetune", parent=base, **common)
    return folder


@pytest.mark.parametrize("prefix", ["", "int_"])
def test_an_adapter_stores_only_what_its_base_lacks_and_loads_as_the_whole(run, prefix):
    made = artifact.load(run / f"{prefix}one")
    base = artifact.load(run / ("integers" if prefix else "base"))
    assert made.manifest.base.stored == sorted(f"{path}:{part}" for path in TARGETS for part in "ab")
    assert made.manifest.format == 2 and base.manifest.format == 1
    assert made.manifest.bytes < base.manifest.bytes / 4
    expected = weights.arrays(pairs(base.params, 0))
    found = weights.arrays(made.params)
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        assert found[name].dtype == a.dtype and np.array_equal(found[name], a), name
    if not prefix:
        whole = artifact.load(run / "whole")
        same = ("digest", "parameters", "weights", "bits", "weight_bytes", "sparsity")
        assert [getattr(whole.manifest, n) for n in same] == [getattr(made.manifest, n) for n in same]
        assert whole.manifest.content != made.manifest.content and whole.manifest.base is None


@pytest.mark.parametrize("prefix", ["", "int_"])
def test_several_adapters_share_the_arrays_of_one_base(run, prefix):
    """On live arrays: the bytes of a base and two adapters are those of one base and two adapters."""
    names = ["integers" if prefix else "base", f"{prefix}one", f"{prefix}two"]
    for order in (names, names[::-1], names[1:]):
        found = list(artifact.load_each([run / name for name in order]))
        live = {id(a): a for made in found for a in weights.arrays(made.params).values()}
        buffers = {a.unsafe_buffer_pointer(): a for a in live.values()}
        base, pair = artifact.load(run / names[0]), 2 * sum(map(sum, ((32, 32), (64, 32)))) * 2 * 4
        assert bytes_of([*buffers.values()], whole=True) == bytes_of(base.params, whole=True) + 2 * pair
        assert [made.path.name for made in found] == order


def test_a_second_folder_of_a_base_is_checked_too(run, tmp_path):
    """Its arrays are those of the base that is loaded, and its tokenizer is its own."""
    shutil.copytree(run / "base", tmp_path / "copy")
    one, copy = artifact.load_each([run / "one", tmp_path / "copy"])
    shared = weights.arrays(copy.params)
    name = next(iter(shared.keys() & weights.arrays(one.params).keys()))
    assert copy.path == tmp_path / "copy" and shared[name] is weights.arrays(one.params)[name]
    words = next(p for p in sorted((tmp_path / "copy" / "tokenizer").iterdir()) if p.is_file())
    words.write_bytes(words.read_bytes() + b" ")
    with pytest.raises(RequestError, match=r"copy: damaged \(tokenizer/"):
        list(artifact.load_each([run / "one", tmp_path / "copy"]))


def test_a_plan_counts_the_arrays_that_adapters_share_once(run):
    """The bytes are those of the live arrays of test_several_adapters_share_the_arrays_of_one_base."""
    pair = sum(map(sum, ((32, 32), (64, 32)))) * 2 * 4 * 2
    for prefix, name in (("", "base"), ("int_", "integers")):
        one, two, base = (artifact.abstract(run / n) for n in (f"{prefix}one", f"{prefix}two", name))
        whole = bytes_of(base.params, whole=True)
        assert bytes_of(programs.unshared(base, [one, base, two]), whole=True) == 2 * pair
        assert bytes_of(programs.unshared(one, [one, two]), whole=True) == pair
        assert bytes_of(programs.unshared(one, [artifact.abstract(run / "whole")]), whole=True) > whole / 2
    config = StageConfig(kind="finetune", name="made")
    base = artifact.abstract(run / "base")
    made = [
        abstract_artifact.abstract_result(
            config.model_copy(update={"name": name}), artifact.abstract(run / name).params, MODEL, base=base,
            stored=lambda name: name.rpartition(":")[2] in ("a", "b"),
        )
        for name in ("one", "two")
    ]  # fmt: skip
    assert bytes_of(programs.unshared(made[0], made), whole=True) == pair
    assert bytes_of(programs.unshared(base, made), whole=True) == 2 * pair


def test_the_base_is_found_beside_the_adapter_or_named(run, tmp_path):
    shutil.copytree(run / "one", tmp_path / "here" / "one")
    with pytest.raises(RequestError, match=r"one: its base base \(digest \w{12}\) is not beside it; --base names its"):
        artifact.load(tmp_path / "here" / "one")
    line = r"its base is base \(digest \w{12}\), and --base .*has the digest \w{12}$"
    for wrong in ("integers", "whole"):
        with pytest.raises(RequestError, match=line):
            artifact.load(tmp_path / "here" / "one", bases=[run / wrong])
    found = artifact.load(tmp_path / "here" / "one", bases=[run / "base"])
    assert found.manifest.content == artifact.read_manifest(run / "one").content
    shutil.copytree(run / "base", tmp_path / "here" / "renamed")
    assert find_base(tmp_path / "here" / "one", found.manifest).name == "renamed"
    with pytest.raises(RequestError, match=line):  # although the right one is beside it
        artifact.load(tmp_path / "here" / "one", bases=[run / "integers"])


def test_an_adapter_of_an_adapter_needs_both_bases(run, tmp_path):
    one = artifact.load(run / "one")
    tree = weights.updated(one.params, {"decoder/norm/scale": one.params["decoder"]["norm"]["scale"] + 1})
    about = {"stage": "finetune", "key": "k", "config": {}, "parent": one.manifest, "base": one.params}
    artifact.save(run / "second", tree, MODEL, **about)
    made = artifact.load(run / "second")
    assert made.manifest.base.stored == ["decoder/norm/scale"] and made.manifest.base.name == "one"
    assert weights.adapted(made.params).keys() == {*TARGETS}
    for name in ("one", "second"):
        shutil.copytree(run / name, tmp_path / name)
    assert np.array_equal(
        artifact.load(tmp_path / "second", bases=[run / "base"]).params["decoder"]["norm"]["scale"],
        tree["decoder"]["norm"]["scale"],
    )
    shutil.rmtree(run / "second")


def test_damage_of_base_and_adapter_is_found(run, tmp_path):
    for name in ("base", "one"):
        shutil.copytree(run / name, tmp_path / name)
    folder, manifest = tmp_path / "one", artifact.read_manifest(run / "one")
    assert integrity.full_check(folder) == integrity.Damage({}, {})
    content = json.loads((folder / "manifest.json").read_text())
    for edit in ({"stored": []}, {"content": "0" * 64}, {"name": "x"}):
        (folder / "manifest.json").write_text(json.dumps(content | {"base": content["base"] | edit}))
        with pytest.raises(RequestError, match="the manifest's `base` does not match what was saved"):
            artifact.load(folder)
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in content.items() if k != "base"}))
    with pytest.raises(RequestError, match="the manifest's `base` does not match"):
        artifact.read_manifest(folder)
    itself = content["base"] | {"content": "", "digest": content["digest"]}
    (folder / "manifest.json").write_text(json.dumps(content | {"checksums": None, "base": itself}))
    with pytest.raises(RequestError, match="an adapter without checksums"):
        artifact.load(folder)
    (folder / "manifest.json").write_text(json.dumps(content))
    for block in (p for p in (tmp_path / "base" / "params").rglob("*") if p.is_file() and p.stat().st_size > 10_000):
        data = block.read_bytes()
        block.write_bytes(data[: len(data) // 2] + b"damage" + data[len(data) // 2 :])
    assert "its base" in integrity.quick_check(folder, manifest).content["base"]
    with pytest.raises(RequestError, match=r"base: damaged \(params"):
        artifact.load(folder)
    shutil.rmtree(tmp_path / "base")
    assert integrity.quick_check(folder, manifest).content["base"].startswith("its base base (digest")


def test_an_adapter_is_up_to_date_only_with_its_base(run, tmp_path):
    for name in ("base", "one"):
        shutil.copytree(run / name, tmp_path / name)
    config = finetune.Config(name="one", method="lora", store="adapter")
    step = Step(config, tmp_path / "one", "base")
    assert up_to_date.why(step, "k", set()) == "" and up_to_date.is_done(step, "k")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(run / "whole", tmp_path / "base")  # another artifact of the same name
    assert "its base base (digest" in up_to_date.why(step, "k", set()) and not up_to_date.is_done(step, "k")
    outside = Step(config, tmp_path / "one", run / "base")
    assert up_to_date.is_done(outside, "k")
    named = Step(config.model_copy(update={"base": str(run / "base")}), tmp_path / "one", "base")  # of an earlier stage
    assert up_to_date.is_done(named, "k")


def test_commands_check_the_base(run, tmp_path, capsys):
    shutil.copytree(run / "one", tmp_path / "one")

    def call(*argv):
        code = app.run([*map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err.strip()

    for argv in (
        ["verify", tmp_path / "one"],
        ["generate", tmp_path / "one", "--prompt", "a"],
        ["export", tmp_path / "one", "--to", "peft", "--out", tmp_path / "peft"],
        ["quantize", tmp_path / "one", "--out", tmp_path / "small"],
        ["generate", tmp_path / "one", "--base", run / "integers", "--prompt", "a"],
    ):
        code, _, err = call(*argv)
        assert code == 2 and ("its base" in err or "damaged" in err), (argv, err)
        assert len(err.splitlines()) == 1 or argv[0] == "verify"
    assert call("verify", tmp_path / "one", "--base", run / "base", "--json")[0] == 0
    code, out, _ = call("show", tmp_path / "one", "--json")
    assert code == 0 and json.loads(out)["base"]["name"] == "base"
    assert call("generate", run / "base", "--base", run / "one", "--prompt", "a")[0] == 2
    assert not (tmp_path / "peft").exists() and not (tmp_path / "small").exists()


def served(params, decoders, names):
    """The arrays in memory of several decoders, each buffer once."""
    held = [decoders._held[name][2] for name in names]
    return {a.unsafe_buffer_pointer(): a for a in jax.tree.leaves((params, held))}.values()


@pytest.mark.parametrize("prefix", ["", "int_"])
def test_decoders_of_adapters_share_the_converted_base(run, prefix):
    """In the form of decoding steps too; and the tokens are those of merged adapters."""
    names = ["integers" if prefix else "base", f"{prefix}one", f"{prefix}two"]
    found = {made.path.name: made for made in artifact.load_each([run / name for name in names])}
    decoders = Decoders({name: (made.model, made.params) for name, made in found.items()})
    pair = 2 * sum(map(sum, ((32, 32), (64, 32)))) * 2 * 4
    alone = bytes_of([*served((), decoders, names[:1])])
    assert bytes_of([*served((), decoders, names)]) == alone + 2 * pair
    tokens = {name: next(decoders.use(name).generate([[5, 6, 7]], max_new=1)).tolist() for name in (*names, names[0])}
    merged = {name: Decoder(made.model, weights.merge_adapters(made.params)) for name, made in found.items()}
    assert tokens == {name: next(d.generate([[5, 6, 7]], max_new=1)).tolist() for name, d in merged.items()}
    assert len({str(t) for t in tokens.values()}) > 1


def test_generate_answers_with_every_adapter_or_the_selected_one(run, capsys, monkeypatch):
    def call(*argv):
        code = app.run(["generate", *map(str, argv), "--max-new", "3"])
        out, err = capsys.readouterr()
        return code, out, err.strip()

    both = ["--adapter", run / "one", "--adapter", run / "two"]
    code, out, _ = call(run / "base", *both, "--prompt", "ab", "--prompt", "cd", "--json")
    results = json.loads(out)["results"]
    assert code == 0 and [(r["adapter"], r["prompt"]) for r in results] == [
        (name, prompt) for name in ("one", "two") for prompt in ("ab", "cd")
    ]
    assert [a["artifact"] for a in json.loads(out)["adapters"]] == ["one", "two"]
    texts = {r["adapter"]: r["text"] for r in results if r["prompt"] == "ab"}
    code, out, _ = call(run / "two", "--prompt", "ab", "--json")
    assert json.loads(out)["results"][0]["text"] == texts["two"] and "adapter" not in json.loads(out)["results"][0]
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n/adapter two\nab\n/adapter three\n/adapter base\nab\n"))
    code, out, err = call(run / "base", *both, "--json")
    results = json.loads(out)["results"]
    assert [r["adapter"] for r in results] == ["one", "two", "base"] and results[1]["text"] == texts["two"]
    assert "/adapter three: no such adapter; there are base, one, two" in err
    for argv, line in (
        ([run / "integers", "--adapter", run / "one"], "one: its base is base (digest"),
        ([run / "base", "--adapter", run / "whole"], "is no adapter"),
        ([run / "base", "--adapter", run / "one", "--base", run / "base"], "leave out one of the two"),
    ):
        code, out, err = call(*argv, "--prompt", "ab")
        assert code == 2 and line in err and len(err.splitlines()) == 1 and not out, err


def test_a_draft_may_be_quantized_or_an_adapter_and_changes_no_text(run, capsys):
    """An adapter shares the arrays of its base, also if the base is the target; the report has the acceptance."""

    def call(*argv):
        code = app.run(["generate", *map(str, argv), "--prompt", "ab", "--prompt", "cde", "--json"])
        out, err = capsys.readouterr()
        return (json.loads(out) if code == 0 else code), err

    def texts(found):
        return [r["text"] for r in found["results"]]

    alone, flags = call(run / "base", "--max-new", "12")[0], ("--max-new", "12", "--draft-tokens", "3")
    for draft in ("integers", "one", "base"):
        found = call(run / "base", "--draft", run / draft, *flags)[0]
        about = found["draft"]
        assert texts(found) == texts(alone) and (about["artifact"], about["tokens"]) == (draft, 3)
        assert 0 < about["acceptance"] <= 1 <= about["tokens_per_step"] <= 4
        assert draft != "base" or about["acceptance"] == 1
    adapted = call(run / "base", "--adapter", run / "two", "--max-new", "12")[0]
    found = call(run / "base", "--adapter", run / "two", "--draft", run / "base", *flags)[0]
    assert texts(found) == texts(adapted) != texts(alone)
    named_models = load_models(run / "base", [], [], "float32", draft=Draft(run / "one", 3))
    target, draft = named_models.speculative.target, named_models.speculative.draft
    arrays = {a.unsafe_buffer_pointer(): a for a in jax.tree.leaves((target.weights, draft.weights))}
    pair = 2 * sum(map(sum, ((32, 32), (64, 32)))) * 2 * 4
    assert bytes_of([*arrays.values()]) == bytes_of(target.weights) + pair

    both = ["--adapter", run / "one", "--adapter", run / "two"]
    for argv, line in (
        ([run / "base", *both, "--draft", run / "base"], "proposes tokens for one model"),
        ([run / "base", "--beams", "2", "--draft", run / "base"], "--beams search many"),
        ([run / "base", "--draft-tokens", "2"], "is for a draft"),
    ):
        code, err = call(*argv)
        assert code == 2 and line in err and len(err.splitlines()) == 1, err


def test_a_draft_needs_the_tokenizer_and_the_architecture_of_its_target(run):
    manifest = artifact.read_manifest(run / "base")
    check_draft("draft", manifest, manifest, "target")
    changes = {
        "another tokenizer than target": {"tokenizer": "0"},
        "a draft continues texts as its target": {"model": manifest.model.model_copy(update={"head": "classify"})},
        "another number of trained prompt tokens": {"model": manifest.model.model_copy(update={"prompt_tokens": 2})},
    }
    for line, change in changes.items():
        with pytest.raises(RequestError, match=line):
            check_draft("draft", manifest.model_copy(update=change), manifest, "target")
