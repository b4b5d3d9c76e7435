"""Score sentences with a language model: log-likelihoods of a decoder, or masked tokens of an encoder."""

from __future__ import annotations

from llmctl.artifacts.artifact import Artifact
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.likelihood import Scorer
from llmctl.evaluate.pseudo_likelihood import MaskedScorer, mask_id
from llmctl.evaluate.setup import Setup


class SentenceModel:
    """Store a language model with its tokenizer and the scorers that its architecture allows."""

    def __init__(self, artifact: Artifact, setup: Setup) -> None:
        """Load the tokenizer.

        Raises:
            RequestError: If the model is an encoder whose tokenizer has no mask token.
        """
        self.artifact, self.setup = artifact, setup
        self.tokenizer = tokenizers.load(artifact.tokenizer_dir)
        self.causal = artifact.model.architecture == "decoder"
        """Whether the model is a decoder. Otherwise it is an encoder."""
        if self.causal:
            self.continuations = Scorer(artifact.model, artifact.params, setup, self.tokenizer.prefix)
        else:
            self.masks = MaskedScorer(artifact.model, artifact.params, setup)
            self.mask_id = mask_id(self.tokenizer, str(artifact.path))

    @property
    def said(self) -> str:
        """Return the last part of the protocol: sequence length, dtype, and number of contexts truncated so far."""
        cut = self.continuations.truncated if self.causal else 0
        return f"context {self.setup.seq_len}, {self.setup.dtype}" + (
            f", {cut} contexts without their beginning" if cut else ""
        )
