"""Define the interface between lm-evaluation-harness and an artifact: a subclass of the harness's class `TemplateLM`.

Texts are encoded as in the harness's own class for Hugging Face models, so that both classes give equal
log-likelihoods. For example, a text that spells a special token is encoded as this token.

Importing this module imports lm_eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate.likelihood import Query, Scorer
from llmctl.evaluate.setup import Setup
from llmctl.evaluate.tasks.settings import GenerationConfig
from llmctl.evaluate.written_answers import Writer
from llmctl.model.generate.chat_template import Template
from llmctl.model.generate.continuations import Continuation, end_ids
from llmctl.model.generate.sampling import Sampling

MAX_NEW = 256
"""Number of tokens to generate if a task sets no limit, as in the harness's own classes."""


class ArtifactLM(TemplateLM):
    """Answer the requests of lm-evaluation-harness with the decoder of an artifact."""

    def __init__(self, artifact: Artifact, setup: Setup) -> None:
        """Load the tokenizer of the artifact.

        Args:
            artifact: A decoder with a language-model head. Its parameters may be sharded over the mesh of `setup`.
            setup: Settings of the measurement. `seq_len` is the maximum number of tokens that the model reads.
        """
        super().__init__()
        self._artifact, self._setup = artifact, setup
        self._words = tokenizers.load(artifact.tokenizer_dir)
        self._score = Scorer(artifact.model, artifact.params, setup, self._words.prefix)
        self._template: Template | None = None
        self._writer: Writer | None = None
        self._cut = 0
        self.max_length = self._score.longest

    @property
    def truncated(self) -> int:
        """Return the number of requests whose context was too long. The beginning of such a context was removed."""
        return self._score.truncated + self._cut

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end-of-sequence token."""
        return self._words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the token that precedes a text without context."""
        return self._words.start_id

    @property
    def tokenizer_name(self) -> str:
        """Return the digest of the tokenizer, which identifies cached requests."""
        return self._words.digest

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the artifact's chat template."""
        return self._words.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the artifact's chat template.

        Args:
            chat_history: Messages.
            add_generation_prompt: Whether the text ends with the beginning of the assistant's answer. Otherwise the
                text ends within the last message, which the model continues.

        Raises:
            RequestError: If the artifact has no chat template, or the template rejects the messages.
        """
        self._template = self._template or Template(self._words.chat_template, self._words)
        text = self._template.render(chat_history, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: The text. It may spell special tokens.
            add_special_tokens: Whether the ids begin with the begin-of-sequence token. None adds the token if the
                tokenizer does so by default, unless the text itself spells the token.
            kwargs: Ignored.
        """
        words = self._words
        ids = words.encode_with_special(string)
        begin = [words.bos_id] * words.add_bos
        return ids if add_special_tokens is False or not begin or ids[:1] == begin else [*begin, *ids]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return, per request, (log-likelihood of the continuation in nats, whether greedy decoding gives the
        continuation).
        """
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [(total, greedy) for total, greedy in self._score([Query(asked, more) for _, asked, more in requests])]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text in nats. Long texts are split into windows without overlap."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            found = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for window in found:
                windows.append(Query(*make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(windows), strict=True):
            totals[owner] += score.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the generated text of each request, up to its first stop string.

        Requests with equal settings are generated together, shortest prompt first.

        Raises:
            RequestError: If a task has a generation setting that llmctl does not know. If the answers leave no room for
                a prompt.
        """
        out = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for members in groups.values():
            stops, max_new, sampling = generation_settings(requests[members[0]].args[1])
            room = self.max_length - max_new
            if room < 1:
                raise RequestError(
                    f"a task generates {max_new} tokens, which leave no room for a prompt within {self.max_length}"
                )
            prompts = [self.tok_encode(requests[i].args[0]) for i in members]
            self._cut += sum(len(ids) > room for ids in prompts)
            prefix = list(self._words.prefix)
            rows = [Continuation("", [*prefix, *ids[-room:]], stops) for ids in prompts]
            self._held().fill(rows, max_new=max_new, sampling=sampling)
            for i, row in zip(members, rows, strict=True):
                out[i] = row.text
        return out

    def _held(self) -> Writer:
        """Return the Writer that generates text, with the parameters of the artifact."""
        if self._writer is None:
            there, setup = self._artifact, self._setup
            sizes = {"seq_len": setup.seq_len, "batch_size": setup.batch_size, "dtype": setup.dtype}
            ends = end_ids(there.tokenizer_dir, self._words)
            self._writer = Writer(there.model, self._words, GenerationConfig(), ends=ends, **sizes)
            self._writer.hold(there.params)
        return self._writer


def generation_settings(given: dict[str, Any]) -> tuple[list[str], int, Sampling | None]:
    """Convert generation settings of a task to (stop strings, maximum number of tokens, sampling rules).

    The sampling rules are None if the task generates greedily.

    Raises:
        RequestError: If a setting is unknown or invalid.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), MAX_NEW))
    until, max_new = settings.pop("until"), settings.pop("max_gen_toks")
    sample, temperature = settings.pop("do_sample", False), settings.pop("temperature", 0.0)
    rules = {name: settings.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in settings}
    if settings.get("num_beams") == 1:
        del settings["num_beams"]
    if settings:
        raise RequestError(f"a task sets {next(iter(settings))!r} for generation, which llmctl does not have")
    greedy = not sample or not temperature
    if greedy and "repetition_penalty" not in rules:
        return [s for s in until if s], max_new, None
    try:
        return [s for s in until if s], max_new, Sampling(0.0 if greedy else temperature, **rules)
    except (TypeError, ValueError) as e:
        raise RequestError(f"a task has generation settings that are invalid: {e}") from None
