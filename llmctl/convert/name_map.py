"""Convert parameters to and from tensors of the Hugging Face format by a name map, one parameter at a time.

llmctl's parameters stack layers on axis 0, and its matrices are [in, out]. The name map describes how the Hugging Face
format differs.

Example:
    >>> from llmctl.convert import architectures
    >>> cfg = ModelConfig(preset="llama-tiny")
    >>> query = tensor_layouts(cfg, *architectures.of(cfg))["model.layers.0.self_attn.q_proj.weight"].slots[0]
    >>> query.path, query.layer, query.shape, query.transposed
    ('decoder/blocks/attn/q/kernel', 0, (128, 128), True)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.convert.lazy_tensors import Tensor, Tensors, common, listed
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.hf_names import Bridge, Head


@dataclass(frozen=True)
class Pending:
    """Describe a parameter of llmctl whose values are not read yet. The shard of each device can be read separately."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]
    """Function from an index (a tuple of slices) to the values at this index. The empty index () means the complete
    parameter."""


Place = Callable[[str, Pending], Any]
"""Function that reads a parameter, and places it on its devices. Its arguments are the parameter's path and its
`Pending`. It returns the array."""


@dataclass(frozen=True)
class Slot:
    """Describe where llmctl stores a tensor of the Hugging Face format: as one layer of a stacked parameter.

    A fused tensor, such as one with queries, keys and values, has one Slot for each of its parameters.
    """

    path: str
    """Path of the parameter in llmctl."""
    layer: int
    """Index of the layer; -1 if the parameter is not stacked."""
    shape: tuple[int, ...]
    """Shape of one layer of the parameter, in llmctl's layout."""
    first: int
    """Index of the tensor's first output that belongs to the parameter; 0 if the tensor is not fused."""
    transposed: bool


@dataclass(frozen=True)
class TensorLayout:
    """List the Slots of one tensor of the Hugging Face format: several for a fused tensor, otherwise one.

    In llmctl's layout [in, out], a fused tensor is the concatenation of its parameters along the last axis.
    """

    slots: tuple[Slot, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor in the Hugging Face format."""
        first = self.slots[0]
        ours = (*first.shape[:-1], sum(s.shape[-1] for s in self.slots))
        return ours[::-1] if first.transposed else ours


def tensor_layouts(cfg: ModelConfig, bridge: Bridge, head: Head, bare: bool = False) -> dict[str, TensorLayout]:
    """Return all tensors that a model with this config has in the Hugging Face format, by name.

    Args:
        cfg: Config of the model.
        bridge: Conversion of the config and tensor names of the model's family.
        head: Conversion of the model's output head.
        bare: Whether to omit the prefix of the names, such as "bert.", as transformers does for models without a head.

    Raises:
        RequestError: If the name map lacks a parameter of the config.
    """
    table = bridge.table(cfg, head, bare)
    expected = weights.flatten(functional.abstract(cfg))
    if unknown := [p for p in expected if p not in table]:
        raise RequestError(f"{bridge.model_type} models have no place for {listed(unknown)}")
    parts: dict[str, list[tuple[int, Slot]]] = {}
    for path, theirs in table.items():
        if path not in expected:
            continue
        stem, _, part = theirs.partition("#")
        shape = tuple(expected[path].shape)
        stacked = "{}" in stem
        for layer in range(shape[0]) if stacked else (-1,):
            name = stem.format(layer)
            turned = weights.is_kernel(path) and not (bridge.in_out and re.search(bridge.in_out, name))
            slot = Slot(path, layer, shape[1:] if stacked else shape, 0, turned)
            parts.setdefault(name, []).append((int(part or 0), slot))
    out = {}
    for name, found in parts.items():
        slots, first = [], 0
        for _, slot in sorted(found, key=lambda f: f[0]):
            slots.append(Slot(slot.path, slot.layer, slot.shape, first, slot.transposed))
            first += slot.shape[-1]
        out[name] = TensorLayout(tuple(slots))
    return out


def read(
    cfg: ModelConfig,
    wanted: Mapping[str, TensorLayout],
    tensors: Tensors,
    place: Place,
    *,
    dtype: np.dtype | None = None,
    wrote: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Assemble llmctl's parameters from tensors of the Hugging Face format.

    Host memory contains only one device's shard of one parameter at a time.

    Args:
        cfg: Config of the model.
        wanted: Tensors of the format by name, as `tensor_layouts` returns them for this config.
        tensors: Tensors of the model's files, which `check` has accepted.
        place: Function that reads a parameter and puts it on its devices.
        dtype: Dtype of all parameters. If None, each parameter keeps the dtype of its tensors. If these tensors have
            different dtypes, the parameter gets the narrowest dtype that suits all (see `common`).
        wrote: Function that is called after each slice of a tensor was read, with the size of the slice in bytes.

    Returns:
        The parameter tree of the arrays that `place` returned.
    """
    pieces = _pieces(wanted)
    flat = {}
    for path, abstract in weights.flatten(functional.abstract(cfg)).items():
        kind = dtype or common(tensors[name].dtype for _, name in pieces[path])
        part = partial(_part, pieces[path], tensors, tuple(abstract.shape), kind, wrote)
        flat[path] = place(path, Pending(tuple(abstract.shape), kind, part))
    return weights.unflatten(flat)


def _pieces(wanted: Mapping[str, TensorLayout]) -> dict[str, list[tuple[Slot, str]]]:
    """Return the Slots of every parameter with the names of their tensors: {parameter path: [(Slot, tensor name)]}."""
    found: dict[str, list[tuple[Slot, str]]] = {}
    for name, joint in wanted.items():
        for slot in joint.slots:
            found.setdefault(slot.path, []).append((slot, name))
    return found


def mixed(wanted: Mapping[str, TensorLayout], tensors: Tensors) -> str:
    """Describe the parameters whose layers are stored in different dtypes; return "" if there are none."""
    odd: dict[tuple[str, ...], int] = {}
    for slots in _pieces(wanted).values():
        kinds = {tensors[name].dtype for _, name in slots}
        if len(kinds) > 1:
            at = (*sorted(k.name for k in kinds), common(kinds).name)
            odd[at] = odd.get(at, 0) + 1
    return "; ".join(
        f"{n} parameters have layers in {' and '.join(kinds)}, and become {into}, which holds both exactly"
        for (*kinds, into), n in sorted(odd.items())
    )


def _part(
    sources: list[tuple[Slot, str]],
    tensors: Tensors,
    shape: tuple[int, ...],
    dtype: np.dtype,
    wrote: Callable[[int], None],
    index: tuple[slice, ...] = (),
) -> np.ndarray:
    """Return the slice `index` of a parameter, such as the shard that one device holds.

    Files are memory-mapped, so only the bytes of the slice are read.
    """
    ranges = [range(n)[s] for n, s in zip(shape, index or (slice(None),) * len(shape), strict=True)]
    out = np.empty([len(r) for r in ranges], dtype)
    for slot, name in sources:
        if slot.layer >= 0 and slot.layer not in ranges[0]:
            continue
        array = tensors[name].read()
        array = array.T if slot.transposed else array
        array = array[..., slot.first : slot.first + slot.shape[-1]]
        inside = ranges if slot.layer < 0 else ranges[1:]
        target = out if slot.layer < 0 else out[ranges[0].index(slot.layer)]
        target[...] = array[tuple(slice(r.start, r.stop, r.step) for r in inside)]
        wrote(target.nbytes)
    return out


def check(where: str, wanted: Mapping[str, TensorLayout], tensors: Tensors, ignored: tuple[str, ...] = ()) -> None:
    """Check that the names and shapes of the tensors are as expected.

    Other tensors are allowed only if a pattern in `ignored` matches their name.

    Raises:
        RequestError: If tensors are missing, unknown, of another shape, or not floating-point.
    """
    problems = []
    if missing := [n for n in wanted if n not in tensors]:
        problems.append(f"missing tensors {listed(missing)}")
    strays = [n for n in tensors if n not in wanted and not any(re.fullmatch(p, n) for p in ignored)]
    if strays:
        problems.append(
            f"tensors that are not understood: {listed(strays)} (import --drop leaves them out, which changes the "
            "answers if the model uses them)"
        )
    wrong = [n for n in wanted if n in tensors and tensors[n].shape != wanted[n].shape]
    if wrong:
        shown = listed(f"{n} is {list(tensors[n].shape)}, the config says {list(wanted[n].shape)}" for n in wrong)
        problems.append(f"shapes contradict the config: {shown}")
    integers = [n for n in wanted if n in tensors and tensors[n].dtype.kind not in "fV"]
    if integers:
        problems.append(f"tensors that are not floating-point: {listed(integers)}")
    if problems:
        raise RequestError(f"{where}: {'; '.join(problems)}")


def write(
    params: dict[str, Any], wanted: Mapping[str, TensorLayout], dtype: np.dtype | None = None
) -> dict[str, Tensor]:
    """Return llmctl's parameters as tensors of the Hugging Face format, by name.

    A tensor is copied to the host when it is read. Quantized, sparse and adapted weights become dense arrays.
    """
    flat = weights.flatten(params)

    def tensor(joint: TensorLayout) -> Tensor:
        kind = dtype or common(np.dtype(flat[s.path].dtype) for s in joint.slots)

        def fetch() -> np.ndarray:
            arrays = [_slice(flat[s.path], s.layer, kind) for s in joint.slots]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
            return array.T if joint.slots[0].transposed else array

        return Tensor(joint.shape, kind, fetch)

    return {name: tensor(joint) for name, joint in wanted.items()}


def _slice(w: Any, layer: int, dtype: np.dtype) -> np.ndarray:
    one = jax.tree.map(lambda a: host(a, layer), w)
    if not weights.is_plain(one):
        one = weights.dense(jax.tree.map(jnp.asarray, one))
    return np.asarray(one).astype(dtype, copy=False)


def host(a: jax.Array, layer: int = -1) -> np.ndarray:
    """Copy one layer of a stacked array to the host, or the complete array if `layer` is -1.

    On a CPU, the result is a view. From other devices, only the layer is transferred.
    """
    if len(a.devices()) == 1 and next(iter(a.devices())).platform == "cpu":
        whole = np.asarray(a)
        return whole if layer < 0 else whole[layer]
    return np.asarray(a if layer < 0 else a[layer])
