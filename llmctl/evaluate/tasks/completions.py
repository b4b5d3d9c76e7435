"""Define the task "completions": train and measure the completion of prompts.

A decoder reads prompt and completion as one sequence. In an encoder-decoder, the encoder reads the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.examples.completions import CompletionRows, SequencePairRows
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate import perplexity
from llmctl.evaluate.setup import Held, Measured, Setup
from llmctl.evaluate.tasks.language import Language, scored, timed
from llmctl.evaluate.tasks.objectives import sliding
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model.config import ModelConfig


class Completions(Language):
    """Train with cross-entropy on the tokens of the completion only; measure perplexity."""

    name = "completions"
    title = "completions"
    architectures = ("decoder", "encoder_decoder")
    columns = ("prompt", "completion")
    columns_read = columns

    def rows(
        self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings
    ) -> CompletionRows | SequencePairRows:
        """Return rows of one prompt and its completion each.

        Args:
            model: Config of the model.
            examples: Examples with the columns "prompt" and "completion".
            tokenizer: Tokenizer of the model.
            settings: Settings of the rows. If the model has an encoder, `seq_len` is the length of the prompt.

        Raises:
            RequestError: If a completion is empty, or if `target_len` is set for a decoder.
        """
        for i, text in enumerate(examples.texts("completion")):
            if not text.strip():
                raise RequestError(f"{examples.source.where(int(examples.index[i]))}: the completion is empty")
        if model.architecture == "encoder_decoder":
            return SequencePairRows(
                examples, tokenizer, settings.seq_len, target_len=settings.target_len, **settings.order
            )
        if settings.target_len:
            raise RequestError("data.target_len is for encoder-decoders; a decoder reads both texts in one row")
        return CompletionRows(examples, tokenizer, settings.seq_len, **settings.order)

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return whether two artifacts can be compared: only decoders have values per example.

        The value of an example is the log-likelihood of its completion.
        """
        return model.architecture == "decoder"

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure the perplexity of the held-out completions, each conditioned on its prompt.

        In an encoder-decoder, the encoder reads at most `seq_len` tokens of the prompt. Completions are never
        truncated. The end-of-sequence token of a completion is not scored, as in the evaluation of a decoder.

        Raises:
            RequestError: If a completion exceeds the model's maximum sequence length.
        """
        tokenizer = tokenizers.load(artifact.tokenizer_dir)
        texts = list(held.examples.texts("completion"))
        if artifact.model.architecture == "decoder":
            documents, given = held.pairs(tokenizer)
            return sliding(self, artifact, held, setup, tokenizer, texts, documents, given)
        most = artifact.model.max_seq_len
        rows = SequencePairRows(
            held.examples, tokenizer, setup.seq_len, shuffle=False, full_completions=True, predict_eos=False
        )
        if rows.decoder_len > most:
            raise RequestError(
                f"{artifact.path}: the longest completion and its end have {rows.decoder_len} tokens, its longest "
                f"sequence {most}; leave such pairs out with data.filter, or shorten them"
            )
        step, metrics = scored(self, artifact, rows, setup)
        count = perplexity.count(texts, metrics["predicted_tokens"])
        metrics |= perplexity.metrics(metrics["nll"] * metrics["predicted_tokens"], count)
        protocol = f"{held.split} split, {len(held.examples)} completions each given its prompt ({rows.cut} cut to "
        protocol += f"{setup.seq_len} tokens for the encoder), every token once, without the ends, {setup.dtype}"
        return timed(self, protocol, metrics, artifact, rows, step, setup)


TASK = Completions()
