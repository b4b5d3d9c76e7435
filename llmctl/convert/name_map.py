"""A family's name map applied: their tensors into our tree, and our tree as their tensors, one at a time.

Our layers are stacked on axis 0 and our matrices are [in, out]; what differs on the other side is in the name map.
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
from llmctl.convert.lazy_tensors import Tensor, Tensors, listed
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.model.hf_config import Bridge, Head


@dataclass(frozen=True)
class Pending:
    """One of our parameters, in their tensors still; a device's part of it is read alone."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]
    """Index of a part -> the part; () is the whole."""


Place = Callable[[str, Pending], Any]
"""(our path, parameter) -> the array where it is to stay."""


@dataclass(frozen=True)
class Slot:
    """One of our matrices or vectors as a piece of one of their tensors."""

    path: str
    """Our parameter."""
    layer: int
    """Its layer, or -1 where it is not stacked."""
    shape: tuple[int, ...]
    """Our shape, without layers."""
    first: int
    """Where its outputs begin in their tensor."""
    transposed: bool


@dataclass(frozen=True)
class Joint:
    """One of their tensors: the pieces of ours that it is made of, along our last axis."""

    slots: tuple[Slot, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        first = self.slots[0]
        ours = (*first.shape[:-1], sum(s.shape[-1] for s in self.slots))
        return ours[::-1] if first.transposed else ours


def joints(cfg: ModelConfig, bridge: Bridge, head: Head, bare: bool = False) -> dict[str, Joint]:
    """Every tensor that the other side has for this config, by its name there.

    Raises:
      RequestError: the config has parameters that the name map does not know.
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
            turned = path.endswith("/kernel") and not (bridge.in_out and re.search(bridge.in_out, name))
            slot = Slot(path, layer, shape[1:] if stacked else shape, 0, turned)
            parts.setdefault(name, []).append((int(part or 0), slot))
    out = {}
    for name, found in parts.items():
        slots, first = [], 0
        for _, slot in sorted(found, key=lambda f: f[0]):
            slots.append(Slot(slot.path, slot.layer, slot.shape, first, slot.transposed))
            first += slot.shape[-1]
        out[name] = Joint(tuple(slots))
    return out


def read(
    cfg: ModelConfig,
    wanted: Mapping[str, Joint],
    tensors: Tensors,
    place: Place,
    *,
    dtype: np.dtype | None = None,
    wrote: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Our parameters from their tensors; what one device holds of one parameter is in host memory at a time.

    Args:
      cfg: the model that the tensors are of.
      wanted: what `joints` says of it.
      tensors: theirs, checked by `check`.
      place: reads a parameter and puts it where it is to stay.
      dtype: of all floating parameters; theirs where None.
      wrote: hears the bytes of every tensor that was read.
    """
    pieces: dict[str, list[tuple[Slot, str]]] = {}
    for name, joint in wanted.items():
        for slot in joint.slots:
            pieces.setdefault(slot.path, []).append((slot, name))
    flat = {}
    for path, abstract in weights.flatten(functional.abstract(cfg)).items():
        kind = dtype or np.result_type(*{tensors[name].dtype for _, name in pieces[path]})
        part = partial(_part, pieces[path], tensors, tuple(abstract.shape), kind, wrote)
        flat[path] = place(path, Pending(tuple(abstract.shape), kind, part))
    return weights.unflatten(flat)


def _part(
    sources: list[tuple[Slot, str]],
    tensors: Tensors,
    shape: tuple[int, ...],
    dtype: np.dtype,
    wrote: Callable[[int], None],
    index: tuple[slice, ...] = (),
) -> np.ndarray:
    """Part of one of our parameters. Files are mapped, so only what the part needs is read."""
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


def check(where: str, wanted: Mapping[str, Joint], tensors: Tensors, ignored: tuple[str, ...] = ()) -> None:
    """Every wanted tensor is there with its shape, and no other but those whose names match `ignored`.

    Raises:
      RequestError: names what is missing, what is not understood and what has another shape.
    """
    problems = []
    if missing := [n for n in wanted if n not in tensors]:
        problems.append(f"missing tensors {listed(missing)}")
    strays = [n for n in tensors if n not in wanted and not any(re.fullmatch(p, n) for p in ignored)]
    if strays:
        problems.append(f"tensors that are not understood: {listed(strays)} (import --drop leaves them out)")
    wrong = [n for n in wanted if n in tensors and tensors[n].shape != wanted[n].shape]
    if wrong:
        shown = listed(f"{n} is {list(tensors[n].shape)}, the config says {list(wanted[n].shape)}" for n in wrong)
        problems.append(f"shapes contradict the config: {shown}")
    integers = [n for n in wanted if n in tensors and tensors[n].dtype.kind not in "fV"]
    if integers:
        problems.append(f"tensors that are not floating-point: {listed(integers)}")
    if problems:
        raise RequestError(f"{where}: {'; '.join(problems)}")


def write(params: dict[str, Any], wanted: Mapping[str, Joint], dtype: np.dtype | None = None) -> dict[str, Tensor]:
    """Our parameters as their tensors, each brought to the host when it is read.

    Quantized and low-rank weights are written as the dense arrays that they stand for.
    """
    flat = weights.flatten(params)

    def tensor(joint: Joint) -> Tensor:
        kind = dtype or np.dtype(flat[joint.slots[0].path].dtype)

        def fetch() -> np.ndarray:
            arrays = [_slice(flat[s.path], s.layer, kind) for s in joint.slots]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
            return array.T if joint.slots[0].transposed else array

        return Tensor(joint.shape, kind, fetch)

    return {name: tensor(joint) for name, joint in wanted.items()}


def _slice(w: Any, layer: int, dtype: np.dtype) -> np.ndarray:
    one = jax.tree.map(lambda a: host(a, layer), w)
    if isinstance(one, (weights.Quantized, weights.LowRank)):
        one = weights.dense(jax.tree.map(jnp.asarray, one))
    return np.asarray(one).astype(dtype, copy=False)


def host(a: jax.Array, layer: int = -1) -> np.ndarray:
    """One layer of a stacked array (-1: the whole) on the host. On a CPU that is a view; elsewhere only it travels."""
    if len(a.devices()) == 1 and next(iter(a.devices())).platform == "cpu":
        whole = np.asarray(a)
        return whole if layer < 0 else whole[layer]
    return np.asarray(a if layer < 0 else a[layer])
