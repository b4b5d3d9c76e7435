"""Sizes in the files of others are compared with the bytes that are there before anything of that size is made."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from llmctl.config.errors import RequestError
from llmctl.convert import gguf, hf_export, peft, safetensors
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import of_array
from llmctl.evaluate.tasks.registry import default
from llmctl.model.config import ModelConfig

TENSORS = {"w": of_array(np.zeros(2, np.float32))}
PRESETS = ("llama-tiny", "gpt2-tiny", "bert-tiny", "t5-tiny", "mistral-7b", "gemma2-2b", "gemma3-270m")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")


@pytest.mark.parametrize("layers", [10**9, 99_999])
@pytest.mark.parametrize(
    "preset", ["llama-tiny", "gpt2-tiny", "bert-tiny", "t5-tiny", "mistral-7b", "gemma2-2b", "gemma3-270m"]
)
def test_more_layers_than_tensors_are_refused(preset, layers):
    model = ModelConfig(preset=preset)
    config = hf_export.config_of(model, default(model), [], {}, "float32") | {"layer_types": None}
    config |= {key: layers for key in LAYERS if key in config}
    with pytest.raises(RequestError, match=r"config\.json: .*(layers|less than or equal)"):
        folders.understand(Path("model"), config, TENSORS)


def test_classes_without_names_are_counted_up_to_a_limit():
    model = ModelConfig(preset="llama-tiny")
    config = hf_export.config_of(model, default(model), [], {}, "float32") | {"num_labels": 10**12}
    with pytest.raises(RequestError, match="1,000,000,000,000 classes without names"):
        folders.understand(Path("model"), config, TENSORS)


def text(value):
    return struct.pack("<Q", len(value)) + value


HUGE = 2**60
STRING, ARRAY, UINT8 = 8, 9, 4


@pytest.mark.parametrize(
    ("tensors", "pairs", "rest"),
    [
        (HUGE, 0, b""),
        (0, HUGE, b""),
        (0, 1, struct.pack("<Q", HUGE)),
        (0, 1, text(b"a") + struct.pack("<IQ", STRING, HUGE)),
        (0, 1, text(b"a") + struct.pack("<IIQ", ARRAY, UINT8, HUGE)),
        (0, 1, text(b"a") + struct.pack("<IIQ", ARRAY, ARRAY, HUGE)),
        (0, 1, text(b"a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 20_000),
        (1, 0, text(b"a") + struct.pack("<I", 2**31)),
        (1, 0, text(b"a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
        (1, 0, text(b"a") + struct.pack("<IQIQ", 1, 4, 0, HUGE)),
    ],
)
def test_counts_of_a_gguf_file_end_with_the_file(tmp_path, tensors, pairs, rest):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest + bytes(64))
    with pytest.raises(RequestError, match=r"m\.gguf: not a readable GGUF file"):
        gguf.inspect(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        b"[" * 50_000,
    ],
)
def test_sizes_of_a_safetensors_header_are_those_of_the_file(tmp_path, header):
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(RequestError):
        safetensors.read_file(tmp_path / "m")
    (tmp_path / "m").write_bytes(struct.pack("<Q", HUGE) + header)
    with pytest.raises(RequestError, match="cut off in its header"):
        safetensors.read_file(tmp_path / "m")


def test_an_adapter_s_rank_is_at_most_a_side_of_its_matrix(saved, tmp_path):
    from llmctl.artifacts import artifact

    base = artifact.abstract(saved)
    module = next(name for name in peft._layers(base.model) if name.endswith("q_proj"))
    inputs, outputs = base.model.d_model, base.model.heads * base.model.head_dim
    pair = {
        f"{peft.PREFIX}{module}.lora_A.weight": of_array(np.zeros((1000, inputs), np.float32)),
        f"{peft.PREFIX}{module}.lora_B.weight": of_array(np.zeros((outputs, 1000), np.float32)),
    }
    safetensors.write_file(tmp_path / peft.WEIGHTS, pair)
    (tmp_path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(RequestError, match="has rank 1,000, more than the sides of its matrix"):
        peft.load(base, tmp_path)
