"""The quantize stage: integers on disk, bits and bytes that fall as claimed, and chains with what came before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from llmctl.artifacts import artifact
from llmctl.artifacts.workspace import Context
from llmctl.compress.quantization.schemes import SCHEMES
from llmctl.config.base import keyed
from llmctl.config.errors import RequestError
from llmctl.model import weights
from llmctl.pipeline.stages import prune
from llmctl.pipeline.stages import quantize as stage


def run(folder, tmp_path, parent, **settings):
    (tmp_path / "work").mkdir(exist_ok=True, parents=True)
    ctx = Context(tmp_path / "out", tmp_path / "work", "key")
    stage.run(stage.Config(**settings), folder / parent, ctx)
    return artifact.load(ctx.out)


def expected_bits(params, value_bits) -> float:
    total = 0
    for w in weights.flatten(params).values():
        total += (
            w.array.qvalue.size * value_bits + w.array.scale.size * 32
            if isinstance(w, weights.Quantized)
            else w.size * 32
        )
    return total / weights.count(params)


@pytest.mark.parametrize(("settings", "type_", "most"), [
    ({"embeddings": True, "head": True}, jnp.int8, 0.02),
    ({"bits": 4, "group": 8, "activations": "int8"}, jnp.int4, 0.12),
])  # fmt: skip
def test_integers_in_the_artifact(artifacts, tmp_path, settings, type_, most):
    before = artifact.load(artifacts / "classifier")
    made = run(artifacts, tmp_path, "classifier", **settings)
    taken = {p for p, w in weights.flatten(made.params).items() if isinstance(w, weights.Quantized)}
    assert set(made.manifest.metrics["weight_error"]) == taken
    assert 0 < made.manifest.metrics["weight_error_max"] < most
    q = made.params["decoder"]["blocks"]["attn"]["q"]["kernel"]
    assert q.array.qvalue.dtype == type_ and q.activations == settings.get("activations", "")
    assert made.manifest.bits == pytest.approx(expected_bits(made.params, settings.get("bits", 8)))
    assert made.manifest.parameters == before.manifest.parameters
    assert ("embed/tokens" in taken, "head/out/kernel" in taken) == (len(settings) == 2,) * 2
    assert made.manifest.labels == ["neg", "pos"]


def test_what_stays_as_it_is_has_a_line_with_its_setting(artifacts, tmp_path, capsys):
    """8 bits a weight was followed by 27.5 bits on average, with no word about the embeddings."""
    base = artifact.load(artifacts / "classifier")
    sizes = {p: w.size / base.manifest.parameters for p, w in weights.flatten(base.params).items()}
    run(artifacts, tmp_path, "classifier")
    said = " ".join(capsys.readouterr().err.split())
    share = f"({sizes['embed/tokens']:.1%} of the weights)"
    assert f"the embeddings {share} stay float32; embeddings = true quantizes them too" in said
    assert f"task head ({sizes['head/out/kernel']:.1%} of the weights) stay float32; head = true" in said
    run(artifacts, tmp_path / "whole", "classifier", embeddings=True, head=True)
    assert "stay float32" not in capsys.readouterr().err


def test_rules_and_settings_that_are_not_read_have_a_line(artifacts, tmp_path, capsys):
    rules = {"mlp/*": "int4", "head/*": "none"}
    made = run(artifacts, tmp_path, "classifier", rules=rules, head=True, examples=3, seq_len=8)
    said = " ".join(capsys.readouterr().err.split())
    assert "examples, seq_len: not read, because method 'rtn' rounds without calibration data" in said
    assert "4 weights to int8, 3 to int4; largest relative error" in said and "head = true" not in said
    assert weights.is_plain(weights.flatten(made.params)["head/out/kernel"])


def test_int4_is_half_of_int8_on_disk(tmp_path, artifacts):
    """Values that do not compress, so that the bytes are those of the numbers."""
    base = artifact.load(artifacts / "lm")
    wide = base.model.model_copy(update={"d_model": 128, "d_ff": 512})
    from llmctl.model import functional

    params = jax.jit(lambda key: functional.init(wide, key))(jax.random.key(0))
    artifact.save(
        tmp_path / "wide", params, wide, stage="pretrain", key="k", config={}, tokenizer_dir=base.tokenizer_dir
    )
    sizes = {}
    for bits in (8, 4):
        made = run(tmp_path, tmp_path / str(bits), "wide", bits=bits, embeddings=True).manifest
        sizes[bits] = made.bytes
        assert made.weight_bytes == round(made.bits * made.parameters / 8)
    whole = artifact.read_manifest(tmp_path / "wide")
    assert whole.weight_bytes == 4 * whole.parameters and whole.bits == 32
    assert sizes[8] < 0.3 * whole.bytes
    assert sizes[4] < 0.62 * sizes[8]


def test_zeros_of_a_pruned_parent_stay(artifacts, tmp_path):
    (tmp_path / "work").mkdir()
    prune.run(
        prune.Config(method="magnitude"), artifacts / "lm", Context(tmp_path / "sparse", tmp_path / "work", "key")
    )
    sparse = artifact.load(tmp_path / "sparse")
    made = run(tmp_path, tmp_path, "sparse")
    assert made.manifest.sparsity >= sparse.manifest.sparsity == 0.5
    for path, w in weights.flatten(sparse.params).items():
        got = np.asarray(weights.dense(weights.flatten(made.params)[path]))
        assert np.all(got[np.asarray(w) == 0] == 0)


def test_zeros_do_not_come_back_through_low_rank_pairs(artifacts, tmp_path):
    """The mask is the zeros, whatever their share and number type: pruned integers, and a few zeros in a thousand."""

    def pruned(parent, out, share):
        (tmp_path / f"{out}.work").mkdir()
        ctx = Context(tmp_path / out, tmp_path / f"{out}.work", "key")
        prune.run(prune.Config(method="magnitude", sparsity=share), parent, ctx)
        return artifact.load(tmp_path / out)

    few = pruned(artifacts / "lm", "few", 0.005)
    assert few.manifest.pruned and 0 < few.manifest.sparsity < 0.01
    integers = pruned(run(artifacts, tmp_path, "lm").path, "integers", 0.3)
    assert integers.manifest.pruned and 0.3 <= integers.manifest.sparsity < 0.35
    for there in (few, integers):
        path = "decoder/blocks/attn/q/kernel"
        flat = weights.flatten(there.params)
        a, b = (jnp.ones(shape) for shape in ((3, 16, 2), (3, 2, 32)))
        flat[path] = weights.LowRank(flat[path], a, b, 0.5)
        common = {"stage": "finetune", "key": "k", "config": {}, "tokenizer_dir": there.tokenizer_dir}
        name = f"{there.path.name}.apart"
        artifact.save(tmp_path / name, weights.unflatten(flat), there.model, parent=there.manifest, **common)
        with pytest.raises(RequestError, match="merging its low-rank pairs would fill the zeros"):
            run(tmp_path, tmp_path, name)


def test_low_rank_pairs_are_merged_and_quantized(artifacts, tmp_path, capsys):
    base = artifact.load(artifacts / "lm")
    flat = weights.flatten(base.params)
    path = "decoder/blocks/attn/q/kernel"
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((3, 16, 2), (3, 2, 32))))
    flat[path] = weights.LowRank(flat[path], a, b, 0.5)
    common = {"stage": "finetune", "key": "k", "config": {}, "tokenizer_dir": base.tokenizer_dir}
    artifact.save(tmp_path / "lora", weights.unflatten(flat), base.model, **common)
    got = weights.flatten(run(tmp_path, tmp_path, "lora").params)[path]
    assert isinstance(got, weights.Quantized)
    np.testing.assert_allclose(weights.dense(got), weights.dense(flat[path]), atol=0.05)
    assert "merges the low-rank pairs" in capsys.readouterr().err

    # The same on integers (QLoRA): those many zeros are rounding, and the merged sum is quantized again.
    int4 = SCHEMES["int4"](flat[path].base, -2, 0)
    flat[path] = weights.LowRank(int4, a, b, 0.5)
    artifact.save(tmp_path / "qlora", weights.unflatten(flat), base.model, **common)
    got = weights.flatten(run(tmp_path, tmp_path, "qlora").params)[path]
    np.testing.assert_allclose(weights.dense(got), weights.dense(flat[path]), atol=0.05)
    assert "into the dequantized matrices" in capsys.readouterr().err
    with pytest.raises(RequestError, match="prune before quantizing"):
        prune.run(
            prune.Config(method="magnitude"), tmp_path / "qlora", Context(tmp_path / "no", tmp_path / "work", "k")
        )

    flat[path] = weights.LowRank(jnp.where(jnp.arange(32) % 2, weights.dense(int4), 0), a, b, 0.5)
    artifact.save(tmp_path / "holes", weights.unflatten(flat), base.model, **common)
    with pytest.raises(RequestError, match=r"holes: is pruned \(.*% zeros\), and merging"):
        run(tmp_path, tmp_path, "holes")


def test_requests_that_cannot_be_met_write_nothing(artifacts, tmp_path):
    with pytest.raises(ValidationError, match="must be 8 or 4"):
        stage.Config(bits=3)
    with pytest.raises(RequestError, match="group 7 does not divide the 16 inputs of decoder/blocks/attn/k/kernel"):
        run(artifacts, tmp_path, "lm", group=7)
    assert not (tmp_path / "out").exists()
    run(artifacts, tmp_path, "lm")
    (tmp_path / "out").rename(tmp_path / "once")
    with pytest.raises(RequestError, match="quantized already"):
        run(tmp_path, tmp_path, "once", bits=4)
    assert not (tmp_path / "out").exists()


def test_a_format_and_its_short_form_have_one_key():
    """`bits` and `format` write the same config, which is that of recipes before schemes had names."""
    assert keyed(stage.Config(format="int4")) == keyed(stage.Config(bits=4))
    assert keyed(stage.Config(format="int8")) == keyed(stage.Config())
    assert "scheme" not in keyed(stage.Config()) and stage.Config(bits=4).scheme_name == "int4"
    with pytest.raises(ValidationError, match="bits 8 contradicts format int4"):
        stage.Config(bits=8, format="int4")
    with pytest.raises(ValidationError, match="unknown scheme 'nt4', did you mean 'int4'"):
        stage.Config(format="nt4")


def test_bits_beside_a_format_of_its_own_width_are_refused(monkeypatch):
    """`bits = 4` with a package's format was read, kept in the key, and had no effect."""
    monkeypatch.setattr(SCHEMES, "own", {**SCHEMES.own, "ternary": SCHEMES.own["int8"]})
    for bits in (4, 8):
        with pytest.raises(ValidationError, match=f"bits {bits} has no meaning for format ternary"):
            stage.Config(format="ternary", bits=bits)
    assert stage.Config(format="ternary").scheme_name == "ternary"
