"""Store the outputs of teachers in the folder `cache`, so that a distillation needs no teacher in memory.

The folder serves all trainings with the same data and the same teachers. Students, steps and batch sizes may differ. If
each row contains one example, seeds may differ too. Missing rows are added. `llmctl.data.teacher_records` describes the
files.

    cache = TeacherCache(config, ctx, learner, teachers, devices, tokens, text)
    rows, unseen = cache.filled(rows, unseen, load=load_the_teachers, say=print)
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts import atomic
from llmctl.config import checksums
from llmctl.config.errors import Interrupted, RequestError
from llmctl.data.device_batches import DeviceBatches
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.taught_rows import SelectedRows, TaughtRows, is_ordered, needed
from llmctl.data.teacher_records import FORMAT, LABELS, Description, Records, read, write
from llmctl.distributed import host_arrays, locks, processes
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.tasks.losses import MOST_PROBABLE
from llmctl.model import attention_kernels
from llmctl.train import distillation, preemption, teacher_comparison
from llmctl.train import learner as training
from llmctl.train.teacher_outputs import layout, outputs_of
from llmctl.train.validation import Validation

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.workspace import Context
    from llmctl.data.tokenizers.base import Tokenizer
    from llmctl.train.learner import Learner

SHARD_BYTES, SHARD_ROWS = 2**26, 4096
"""Maximum size of a file of outputs, in bytes before compression and in rows. An interruption loses at most one
file."""

Say = Callable[[str], None]


class TeacherCache:
    """Check that a folder of teachers' outputs was computed with a stage's settings, and add missing outputs."""

    def __init__(
        self,
        config: Any,
        ctx: Context,
        learner: Learner,
        teachers: Sequence[Artifact],
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
        text: Text,
    ) -> None:
        """Prepare the comparison of the folder with the stage's settings.

        Args:
          config: config of the stage `distill`.
          ctx: folders of the stage.
          learner: the student.
          teachers: the teachers, with abstract arrays.
          mesh: the devices.
          tokenizer: tokenizer of the teachers.
          text: the stage's data.

        Raises:
          RequestError: If the folder cannot be written.
        """
        self.config, self.learner, self.teachers, self.mesh = config, learner, teachers, mesh
        self.folder = Path(config.cache).expanduser()
        atomic.check_apart(self.folder, ctx.out, "cache")
        self._tokenizer, self._text = tokenizer, text
        self._divergences = {"train": distillation.divergence(config), "validation": MOST_PROBABLE}
        self.judged: dict[str, float] = {}
        """Metrics of the teachers on the validation rows."""
        self.tokens: int | None = None
        """Number of tokens of the stored training rows. None if an earlier version of llmctl, which did not
        count tokens, stored some of the rows."""

    def filled(
        self, rows: Any, unseen: Any, load: Callable[[], Sequence[Artifact]], say: Say
    ) -> tuple[TaughtRows, TaughtRows]:
        """Return training and validation rows with the outputs of the teachers. Missing outputs are computed first.

        Args:
          rows: training rows.
          unseen: validation rows.
          load: function that loads the teachers. The function is called only if outputs are missing.
          say: function that prints one line.

        Raises:
          RequestError: If the folder belongs to other teachers, data or settings. If the folder is damaged.
          Interrupted: If SIGTERM or Ctrl-C arrived. If the same command is run again, it resumes.
        """
        train = self.config.train
        of_split = {"train": rows, "validation": unseen}
        steps = training.with_length(self.config, rows)[0].steps
        once = DeviceBatches.for_one_pass(self.mesh, train.batch_size, len(unseen)).size
        counts = {"train": steps * train.batch_size, "validation": min(len(unseen), train.eval_batches * once)}
        made_for = self._made_for(rows)
        with locks.claim(self.folder):
            found = self._read(made_for)
            records = {
                name: Records(self.folder, name, layout(self.learner.task, self.teachers, how, train, of_split[name]))
                for name, how in self._divergences.items()
            }
            wanted = {name: needed(of_split[name], counts[name]) for name in records}
            absent = {name: ~records[name].has(wanted[name][0]) for name in records}
            judge = {"rows": counts["validation"], "metric": teacher_comparison.metric(self.learner)}
            judge |= self._labels(unseen, counts["validation"])
            known = found is not None and {k: found.judged.get(k) for k in judge} == judge
            if any(a.any() for a in absent.values()) or not known:
                processes.barrier("cache")  # every process has read the folder
                found = found or Description(format=FORMAT, made_for=made_for)
                if processes.first():
                    write(self.folder, found)
                teachers = load()
                for name, a in absent.items():
                    number_N, row_N = (b[a] for b in wanted[name])
                    self._add(records[name], teachers, of_split[name], number_N, row_N, say)
                if not known:
                    found = found.model_copy(update={"judged": judge | {"values": self._judge(teachers, unseen)}})
                    if processes.first():
                        write(self.folder, found)
                processes.barrier("cache written")
                records = {name: Records(self.folder, name, r.layout) for name, r in records.items()}
        assert found is not None
        self.judged = {name: float(value) for name, value in found.judged["values"].items()}
        self.tokens = records["train"].tokens
        size, held = sum(r.bytes for r in records.values()), sum(len(w[0]) for w in wanted.values())
        say(f"cache in {self.folder}: outputs of the teacher for {held:,} rows; {size:,} bytes in all")
        return TaughtRows(rows, records["train"]), TaughtRows(unseen, records["validation"])

    def _made_for(self, rows: Any) -> dict[str, Any]:
        """Return the settings, and the digests of teachers, tokenizer and data, that determine the outputs, by name."""
        config, train = self.config, self.config.train
        learned = [self.learner.task.name, [[part.weight, part.epochs] for part in config.data.parts()]]
        return {
            "teachers": [t.manifest.content or t.manifest.digest for t in self.teachers],
            "tokenizer": self._tokenizer.digest,
            "data": checksums.of_json([*learned, self._text.digest("train"), self._text.digest("validation")]),
            "train.seq_len": train.seq_len,
            "data.target_len": self._text.target_len,
            "truncate": config.truncate,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "train.dtype": train.dtype,
            "seed": config.seed if is_ordered(rows) else None,
        }

    def _read(self, made_for: dict[str, Any]) -> Description | None:
        """Return the folder's description. If there is no description, return None.

        Raises:
          RequestError: If the settings or digests of the stored outputs differ from `made_for`.
        """
        found = read(self.folder)
        if found is None:
            return None
        for name, now in made_for.items():
            if (was := found.made_for.get(name)) == now:
                continue
            which = {"teachers": "another teacher", "tokenizer": "another tokenizer", "data": "other data"}.get(name)
            which = f"holds outputs for {which}" if which else f"was written with {name} = {was}, not {now}"
            raise RequestError(f"cache: {self.folder}: {which}; choose another folder, or remove this one")
        return found

    def _add(
        self, records: Records, teachers: Sequence[Artifact], rows: Any, number_N: Any, row_N: Any, say: Say
    ) -> None:
        """Compute outputs and add them to the folder, one file after the other.

        Args:
          records: stored outputs of the rows.
          teachers: the teachers.
          rows: the rows.
          number_N: keys under which the outputs are stored (see `llmctl.data.taught_rows.numbers`), one per computed
            row.
          row_N: numbers of the rows to compute.
          say: function that prints one line.
        """
        if not len(number_N):
            return
        train = self.config.train
        batches = DeviceBatches.for_one_pass(self.mesh, train.batch_size, len(number_N))
        batches = DeviceBatches(self.mesh, batches.size, reading_order=True)
        per_file = min(SHARD_ROWS, SHARD_BYTES // records.layout.row_bytes()) // batches.size * batches.size
        size = max(batches.size, per_file)
        run = outputs_of(self.learner.task, [t.model for t in teachers], self._divergences[records.name], train)
        params, title = [t.params for t in teachers], self.config.title

        def both(batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
            placed = batches.place(batch)
            return batches.gather(batch, placed), placed

        made: list[bytes] = []
        written = tokens = 0
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(preemption.requests(self.mesh))
            stack.enter_context(meshes.use(self.mesh))
            stack.enter_context(attention_kernels.use(train.attention))
            steps = stack.enter_context(batches.once(SelectedRows(rows, row_N), place=both))
            for _, (host, placed) in steps:
                found = {name: host_arrays.read(a) for name, a in run(params, placed).items()}
                for b in range(min(batches.size, len(number_N) - written - len(made))):
                    row = {name: a[b] for name, a in host.items()}
                    made.append(records.layout.encode({name: a[b] for name, a in found.items()}, row))
                    tokens += sum(int(np.count_nonzero(a)) for name, a in row.items() if name.endswith("segments"))
                if len(made) >= size or written + len(made) == len(number_N):
                    if processes.first():
                        records.add(number_N[written : written + len(made)].tolist(), made, tokens)
                    written, made, tokens = written + len(made), [], 0
                    say(f"cache in {self.folder}: {written:,} of {len(number_N):,} {records.name} rows written")
                    if stop.requested(now=True):
                        raise Interrupted(f"{title}: stopped while writing the cache; the same command goes on there")

    def _labels(self, unseen: Any, count: int) -> dict[str, str]:
        """Return {"labels": hash of the labels of the first `count` validation rows}, or {} if there are no labels.

        The hash shows whether the stored metrics of the teachers are still valid, because these metrics depend on the
        labels.
        """
        if not self.learner.task.reads_labels:
            return {}
        found: dict[str, Any] = {}
        size = self.config.train.batch_size
        for first in range(0, count, size):
            batch = unseen.batch(np.arange(first, min(first + size, count)))
            for name in sorted(batch.keys() & LABELS):
                found.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(batch[name]).data)
        return {"labels": checksums.of_json([[name, total.hexdigest()] for name, total in sorted(found.items())])}

    def _judge(self, teachers: Sequence[Artifact], unseen: Any) -> dict[str, float]:
        train = self.config.train
        judge = self.learner.task.loss_of(self.learner.model, dtype=jnp.dtype(train.dtype))
        held_out = Validation(judge, unseen, train.batch_size, train.eval_batches, self.mesh)
        return teacher_comparison.judged(self.config, self.learner, teachers, held_out)
