"""The import and export commands: round trips, and one-line errors with exit code 2 for every kind of bad input."""

import json
import shutil
import warnings
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmctl.artifacts import artifact
from llmctl.config.errors import RequestError
from llmctl.convert import compressed_tensors, safetensors
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import of_array
from llmctl.data.tokenizers import loading
from llmctl.model import weights


def test_there_and_back_is_the_same_artifact(saved, exported, call, tmp_path):
    code, made, err = call("import", exported, "--out", tmp_path / "a")
    assert code == 0, err
    before, after = artifact.read_manifest(saved), artifact.read_manifest(tmp_path / "a")
    assert made["digest"] == after.digest == before.digest
    assert after.model == before.model
    assert after.tokenizer == before.tokenizer == made["tokenizer"]
    ids = loading.load(tmp_path / "a" / "tokenizer").encode("the cat 12")
    assert ids == loading.load(saved / "tokenizer").encode("the cat 12")


def test_later_stages_see_that_another_tokenizer_was_imported(exported, call, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    said = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": "{{ messages }}"}))
    keys = {}
    for name, more in (("a", ()), ("b", ()), ("c", ("--tokenizer", other))):
        assert call("import", exported, "--out", tmp_path / name, *more)[0] == 0
        keys[name] = artifact.read_manifest(tmp_path / name).key
    assert keys["a"] == keys["b"] != keys["c"]


def test_a_chat_template_goes_out_and_comes_back(saved, call, tmp_path):
    said = "{{ bos_token }}{{ messages[0]['content'] }}"
    spoken = tmp_path / "spoken"
    shutil.copytree(saved, spoken)
    (spoken / "tokenizer" / "chat_template.jinja").write_text(said)
    artifact.write_manifest(spoken, artifact.read_manifest(spoken))
    for to, source in (("hf", tmp_path / "hf"), ("gguf", tmp_path / "gguf" / "model.gguf")):
        assert call("export", spoken, "--to", to, "--out", tmp_path / to)[0] == 0
        assert call("import", source, "--out", tmp_path / f"from-{to}")[0] == 0
        assert loading.chat_template(tmp_path / f"from-{to}" / "tokenizer") == said


def test_shards_and_types(saved, call, tmp_path):
    code, made, _ = call("export", saved, "--out", tmp_path / "hf", "--dtype", "bfloat16", "--shard-size", 2e-5)
    assert code == 0
    assert made["parity"] == 0
    assert sum(f.startswith("model-") for f in made["files"]) > 3
    assert {str(t.dtype) for t in safetensors.read_folder(tmp_path / "hf").values()} == {"bfloat16"}
    code, _, _ = call("import", tmp_path / "hf", "--out", tmp_path / "a")
    assert code == 0
    assert artifact.read_manifest(tmp_path / "a").bits == 16


def test_a_reference_is_reproduced_or_nothing_is_written(
    saved, exported, call, tmp_path, config, params, batch, logits
):
    expected = logits(config, params, batch)
    ids = np.asarray(batch["tokens"], np.int64)
    for shift, wanted in ((0.0, 0), (0.01, 2)):
        reference = tmp_path / f"{shift}.safetensors"
        safetensors.write_file(
            reference, {"input_ids": of_array(ids), "logits": of_array(expected + np.float32(shift))}
        )
        out = tmp_path / f"a{shift}"
        code, made, err = call("import", exported, "--out", out, "--reference", reference)
        assert code == wanted, err
        assert out.exists() == (wanted == 0)
        if wanted == 0:
            assert made["parity"] < 1e-4
        else:
            assert "differ by 0.01" in err


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the folder that a test may spoil, and a way to change its config and tensors."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def change(folder, tensors=lambda found: found, **config):
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    found = {k: of_array(np.array(t.read())) for k, t in safetensors.read_folder(folder).items()}
    safetensors.write_file(folder / safetensors.SINGLE, tensors(found))


def cut(folder, file=None):
    file = file or folder / safetensors.SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def shards(folder):
    """The folder's tensors again, in three files with an index."""
    found = {k: of_array(np.array(t.read())) for k, t in safetensors.read_folder(folder).items()}
    (folder / safetensors.SINGLE).unlink()
    files = safetensors.write_folder(folder, found, safetensors.total(found.values()) // 2)
    assert len(files) == 3
    return files


def without(name):
    return lambda found: {k: t for k, t in found.items() if k != name}


NORM = "model.layers.1.input_layernorm.weight"
SPOILED = {
    "cut off": cut,
    "holds a pickle (pytorch_model.bin)": lambda folder: (folder / safetensors.SINGLE).rename(
        folder / "pytorch_model.bin"
    ),
    "model-00002-of-00003.safetensors: cut off": lambda folder: cut(folder, shards(folder)[1]),
    "model-00003-of-00003.safetensors: no such file": lambda folder: shards(folder)[2].unlink(),
    "not readable JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no such file": lambda folder: (folder / "config.json").unlink(),
    f"missing tensors {NORM}": lambda folder: change(folder, without(NORM)),
    "not understood: model.layers.0.extra.weight": lambda folder: change(
        folder, lambda found: found | {"model.layers.0.extra.weight": of_array(np.zeros(3, np.float32))}
    ),
    "contradict the config": lambda folder: change(folder, intermediate_size=48),
    "missing tensors model.layers.3": lambda folder: change(folder, num_hidden_layers=4),
    "must be a multiple of kv_heads": lambda folder: change(folder, num_key_value_heads=3),
    "model_type 'mamba' is not known": lambda folder: change(folder, model_type="mamba"),
    "architecture LlamaForVision is not known": lambda folder: change(folder, architectures=["LlamaForVision"]),
    "residual_multiplier = 2.0 is not understood": lambda folder: change(folder, residual_multiplier=2.0),
    "hidden_act = 'mish' is not a known activation": lambda folder: change(folder, hidden_act="mish"),
    "rope scaling of type longrope": lambda folder: change(
        folder, rope_parameters={"rope_type": "longrope", "factor": 2.0}
    ),
    "rope scaling of type linear lacks factor": lambda folder: change(
        folder, rope_parameters={"rope_type": "linear"}
    ),
    "model_type ['llama'] is not known": lambda folder: change(folder, model_type=["llama"]),
    "names no single class": lambda folder: change(folder, architectures=[["LlamaForCausalLM"]]),
    "id2label and num_labels cannot be understood": lambda folder: change(folder, id2label={"first": "a"}),
    "num_attention_heads is missing": lambda folder: change(folder, num_attention_heads=None),
    "cannot be understood": lambda folder: change(folder, hidden_size="wide"),
    "not floating-point": lambda folder: change(
        folder, lambda found: found | {NORM: of_array(np.zeros(64, np.int32))}
    ),
    "quantized by gptq": lambda folder: change(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
    "they do not belong together": lambda folder: (folder / "tokenizer.json").write_text(
        json.dumps(json.loads((folder / "tokenizer.json").read_text()) | SMALLER)
    ),
}  # fmt: skip
SMALLER = {
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "merges": []},
}


@pytest.mark.parametrize("said", SPOILED)
def test_bad_input_is_one_line_and_leaves_nothing(said, copied, call, tmp_path):
    SPOILED[said](copied)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, made, err = call("import", copied, "--out", tmp_path / "a")
    assert (code, made) == (2, None), err
    assert said in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_import_replaces_neither_its_source_nor_what_is_no_artifact(copied, saved, exported, call, tmp_path):
    kept = tmp_path / "models" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    for out, said in (
        (copied, "would replace what it is made of"),
        (tmp_path, "would replace"),
        (kept.parent, "is there already and is not an artifact"),
        (kept, "is there already"),
    ):
        code, _, err = call("import", copied, "--out", out)
        assert code == 2, out
        assert said in err
    assert kept.read_text() == "mine"
    assert (copied / "config.json").is_file()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    code, _, err = call("import", tmp_path / "adapter", "--base", saved, "--out", saved)
    assert (code, "would replace" in err) == (2, True)
    shutil.copytree(saved, tmp_path / "old")
    code, _, err = call("import", exported, "--out", tmp_path / "old")  # an artifact that was not imported
    assert code == 2 and "--replace replaces it" in err
    assert call("import", exported, "--out", tmp_path / "old", "--replace")[0] == 0
    assert artifact.read_manifest(tmp_path / "old").stage == "import"


def test_options_without_meaning_are_refused(saved, exported, call, tmp_path):
    for argv, said in (
        (("import", exported, "--drop", "*.bias"), "--drop *.bias: not a regular expression"),
        (("export", saved, "--to", "gguf", "--dtype", "bfloat16"), "--dtype has no meaning for --to gguf"),
        (("export", saved, "--to", "peft", "--dtype", "bfloat16"), "--dtype has no meaning for --to peft"),
        (("export", saved, "--type", "q8_0"), "--type q8_0 is for --to gguf"),
    ):
        code, _, err = call(*argv, "--out", tmp_path / "x")
        assert code == 2
        assert said in err
        assert not (tmp_path / "x").exists()


def test_a_key_can_be_declared_irrelevant(copied, call, tmp_path):
    change(copied, made_up=1)
    assert call("import", copied, "--out", tmp_path / "a")[0] == 2
    assert call("import", copied, "--out", tmp_path / "a", "--ignore", "made_up")[0] == 0


def test_the_rotary_base_may_stand_beside_its_scaling(copied):
    change(copied, rope_theta=5e5, rope_parameters={"rope_type": "linear", "factor": 2.0})
    found = folders.inspect(copied).model
    assert (found.rope_theta, found.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})


def test_what_is_stored_twice_is_dropped_only_where_it_is_the_same(copied, call, tmp_path, config):
    """transformers does not tie two tables that differ; a tied table that is repeated is one table."""
    table = safetensors.read_folder(copied)["model.embed_tokens.weight"]
    change(copied, tie_word_embeddings=True)
    assert call("import", copied, "--out", tmp_path / "a")[0] == 0
    assert artifact.read_manifest(tmp_path / "a").model.tied is False
    change(copied, lambda found: found | {"lm_head.weight": of_array(np.array(table.read()))})
    assert call("import", copied, "--out", tmp_path / "b")[0] == 0
    assert artifact.read_manifest(tmp_path / "b").model.tied is True


def test_a_family_without_counterpart_and_settings_without_place_are_refused(save, config, params, call, tmp_path):
    for update, said in (({"family": "modern"}, "no counterpart"), ({"attn_softcap": 5.0}, "attn_softcap = 5.0")):
        made = save(config.model_copy(update=update), params)
        code, _, err = call("export", made, "--out", tmp_path / "x")
        assert code == 2
        assert said in err
        assert not (tmp_path / "x").exists()


def test_export_does_not_overwrite(saved, exported, call):
    code, _, err = call("export", saved, "--out", exported)
    assert code == 2
    assert "exists already" in err


def test_pruned_models_go_with_their_zeros_and_their_new_shapes(save, config, params, call, tmp_path):
    from llmctl.compress.structured_pruning import shrink

    flat = weights.flatten(params)
    up = "decoder/blocks/mlp/up/kernel"
    flat[up] = jnp.where(jnp.abs(flat[up]) < 0.1, 0, flat[up])
    cfg, cut_params = shrink.drop_layers(config, weights.unflatten(flat), {"decoder": [0, 2]})
    made = save(cfg, cut_params)
    assert call("export", made, "--out", tmp_path / "hf")[0] == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 2
    zeros = safetensors.read_folder(tmp_path / "hf")["model.layers.1.mlp.up_proj.weight"].read() == 0
    np.testing.assert_array_equal(zeros, np.asarray(flat[up][2] == 0).T)


@pytest.mark.parametrize(("bits", "group", "activations", "symmetric"), [
    (8, 0, "int8", True), (8, 16, "", True), (4, 16, "", True), (4, 0, "", True), (4, 16, "", False), (8, 0, "", False),
])  # fmt: skip
def test_quantized_models_go_dense_and_as_integers(
    bits, group, activations, symmetric, save, config, params, call, tmp_path
):
    from llmctl.compress.quantization.quantize import quantize

    quantized, _ = quantize(
        params, scheme=f"int{bits}", group=group, head=True, activations=activations, symmetric=symmetric
    )
    made = save(config, quantized)
    name = "model.layers.2.self_attn.k_proj.weight"
    ours = weights.flatten(quantized)["decoder/blocks/attn/k/kernel"]
    for to in ("hf", "compressed-tensors"):
        code, said, err = call("export", made, "--to", to, "--out", tmp_path / to)
        assert code == 0, err
        assert said["parity"] < 1e-4
        # what is not quantized may be narrower
        code, _, err = call("export", made, "--to", to, "--dtype", "bfloat16", "--out", tmp_path / f"{to}-narrow")
        assert code == 0, err
    stored = safetensors.read_folder(tmp_path / "compressed-tensors")
    scheme = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert scheme["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    assert scheme["ignore"] == []
    assert name in safetensors.read_folder(tmp_path / "hf")
    assert stored[f"{name}_scale"].shape == (32, 64 // group if group else 1)
    values = np.asarray(ours.array.qvalue[2]).astype(int).T
    if activations:
        np.testing.assert_array_equal(stored[name].read(), values.astype(np.int8), strict=True)
    else:
        first, many = int(np.asarray(stored[f"{name}_packed"].read())[0, 0].view(np.uint32)), 32 // bits
        found = [((first >> (bits * i)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(many)]
        assert found == values[0, :many].tolist()
        assert stored[f"{name}_shape"].read().tolist() == [32, 64]
    assert scheme["config_groups"]["group_0"]["weights"]["symmetric"] == symmetric
    if not symmetric:
        expected = np.asarray(weights.dense(ours))[2].T
        read = compressed_tensors.unpack("here", scheme, stored)[name].read()
        np.testing.assert_allclose(read, expected, rtol=1e-6)
        torch, theirs = pytest.importorskip("torch"), pytest.importorskip("compressed_tensors")
        layer = theirs.quantization.QuantizationConfig.model_validate(scheme).config_groups["group_0"]
        names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        parts = {n: torch.from_numpy(stored[name.removesuffix("weight") + n].read().copy()) for n in names}
        parts["weight_shape"] = parts["weight_shape"].tolist()
        packed = theirs.compressors.pack_quantized.base.PackedQuantizationCompressor
        np.testing.assert_allclose(packed.decompress(parts, layer)["weight"].numpy(), expected, rtol=1e-6)


def test_scales_of_a_tensor_an_output_and_a_group_are_read():
    values = np.arange(-12, 12, dtype=np.int8).reshape(4, 6)
    scheme = {"type": "int", "symmetric": True, "num_bits": 8}
    settings: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    settings["config_groups"] = {"group_0": {"weights": scheme}}

    def dense(scale):
        tensors = {"w": of_array(values), "w_scale": of_array(np.asarray(scale, np.float32))}
        return compressed_tensors.unpack("here", settings, tensors)["w"].read()

    np.testing.assert_array_equal(dense([2.0]), values * 2.0)
    np.testing.assert_array_equal(dense(2.0), values * 2.0)
    np.testing.assert_array_equal(dense([1.0, 2.0, 3.0, 4.0]), values * np.arange(1.0, 5)[:, None])
    np.testing.assert_array_equal(dense([[1.0, 2.0]] * 4), values * np.repeat([1.0, 2.0], 3))
    for scale in ([1.0, 2.0], [[1.0] * 4] * 4, [[[1.0]]]):
        with pytest.raises(RequestError, match=r"here: w_scale is .* does not fit w"):
            dense(scale)


@pytest.mark.parametrize("form", ["int4", "fp8_e4m3"])
def test_transformers_loads_quantized_layers_of_tied_models(form, save, config, wild, batch, logits, call, tmp_path):
    """It constructs the tied output layer, for which nothing is stored, and wants integers if `ignore` lacks it."""
    pytest.importorskip("compressed_tensors")
    hf, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from llmctl.compress.quantization.quantize import quantize

    cfg = config.model_copy(update={"tied": True})
    quantized, _ = quantize(wild(cfg), scheme=form, group=16 if form == "int4" else 0)
    code, _, err = call("export", save(cfg, quantized), "--to", "compressed-tensors", "--out", tmp_path / "ct")
    assert code == 0, err
    said = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert said["ignore"] == ["lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.float32).eval()
        with torch.no_grad():
            theirs = model(torch.tensor(np.asarray(batch["tokens"]))).logits.numpy()
    np.testing.assert_allclose(theirs, logits(cfg, quantized, batch), atol=1e-4)


@pytest.mark.parametrize(
    ("form", "group", "kind"), [("int8", 0, "int8"), ("int4", 16, "int8"), ("fp8_e4m3", 0, "fp8_e4m3")]
)
def test_static_scales_of_activations_are_those_that_the_package_reads(
    form, group, kind, save, config, params, call, tmp_path
):
    """The package's own layer rounds inputs with the stored scale, and computes our product."""
    pytest.importorskip("compressed_tensors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from safetensors.torch import load_file

    from llmctl.compress.quantization.quantize import quantize

    flat = weights.flatten(quantize(params, scheme=form, group=group)[0])
    for m in weights.matrices(params, "block"):
        scales = jnp.linspace(0.01, 0.03, 3, dtype=jnp.float32)[:, None, None]
        flat[m.path] = flat[m.path].with_activations(kind, scales)
    made = save(config, weights.unflatten(flat))
    code, said, err = call("export", made, "--to", "compressed-tensors", "--out", tmp_path / "ct")
    assert code == 0, err
    assert said["parity"] < 1e-4
    settings = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    scheme: Any = QuantizationScheme(**settings["config_groups"]["group_0"])
    inputs = scheme.input_activations
    assert (inputs.dynamic, inputs.strategy, inputs.num_bits) == (False, "tensor", 8)
    module = "model.layers.2.self_attn.k_proj."
    stored = {n.removeprefix(module): t for n, t in load_file(tmp_path / "ct" / "model.safetensors").items()}
    assert stored["input_scale"].shape == (1,) and stored["input_scale"].dtype == torch.float32
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    rounding: Any = fake_quantize
    x_q = rounding(torch.from_numpy(x), stored["input_scale"], None, inputs)
    parts = {n: t for n, t in stored.items() if n.startswith("weight")}
    reader: Any = BaseCompressor.get_value_from_registry(settings["format"])
    w = reader.decompress(parts, scheme)["weight"]
    ours = weights.layer_of(artifact.load(made).params["decoder"]["blocks"]["attn"]["k"]["kernel"], 2)
    got = ours.matmul(jnp.asarray(x), jnp.float32, weights.Product())
    np.testing.assert_allclose(got, (x_q @ w.to(torch.float32).T).numpy(), atol=2e-4)
    assert call("import", tmp_path / "ct", "--out", tmp_path / "again")[0] == 0
    again = artifact.load(tmp_path / "again").params["decoder"]["blocks"]["attn"]["k"]["kernel"]
    np.testing.assert_allclose(np.asarray(again[2]), np.asarray(ours.dense()), rtol=3e-7)


@pytest.mark.parametrize("form", ["fp8_e4m3", "nvfp4"])
def test_floats_are_those_that_the_package_reads_and_come_back(form, save, config, params, call, tmp_path):
    """Codes and scales bit for bit, and the package's own decompression; an import has the same weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    from llmctl.compress.quantization.quantize import quantize

    activations = "fp8_e4m3" if form == "fp8_e4m3" else ""
    made = save(config, quantize(params, scheme=form, head=True, activations=activations)[0])
    for more in ((), ("--dtype", "bfloat16")):
        code, said, err = call(
            "export", made, "--to", "compressed-tensors", *more, "--out", tmp_path / f"ct{len(more)}"
        )
        assert code == 0, err
        assert said["parity"] < 1e-4
    settings = json.loads((tmp_path / "ct0" / "config.json").read_text())["quantization_config"]
    reader = compressors.BaseCompressor.get_value_from_registry(settings["format"])
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    assert (scheme.input_activations is not None) == bool(activations)
    assert not activations or (scheme.input_activations.type, scheme.input_activations.dynamic) == ("float", True)
    module = "model.layers.2.self_attn.k_proj."
    stored = {n.removeprefix(module): t for n, t in load_file(tmp_path / "ct0" / "model.safetensors").items()}
    theirs = reader.decompress({n: t for n, t in stored.items() if n.startswith("weight")}, scheme)["weight"]
    ours = artifact.load(made).params["decoder"]["blocks"]["attn"]["k"]["kernel"]
    dense = np.asarray(ours.dense()[2]).T
    # The package decompresses nvfp4 to bfloat16.
    np.testing.assert_allclose(theirs.to(torch.float32).numpy(), dense, rtol=2**-6 if form == "nvfp4" else 0)
    if form == "nvfp4":
        np.testing.assert_array_equal(stored["weight_packed"].numpy(), np.asarray(ours.codes[2]).T)
        scale = stored["weight_scale"].to(torch.float32).numpy()
        np.testing.assert_array_equal(scale, np.asarray(ours.scale[2], np.float32).T)
    code, _, err = call("import", tmp_path / "ct0", "--out", tmp_path / "again")
    assert code == 0, err
    again = artifact.load(tmp_path / "again").params["decoder"]["blocks"]["attn"]["k"]["kernel"]
    np.testing.assert_allclose(np.asarray(again[2]).T, dense, rtol=3e-7)


def test_float_formats_without_a_place_are_refused(save, config, params, call, tmp_path):
    from llmctl.compress.quantization.quantize import quantize

    for form, group, name in (("fp8_e4m3", 16, "float8_e4m3fn"), ("fp8_e5m2", 0, "float8_e5m2"), ("nf4", 32, "nf4")):
        made = save(config, quantize(params, scheme=form, group=group)[0])
        code, _, err = call("export", made, "--to", "compressed-tensors", "--out", tmp_path / "no")
        assert code == 2 and f"compressed-tensors does not hold {name} weights" in err
        assert not (tmp_path / "no").exists()


def test_layers_of_several_types_become_one_that_holds_them_exactly(copied, call, tmp_path):
    up = "model.layers.{}.mlp.up_proj.weight".format
    kinds = {up(0): np.dtype("float16"), up(1): np.dtype(ml_dtypes.bfloat16), up(2): np.dtype(ml_dtypes.bfloat16)}
    kinds["model.layers.0.mlp.down_proj.weight"] = np.dtype(ml_dtypes.float8_e4m3fn)
    kinds |= {f"model.layers.{i}.mlp.down_proj.weight": np.dtype(ml_dtypes.bfloat16) for i in (1, 2)}
    change(copied, lambda found: found | {n: of_array(found[n].read().astype(k)) for n, k in kinds.items()})
    stored = {n: np.array(t.read()) for n, t in safetensors.read_folder(copied).items()}
    code, _, err = call("import", copied, "--out", tmp_path / "a")
    assert code == 0, err
    assert "layers in bfloat16 and float16, and become float32" in err
    assert "layers in bfloat16 and float8_e4m3fn, and become bfloat16" in err
    mlp = artifact.load(tmp_path / "a").params["decoder"]["blocks"]["mlp"]
    assert (mlp["up"]["kernel"].dtype, mlp["down"]["kernel"].dtype) == (jnp.float32, jnp.bfloat16)
    for part in ("up", "down"):
        for i in range(3):
            theirs = stored[f"model.layers.{i}.mlp.{part}_proj.weight"].astype(np.float32).T
            np.testing.assert_array_equal(np.asarray(mlp[part]["kernel"][i], np.float32), theirs)
    code, _, err = call("import", copied, "--out", tmp_path / "b", "--dtype", "bfloat16")
    assert (code, "become" in err) == (0, False)


@pytest.mark.parametrize("at", ["config.json", "generation_config.json"])
def test_every_end_token_of_a_folder_ends_an_answer_and_goes_out_again(at, copied, call, tmp_path):
    from llmctl.model.generate.continuations import end_ids

    said = json.loads((copied / at).read_text()) if (copied / at).is_file() else {}
    (copied / at).write_text(json.dumps(said | {"eos_token_id": [2, 0]}))
    # with another folder's tokenizer too
    words = tmp_path / "words"
    words.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copied / file, words / file)
    for name, more in (("a", ()), ("b", ("--tokenizer", words))):
        assert call("import", copied, "--out", tmp_path / name, *more)[0] == 0
        folder = tmp_path / name / "tokenizer"
        assert end_ids(folder, loading.load(folder)) == [0, 2]
    assert call("export", tmp_path / "a", "--out", tmp_path / "hf")[0] == 0
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / file).read_text())["eos_token_id"] == [2, 0]


def test_a_link_out_of_a_model_folder_is_refused_and_one_into_the_cache_s_blobs_is_read(exported, call, tmp_path):
    snapshot = tmp_path / "models--us--it" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--us--it" / "blobs").mkdir()
    for i, file in enumerate(sorted(exported.iterdir())):
        shutil.copy(file, tmp_path / "models--us--it" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    code, made, _ = call("import", snapshot, "--out", tmp_path / "a")
    assert code == 0 and made["tokenizer"]
    assert not [p for p in (tmp_path / "a").rglob("*") if p.is_symlink()]
    (tmp_path / "secret").write_text("{}")
    (snapshot / "chat_template.jinja").symlink_to(tmp_path / "secret")
    code, _, said = call("import", snapshot, "--out", tmp_path / "b")
    assert code == 2 and f"chat_template.jinja: is a link to {tmp_path}/secret, outside" in said
    code, _, said = call("import", exported, "--tokenizer", snapshot, "--out", tmp_path / "b")
    assert code == 2 and "chat_template.jinja: is a link to" in said
    assert not (tmp_path / "b").exists()
