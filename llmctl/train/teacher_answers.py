"""Generate a teacher's answers to the prompts of the data, for sequence-level distillation.

The student is then trained on the answers as on completions of the data (Kim and Rush, 2016, arXiv:1606.07947).

    text = TeacherAnswers(config, ctx, teacher, text, devices).added(load=load_the_teacher, say=print)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import atomic
from llmctl.config import checksums
from llmctl.config.errors import Interrupted, RequestError
from llmctl.data.answers import AnswerFiles, answered, describe, described
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.row_counts import training_rows, validation_rows
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.distributed import locks, processes
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer, lengths
from llmctl.model.generate.continuations import end_ids
from llmctl.model.generate.programs import Request, generation
from llmctl.model.generate.sampling import Sampling
from llmctl.train import preemption

if TYPE_CHECKING:
    import jax

    from llmctl.artifacts.artifact import Artifact
    from llmctl.artifacts.workspace import Context
    from llmctl.model.program import Program

SHARD_BATCHES = 16
"""Number of batches of prompts per file. An interruption loses at most one file."""

Say = Callable[[str], None]


class TeacherAnswers:
    """Generate answers to the prompts of the training split, and of the validation split if it has no completions."""

    def __init__(self, config: Any, ctx: Context, teacher: Artifact, text: Text, mesh: jax.sharding.Mesh) -> None:
        """Prepare the folder of the answers. If `answers.folder` is not set, the folder is next to the artifact.

        Args:
          config: config of the stage `distill`.
          ctx: folders of the stage.
          teacher: the teacher. The arrays may be abstract.
          text: the stage's data.
          mesh: the devices.

        Raises:
          RequestError: If the folder cannot be written, or if the data has no prompts.
        """
        self.config, self.teacher, self.text, self.mesh = config, teacher, text, mesh
        given = config.answers.folder
        self.folder = Path(given).expanduser() if given else ctx.out.parent / f"{ctx.out.name}-answers"
        self.own = not given
        atomic.check_apart(self.folder, ctx.out, "answers.folder")
        if "prompt" not in text.columns:
            raise RequestError(f'mode = "sequence": the data has no prompts; map data.columns.prompt ({text.columns})')
        self.metrics: dict[str, int] = {}
        """Number of answers, and number of tokens that the teacher generated."""

    def added(self, load: Callable[[], Artifact], say: Say) -> Text:
        """Return the data with the answers as completions. Missing answers are generated first.

        Args:
          load: function that loads the teacher. The function is called only if answers are missing.
          say: function that prints one line.

        Raises:
          RequestError: If the folder has answers of another teacher, to other prompts or with other settings. If the
            folder is damaged. If no answer has text.
          Interrupted: If SIGTERM or Ctrl-C arrived. If the same command is run again, it resumes.
        """
        asked = self._asked()
        made_for = self._made_for(asked)
        with locks.claim(self.folder):
            self._check(made_for, say)
            files = {split: AnswerFiles(self.folder, split) for split in asked}
            if any(len(files[split].texts) < len(examples) for split, examples in asked.items()):
                processes.barrier("answers")  # every process has read the folder
                if processes.first():
                    describe(self.folder, made_for)
                write = self._writer(load())
                for split, examples in asked.items():
                    self._generate(write, files[split], examples, say)
                processes.barrier("answers written")
        found = dict(self.text.splits.examples)
        for split, examples in asked.items():
            found[split] = answered(examples, files[split].texts[: len(examples)])
            self._describe(split, files[split], len(examples), len(found[split]), say)
        return self.text.with_examples(found)

    def _asked(self) -> dict[str, Examples]:
        """Return the examples whose prompts the teacher has to answer, by split.

        A split has at most as many examples as training or validation reads.
        """
        train, splits = self.config.train, self.text.splits
        asked = {"train": splits["train"].sample(training_rows(train) or len(splits["train"]))}
        if "completion" not in self.text.columns:
            asked["validation"] = splits["validation"].sample(validation_rows(train))
        return asked

    def _made_for(self, asked: dict[str, Examples]) -> dict[str, Any]:
        answers, manifest = self.config.answers, self.teacher.manifest
        settings = {f"answers.{name}": value for name, value in answers.model_dump().items() if name != "folder"}
        return {
            "teacher": manifest.content or manifest.digest,
            "prompts": checksums.of_json([[split, examples.digest] for split, examples in asked.items()]),
            "train.seq_len": self.config.train.seq_len,
            "train.dtype": self.config.train.dtype,
            "seed": self.config.seed if answers.temperature else None,
            **settings,
        }

    def _check(self, made_for: dict[str, Any], say: Say) -> None:
        """Compare the current settings with the settings in the folder of answers.

        If they differ, a folder that the stage created is discarded. A folder that the user named is rejected.

        Raises:
          RequestError: If a folder that the user named has other answers.
        """
        found = described(self.folder)
        if found is None or found == made_for:
            return
        name = next(name for name in (*made_for, *found) if found.get(name) != made_for.get(name))
        what = {"teacher": "has answers of another teacher", "prompts": "has answers to other prompts"}.get(name)
        what = what or f"was written with {name} = {found.get(name)}, not {made_for.get(name)}"
        if not self.own:
            raise RequestError(f"answers: {self.folder}: {what}; choose another folder, or remove this one")
        say(f"answers: {self.folder}: {what}; discarded")
        processes.barrier("answers differ")
        if processes.first():
            shutil.rmtree(self.folder)
        processes.barrier("answers discarded")

    def _writer(self, teacher: Artifact) -> Writer:
        words, train = tokenizers.load(teacher.tokenizer_dir), self.config.train
        settings, ends = generation_config(self.config), end_ids(teacher.tokenizer_dir, words)
        how = {"seq_len": train.seq_len, "batch_size": train.batch_size, "dtype": train.dtype, "ends": ends}
        write = Writer(teacher.model, words, settings, **how)
        write.hold(teacher.params)
        return write

    def _generate(self, write: Writer, files: AnswerFiles, examples: Examples, say: Say) -> None:
        """Generate the missing answers of one split, one file after the other."""
        answers, size = self.config.answers, SHARD_BATCHES * self.config.train.batch_size
        sampling = Sampling(answers.temperature, answers.top_k, answers.top_p) if answers.temperature else None
        with preemption.requests(self.mesh) as stop:
            while (first := len(files.texts)) < len(examples):
                prompts = list(examples[first : first + size].texts("prompt"))
                rows = write.rows(prompts)
                write.fill(rows, sampling=sampling, seed=self.config.seed, first=first)
                tokens, cut = sum(len(row.ids) for row in rows), sum(row.ended == "length" for row in rows)
                files.add(prompts, [row.text for row in rows], tokens, cut, processes.first())
                say(f"answers: {len(files.texts):,} of {len(examples):,} {files.split} prompts answered")
                if stop.requested(now=True):
                    raise Interrupted(f"{self.config.title}: stopped while generating; the same command goes on there")

    def _describe(self, split: str, files: AnswerFiles, asked: int, kept: int, say: Say) -> None:
        tokens, cut = (sum(getattr(shard, name) for shard in files.shards) for name in ("tokens", "cut"))
        line = f"answers {self.folder}: {asked:,} of the {split} split, {tokens:,} tokens"
        line += f"; {asked - kept:,} are blank and left out" if kept < asked else ""
        say(line + (f"; {cut:,} reached the longest length" if cut else ""))
        if not kept:
            raise RequestError(f"answers: {self.folder}: the teacher's answers have no text; check its prompts")
        self.metrics |= {"answers": asked, "answer_tokens": tokens} if split == "train" else {}


def generation_config(config: Any) -> GenerationConfig:
    """Return the settings of generation that the section `answers` of the stage `distill` defines."""
    answers = config.answers
    return GenerationConfig(max_new=answers.max_new, beams=answers.beams, kv_cache=answers.kv_cache)


def programs(config: Any, teacher: Artifact, mesh: jax.sharding.Mesh) -> list[Program]:
    """Describe the programs that generate answers, for `llmctl plan`. Beams are counted as rows."""
    settings = generation_config(config)
    room, max_new = lengths(teacher.model, settings, config.train.seq_len)
    request = Request(config.train.batch_size * settings.beams, room, max_new)
    return generation(
        teacher.model, teacher.params, request, mesh, dtype=config.train.dtype, kv_cache=settings.kv_cache
    )
