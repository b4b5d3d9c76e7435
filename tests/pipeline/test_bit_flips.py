"""Flip single bits in files that a later command reads: each is refused, rebuilt, or changes nothing."""

import collections
import random
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.artifacts import artifact, integrity
from llmctl.artifacts.manifest import CONTENT
from llmctl.artifacts.manifest_file import damaged_fields, read_manifest
from llmctl.compress.calibration.layer_files import Saved
from llmctl.config.errors import LlmctlError
from llmctl.convert.partial_save import Stream
from llmctl.data.config import DataConfig, TokenizerConfig
from llmctl.data.corpus import Corpus, tokenize
from llmctl.data.pretraining import prepare, prepared
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.distributed import locks
from llmctl.model import functional, weights
from llmctl.model.config import ModelConfig
from llmctl.train.checkpoints import Checkpoints

SIZES = {"vocab_size": 259, "d_model": 8, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 16}
MODEL = ModelConfig(**SIZES, head="classify", labels=2)
TEXTS = [f"text {i} " + "abcdefgh"[: i % 7] for i in range(200)]


def random_params(cfg):
    rng = np.random.default_rng(0)
    flat = weights.flatten(functional.abstract(cfg))
    return weights.unflatten({name: rng.normal(size=a.shape).astype(np.float32) for name, a in flat.items()})


class Artifact:
    """A classifier with a tokenizer, thresholds and a log."""

    def __init__(self, place):
        ByteTokenizer.new().save(place / "words")
        (place / "words/chat_template.jinja").write_text("{{ messages }}")
        (place / "log.jsonl").write_text('{"step": 1}\n')
        self.folder = place / "a"
        about = {"labels": ["no", "yes"], "fitted": {"thresholds": {"yes": 0.25}}, "metrics": {"loss": 0.5}}
        about |= {"tokenizer_dir": place / "words", "log": place / "log.jsonl", "config": {"train": {"seq_len": 16}}}
        self.manifest = artifact.save(self.folder, random_params(MODEL), MODEL, stage="finetune", key="k", **about)

    def read(self):
        """`load` compares the arrays' digest with the manifest's, which is among the fields compared here."""
        found = artifact.load(self.folder).manifest
        assert found.digest == self.manifest.digest
        words = loading.load(self.folder / "tokenizer")
        record = damaged_fields(self.folder, "record") | integrity.quick_check(self.folder, found).record
        about = {n: getattr(found, n) for n in CONTENT}
        rest = "named" if record else read_manifest(self.folder).model_dump_json(exclude={"checksums"})
        return about, words.options(), words.encode("abc"), loading.chat_template(self.folder / "tokenizer"), rest


class Preparation:
    """Prepared text: every token of every split."""

    def __init__(self, place):
        (place / "t.txt").write_text("\n".join(TEXTS))
        self.data = DataConfig(path=str(place / "t.txt"), documents="line", validation=0.2, test=0.1)
        self.folder = place / "p"
        prepare.prepare(self.data, TokenizerConfig(kind="bytes"), self.folder)

    def read(self):
        where, found = prepared.read(str(self.folder))
        prepared.check_words(where, found)
        out = []
        for parts in found.splits.values():
            for part in parts:
                shards = prepared.Shards(where, part, found.dtype)
                out.append((part.weight, shards[np.arange(shards.lengths.sum())].tolist(), shards.lengths.tolist()))
        return out, loading.load(where / "tokenizer").options()


class Partial(Preparation):
    """An interrupted preparation, which the same call finishes; what it leaves is compared."""

    def __init__(self, place):
        super().__init__(place)
        self.out, self.folder = place / "q", locks.scratch(place / "q", "prepare")
        real = prepare._part
        prepare._part = self._die
        try:
            prepare.prepare(self.data, TokenizerConfig(kind="bytes"), place / "q")
        except KeyboardInterrupt:
            pass
        finally:
            prepare._part = real

    @staticmethod
    def _die(*_):
        raise KeyboardInterrupt

    def read(self):
        out = self.out
        prepare.prepare(self.data, TokenizerConfig(kind="bytes"), out)
        return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


class Cache:
    """The tokens of a run that was interrupted."""

    def __init__(self, place):
        self.folder, self.words = place / "corpus", ByteTokenizer.new()
        tokenize(TEXTS, self.words).save(self.folder, self.words.digest, "texts")

    def read(self):
        found = Corpus.load(self.folder, self.words.digest, "texts")
        return "rebuilt" if found is None else (found.tokens.tolist(), found.starts.tolist())


class Layer:
    """A finished layer of a calibration walk."""

    def __init__(self, place):
        self.folder, self.saved = place / "layers", Saved(place / "layers")
        self.layer = {"up": {"kernel": jnp.arange(24.0).reshape(4, 6)}, "down": {"kernel": jnp.ones((6, 4))}}
        self.saved.write("decoder", 0, self.layer, {"error": 0.5})

    def read(self):
        found = self.saved.read("decoder", 0, self.layer)
        if found is None:
            return "rebuilt"
        return {n: np.asarray(a).tolist() for n, a in weights.flatten(found[0]).items()}, found[1]


class Training:
    """The checkpoints of a training run, and its best parameters."""

    def __init__(self, place):
        self.folder, self.said = place / "checkpoints", []
        rng = np.random.default_rng(0)
        sizes = {"w": (40, 30), "b": (30,), "h": (7, 5)}
        self.state = {
            n: jnp.asarray(rng.normal(size=s), "bfloat16" if n == "h" else "float32") for n, s in sizes.items()
        }
        self.state |= {"step": jnp.int32(4)}
        self.abstract = jax.eval_shape(lambda: self.state)
        with Checkpoints(self.folder, 2, self.said.append) as found:
            for step in (2, 4):
                state = {n: a + (a.dtype.type(step - 4)) for n, a in self.state.items()}
                found.save(step, state, {"step": step, "best": 0.25, "best_step": 4, "bad": 0}, wait=True)
            found.save_best(4, self.state)

    def read(self):
        with Checkpoints(self.folder, 2, self.said.append) as found:
            state, meta = found.restore(self.abstract) or ({}, {})
            best = found.restore_best(4, self.abstract) if found.has_best(4) else "rebuilt"
            values = [
                {n: np.asarray(a, np.float64).tolist() for n, a in x.items()} for x in (state, best) if x != "rebuilt"
            ]
            return "rebuilt" if meta.get("step") in (2, None) and self.said else (*values, meta, best == "rebuilt")


class Import:
    """The parameters that an interrupted import wrote."""

    def __init__(self, place):
        self.out, self.folder = place / "out", locks.scratch(place / "out", "import")
        self.params = {n: jnp.asarray(a) for n, a in weights.flatten(random_params(ModelConfig(**SIZES))).items()}
        self.finish()

    def finish(self):
        stream = Stream(self.out, "key")
        write = stream.place(lambda path, w: self.params[path], lambda n: None)
        for path, a in self.params.items():
            write(path, a)
        return stream.finish({n: a.sharding for n, a in self.params.items()})

    def read(self):
        return {n: np.asarray(a).tolist() for n, a in self.finish().items()}


CASES = {Artifact: 200, Preparation: 100, Partial: 30, Cache: 100, Layer: 80, Training: 80, Import: 40}
"""What is damaged, and the number of flips in `make test-all`."""


def flips(kind, count, place, seed=0):
    """Flip one bit at a time, all files in turn, and count what came of it; the folder is restored after each."""
    case = kind(place)
    intact = place / "intact"
    shutil.copytree(case.folder, intact)
    expected, rng, found = case.read(), random.Random(seed), collections.Counter()
    files = [p.relative_to(intact) for p in sorted(intact.rglob("*")) if p.is_file() and p.stat().st_size]
    for i in range(count):
        for folder in (case.folder, getattr(case, "out", case.folder)):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact, case.folder)
        file = case.folder / files[i % len(files)]
        data = bytearray(file.read_bytes())
        # Shards end in kilobytes of padding, so half of the flips are among the bytes that are not zero.
        places = [n for n, byte in enumerate(data) if byte] if i // len(files) % 2 else range(len(data))
        at = rng.choice(places)
        data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            got = case.read()
        except LlmctlError as e:
            assert "\n" not in str(e)
            found["refused"] += 1
            continue
        if got == expected:
            found["harmless"] += 1
        else:
            rebuilt = got == "rebuilt" or (isinstance(got, tuple) and got[-1] == "named")
            assert rebuilt, (kind.__name__, file, at)
            found["rebuilt or named"] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_no_flipped_bit_is_used_in_silence(kind, tmp_path):
    found = flips(kind, CASES[kind], tmp_path)
    sys.stderr.write(f"{kind.__name__}: {dict(found)}\n")
    assert sum(found.values()) == CASES[kind]
    assert found["harmless"] < CASES[kind] or kind is Partial  # which makes the damaged files again


@pytest.mark.parametrize("kind", [Preparation, Cache, Layer, Training])
def test_a_few_flipped_bits(kind, tmp_path):
    flips(kind, 6, tmp_path, seed=1)
