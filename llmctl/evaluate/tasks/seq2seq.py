"""Train on completions of prompts, and measure the answers that the model generates (sequence to sequence).

Training is the same as for the task "completions". Validation and evaluation also generate an answer to each prompt.
The answer is compared with the completion by BLEU, chrF, ROUGE and exact match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from jax.sharding import Mesh

from llmctl.artifacts.artifact import Artifact
from llmctl.config.settings import TrainConfig
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.metrics import generation as answer_metrics
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.completions import Completions
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer, lengths
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.generate.continuations import end_ids
from llmctl.model.generate.programs import Request, generation
from llmctl.model.program import Program


class SequenceToSequence(Completions):
    """Train with cross-entropy on completions given their prompts; measure generated answers."""

    name = "seq2seq"
    title = "sequence to sequence"
    section = "generation"
    generates = True
    answers = True

    def validator(
        self,
        model: ModelConfig,
        text: Text,
        tokenizer: Tokenizer,
        settings: GenerationConfig,
        train: TrainConfig,
        ends: Sequence[int],
    ) -> Callable[[functional.Params, Callable[[], None]], dict[str, float]] | None:
        """Return a function that computes metrics of generated answers, for validation during training.

        Its arguments are the parameters and a function `check_stop`.

        The function answers at most `generation.examples` validation prompts. Before each batch, the function calls
        `check_stop()`, so that training can stop.

        Raises:
            RequestError: If the packages of the metrics are missing, or the answers leave no room for a prompt.
        """
        if not settings.examples:
            return None
        answer_metrics.check()
        some = text.splits["validation"].sample(settings.examples)
        prompts, references = list(some.texts("prompt")), list(some.texts("completion"))
        size = min(train.batch_size, len(prompts))
        how = {"seq_len": train.seq_len, "batch_size": size, "dtype": train.dtype, "ends": ends}
        write = Writer(model, tokenizer, settings, **how)

        def measure(params: functional.Params, check_stop: Callable[[], None]) -> dict[str, float]:
            return answer_metrics.scores(references, write(params, prompts, check_stop), settings.bleu_tokenizer)

        return measure

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return True: two artifacts can be compared by the metrics of each generated answer, such as ROUGE."""
        return True

    def generation_programs(
        self,
        model: ModelConfig,
        params: functional.Params,
        settings: GenerationConfig,
        mesh: Mesh,
        *,
        seq_len: int,
        batch_size: int,
        dtype: str,
    ) -> list[Program]:
        """Return the programs that generate answers, greedily or by beam search, in validation and evaluation.

        Prompts and answers have the maximum length. The beams of a beam search are counted as rows.
        """
        room, max_new = lengths(model, settings, seq_len)
        request = Request(batch_size * settings.beams, room, max_new)
        programs = generation(model, params, request, mesh, dtype=dtype, kv_cache=settings.kv_cache)
        return [dataclasses.replace(program, title=f"answers: {program.title}") for program in programs]

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure the perplexity of the held-out completions, and compare generated answers with the completions.

        One answer is generated per prompt. The comparison computes BLEU, chrF, ROUGE and exact match.

        Raises:
            RequestError: If the packages of the metrics are missing. If a completion is longer than the model's maximum
                sequence length. If the answers leave no room for a prompt.
        """
        answer_metrics.check()
        settings, words = setup.generation, tokenizers.load(artifact.tokenizer_dir)
        prompts, references = (list(held.examples.texts(column)) for column in ("prompt", "completion"))
        size = min(setup.batch_size, len(prompts))
        ends = end_ids(artifact.tokenizer_dir, words)
        how = {"seq_len": setup.seq_len, "batch_size": size, "dtype": setup.dtype, "ends": ends}
        write = Writer(artifact.model, words, settings, **how)
        predictions = write(artifact.params, prompts)
        found = super().evaluate(artifact, held, setup)
        search = f"{settings.beams} beams" if settings.beams > 1 else "greedy"
        search += f", {settings.kv_cache} cache" if settings.kv_cache else ""
        protocol = f"{found.protocol}; answers of at most {write.max_new} tokens, {search}, to prompts of at most "
        protocol += f"{write.room} tokens ({write.cut} cut), "
        protocol += answer_metrics.signature(references, predictions, settings.bleu_tokenizer)
        rows = zip(prompts, references, predictions, strict=True)
        return dataclasses.replace(
            found,
            protocol=protocol,
            metrics=answer_metrics.scores(references, predictions, settings.bleu_tokenizer) | found.metrics,
            answers=(references, predictions),
            values=answer_metrics.values(references, predictions, settings.bleu_tokenizer) | found.values,
            written=[{"prompt": p, "reference": r, "prediction": w} for p, r, w in rows],
        )


TASK = SequenceToSequence()
