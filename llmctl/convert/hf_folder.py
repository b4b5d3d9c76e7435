"""Read a model from a Hugging Face folder (config.json and safetensors)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from llmctl.config import containment
from llmctl.config.errors import RequestError
from llmctl.config.limits import LABELS
from llmctl.config.text_input import parse_json
from llmctl.convert import architectures, compressed_tensors, name_map, safetensors
from llmctl.convert.lazy_tensors import Tensor, Tensors, listed
from llmctl.evaluate.tasks import registry
from llmctl.model.config import ModelConfig, family
from llmctl.model.head_kinds import HEAD_KINDS
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge, Head

CONFIG = "config.json"

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


@dataclass(frozen=True)
class Found:
    """Describe a model in a folder. The names and shapes of its tensors are known; the values are not read yet."""

    model: ModelConfig
    tensors: Tensors
    wanted: dict[str, name_map.TensorLayout]
    labels: list[str]
    task: str
    """Name of the task that the model was trained for, according to config.json."""
    fitted: Fields
    """Values that were fitted on a validation split after training, such as the decision threshold of each class."""
    config: Fields
    """Content of the folder's config.json."""

    @property
    def nbytes(self) -> int:
        """Return the size in bytes of the tensors that will be read."""
        return sum(self.tensors[n].nbytes for n in self.wanted)

    @property
    def rounded(self) -> bool:
        """Return True if any tensor to read is stored as quantized integers, which are dequantized on reading."""
        return any(self.tensors[n].rounded for n in self.wanted)


def read_json(path: Path) -> Fields:
    """Return the JSON object in a file.

    Raises:
        RequestError: If the file is missing, unreadable, or contains no JSON object.
    """
    try:
        content = parse_json(containment.regular(path).read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:
        raise RequestError(f"{path}: not readable JSON ({e})") from None
    if not isinstance(content, dict):
        raise RequestError(f"{path}: not a JSON object")
    return content


def inspect(
    folder: Path,
    ignore: tuple[str, ...] = (),
    drop: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Check a Hugging Face folder and describe its model. Only names and shapes of tensors are read.

    Args:
        folder: Folder with config.json and safetensors, as a single file or shards with an index.
        ignore: Keys of config.json that are known to be irrelevant.
        drop: Regular expressions for the names of tensors to omit.
        say: Function that is called with one line of text if the folder contains the weights twice.

    Raises:
        RequestError: If an architecture or key is unknown. If the weights are a pickle, or a file is damaged. If
            tensors contradict the config. If a link leads out of the folder.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder")
    containment.check(folder)
    config = read_json(folder / CONFIG)
    return understand(folder, config, safetensors.read_folder(folder, say), ignore, drop)


def understand(
    folder: Path, config: Fields, tensors: Tensors, ignore: tuple[str, ...] = (), drop: tuple[str, ...] = ()
) -> Found:
    """Check that a config.json and tensors define a model that llmctl supports, and describe the model.

    Args:
        folder: Folder of the model, for error messages and further config files.
        config: Content of config.json.
        tensors: Tensors by name. Values are read only if two tensors must be equal.
        ignore: Keys of config.json that are known to be irrelevant.
        drop: Regular expressions for the names of tensors to omit.

    Raises:
        RequestError: If an architecture or key is unknown, or if tensors contradict the config.
    """
    where = folder / CONFIG
    known = architectures.bridges()
    if config.get("model_type") not in list(known):
        raise RequestError(
            f"{where}: model_type {config.get('model_type')!r} is not known; known: {', '.join(sorted(known))}"
        )
    name, bridge = known[config["model_type"]]
    config = dict(config)
    if quantized := config.pop("quantization_config", None):
        tensors = compressed_tensors.unpack(str(where), quantized, tensors)
    tensors = {_current_name(bridge, n): t for n, t in tensors.items() if not any(re.fullmatch(p, n) for p in drop)}
    key, head = _head(where, config, bridge, tensors)
    keys = Keys(config, frozenset(ignore))
    try:
        fields = bridge.from_config(keys)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, KeyError) as e:
        raise RequestError(f"{where}: cannot be understood ({'; '.join([*keys.problems, str(e)])})") from None
    word = key.partition("+")[0]
    labels = _labels(where, config) if HEAD_KINDS[word].labelled else []
    task = registry.of_problem(word, config.get("problem_type"))
    fitted = registry.TASKS[task].fitted_of(keys, labels)
    keys.finish(str(where))
    fields = {
        **family(name).FLAGS, **fields, **head.fields, "family": name, "head": word, "labels": len(labels),
    }  # fmt: skip
    if HEAD_KINDS[word].bare:
        fields["pooling"] = _pooling(folder)
    model = _model(where, fields)
    if (layers := model.layers + model.encoder_layers) > len(tensors):
        raise RequestError(f"{where}: has {layers:,} layers, and the files hold {len(tensors):,} tensors")
    prefix = head.prefix or bridge.prefix
    bare = bool(prefix) and not any(n.startswith(prefix) for n in tensors)
    table = bridge.table(model, head, bare)
    model = _as_stored(model, table, tensors, config)
    wanted = name_map.tensor_layouts(model, bridge, head, bare)
    copies = _copies(bridge, table, tensors, model)
    _check_copies(folder, copies, tensors)
    name_map.check(str(folder), wanted, tensors, (*bridge.buffers, *map(_exactly, copies)))
    return Found(model, tensors, wanted, labels, task, fitted, config)


def _current_name(bridge: Bridge, name: str) -> str:
    """Return the current name of a tensor. Older files have other name endings, such as LayerNorm.gamma."""
    return next((name.removesuffix(old) + new for old, new in bridge.renamed.items() if name.endswith(old)), name)


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


def _model(where: Path, fields: Fields) -> ModelConfig:
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as e:
        first = e.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise RequestError(f"{where}: {at + ': ' if at else ''}{first['msg']}") from None


def _head(where: Path, config: Fields, bridge: Bridge, tensors: Tensors) -> tuple[str, Head]:
    declared = config.get("architectures") or [bridge.heads["lm"].architecture]
    if not isinstance(declared, list) or len(declared) != 1 or not isinstance(declared[0], str):
        raise RequestError(f"{where}: architectures = {declared!r} names no single class")
    name = bridge.renamed.get(declared[0], declared[0])
    found = [(k, h) for k, h in bridge.heads.items() if h.architecture == name]
    if not found:
        known = sorted({h.architecture for h in bridge.heads.values()})
        raise RequestError(f"{where}: architecture {name} is not known; known: {', '.join(known)}")
    # BERT's original files declare masked language modelling only, but also hold the next-sentence head.
    both = bridge.heads.get(f"{found[0][0]}+next_sentence")
    if both and all(n in tensors for n in both.names.values() if n not in found[0][1].names.values()):
        return f"{found[0][0]}+next_sentence", both
    numbers = len(_labels(where, config)) == 1 or config.get("problem_type") == "regression"
    return next(((k, h) for k, h in found if numbers and HEAD_KINDS[k].scalar), found[0])


def _labels(where: Path, config: Fields) -> list[str]:
    """Return the class names in a config.

    If the config declares neither names nor a number of classes, the result has two classes, as in transformers.
    """
    given = config.get("id2label")
    try:
        if isinstance(given, dict):
            return [str(v) for _, v in sorted(given.items(), key=lambda kv: int(kv[0]))]
        count = int(config.get("num_labels") or 2)
        if count > LABELS:
            raise ValueError(f"{count:,} classes without names; {LABELS:,} at most")
        return [f"LABEL_{i}" for i in range(count)]
    except (ValueError, TypeError) as e:
        raise RequestError(f"{where}: id2label and num_labels cannot be understood ({e})") from None


def _pooling(folder: Path) -> str:
    """Return the pooling that the sentence-transformers files declare, or "mean" if there are no such files."""
    files = [f for f in sorted(folder.glob("*_Pooling/config.json")) if f.is_file()]
    if not files:
        return "mean"
    modes = [k for k, v in read_json(files[0]).items() if k.startswith("pooling_mode_") and v is True]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise RequestError(f"{files[0]}: pooling {', '.join(modes) or 'of no kind'} is not supported")
    return POOLINGS[modes[0]]


def _as_stored(model: ModelConfig, table: dict[str, str], tensors: Tensors, config: Fields) -> ModelConfig:
    """Correct the fields `tied` and `pooler` of a config, which depend on the stored tensors.

    `tied` becomes false if a stored output projection differs from the embedding table. `pooler` of an embedding model
    becomes false if no pooler is stored.
    """
    update: Fields = {}
    table_out, table_in = table.get("lm_head/kernel"), table["embed/tokens"]
    if model.head_kind.vocabulary and table_out and table_out in tensors:
        update["tied"] = model.tied and _same(tensors[table_out], tensors.get(table_in))
    elif model.head_kind.vocabulary and model.family == "t5":  # transformers 5 ties the tables unless both are stored
        update["tied"] = True
    if model.head_kind.bare and model.pooler:
        update["pooler"] = table["head/pooler/kernel"] in tensors
    return _model(Path(CONFIG), {**model.model_dump(), **update})


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and np.array_equal(a.read(), b.read())


def _copies(bridge: Bridge, table: dict[str, str], tensors: Tensors, model: ModelConfig) -> dict[str, str]:
    """Return the tensors that must equal another stored tensor: {name: name of the other tensor}.

    Such a tensor is an output projection that is tied to the embedding table, or a copy that `Bridge.copies` lists.
    """
    copies = {k: v for k, v in bridge.copies.items() if k in tensors}
    if model.tied and model.head_kind.vocabulary and table.get("lm_head/kernel") in tensors:
        copies[table["lm_head/kernel"]] = table["embed/tokens"]
    return copies


def _check_copies(folder: Path, copies: dict[str, str], tensors: Tensors) -> None:
    odd = [f"{k} and {v}" for k, v in copies.items() if v in tensors and not _same(tensors[k], tensors[v])]
    if odd:
        raise RequestError(f"{folder}: tensors that should be the same differ: {listed(odd)}")


def load(
    found: Found,
    place: name_map.Place,
    dtype: np.dtype | None = None,
    wrote: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Read the parameters of a model that `inspect` described, one at a time.

    Args:
        found: Result of `inspect`.
        place: Function that reads a parameter and places it on devices.
        dtype: Dtype of the parameters; if None, the stored dtype.
        wrote: Function that is called after each slice of a tensor was read, with the size of the slice in bytes.

    Returns:
        The parameter tree of the arrays that `place` returned.
    """
    return name_map.read(found.model, found.wanted, found.tensors, place, dtype=dtype, wrote=wrote)
