"""Define settings that only one task reads. Each class is a section of `finetune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from llmctl.config.base import Config, hint
from llmctl.config.containment import regular
from llmctl.config.errors import RequestError
from llmctl.config.settings import KVCache

CHATML = "chatml"
"""Name of the ChatML template in settings."""


class PreferenceConfig(Config):
    """Configure the task `preference`, whose loss compares chosen and rejected completions."""

    common: ClassVar[tuple[str, ...] | None] = ()

    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    """Loss on log-likelihoods of chosen and rejected completions. dpo, ipo: subtract the log-likelihoods of the
    reference model, which is the model without its adapters. The finetuning method must therefore add adapters, as
    `lora` does. simpo: use means per token, without a reference model."""
    beta: float = Field(default=0.0, ge=0)
    """Scale of the log-likelihoods in the loss. For dpo and ipo, a larger value keeps the model closer to its initial
    parameters. 0 uses 0.1 for dpo and ipo, and 2 for simpo."""
    gap: float = Field(default=1.0, ge=0)
    """Target difference between the scaled mean log-likelihoods of chosen and rejected completions, for the loss
    `simpo`."""

    @property
    def scale(self) -> float:
        """Return `beta`, or the default value of the chosen loss if `beta` is 0."""
        return self.beta or (2.0 if self.loss == "simpo" else 0.1)


class ChatConfig(Config):
    """Configure the task `chat`: the template that renders conversations."""

    common: ClassVar[tuple[str, ...] | None] = ()

    template: str = ""
    """Chat template: a file with a Jinja template, or chatml for the ChatML format. The finetuned artifact gets this
    template. If empty, the template of the tokenizer is used."""

    def inputs(self) -> list[str]:
        """Return [path of the template's file], or [] if the setting names no file.

        The stage runs again if the content of the file changes.

        Raises:
            RequestError: If the file does not exist.
        """
        if self.template in ("", CHATML):
            return []
        if not Path(self.template).is_file():
            raise RequestError(f"chat.template: no such file: {self.template!r}{hint(self.template, [CHATML])}")
        return [self.template]

    def source(self) -> str | None:
        """Return the text of the template's file, or None if no file is named.

        Raises:
            RequestError: If the file does not exist, or is not UTF-8 text.
        """
        for file in self.inputs():
            try:
                return regular(Path(file)).read_text(encoding="utf-8")
            except (OSError, ValueError) as e:
                raise RequestError(f"chat.template: {file} cannot be read ({e})") from None
        return None


class GenerationConfig(Config):
    """Configure the answers that validation and evaluation generate, for the task `seq2seq`."""

    common: ClassVar[tuple[str, ...] | None] = ()
    added: ClassVar[frozenset[str]] = frozenset({"kv_cache", "stops"})

    max_new: int = Field(default=0, ge=0)
    """Maximum number of tokens per answer. 0 uses 64, but at most half of the model's maximum sequence length."""
    beams: int = Field(default=1, ge=1)
    """Number of beams of a beam search; 1 generates greedily."""
    kv_cache: KVCache = ""
    """Format of cached keys and values, quantized with one scale per token and head: int8, fp8_e4m3 or int4. If empty,
    the cache has the dtype of the computation."""
    stops: list[str] = []
    """Strings that end an answer, such as a line break after few-shot examples. The answer does not include these
    strings."""
    examples: int = Field(default=200, ge=0)
    """Maximum number of examples per validation in training, chosen by their hash; 0 generates none."""
    bleu_tokenizer: Literal["13a", "zh", "char", "intl", "none"] = "13a"
    """Tokenizer of BLEU: 13a for languages with spaces, zh for Chinese, char for single characters."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> GenerationConfig:
        """Convert the settings that an artifact stores. Unknown keys, from another version of llmctl, are ignored.

        Raises:
            RequestError: If a value has another type.
        """
        try:
            return cls(**{name: value for name, value in settings.items() if name in cls.model_fields})
        except (ValidationError, AttributeError):
            raise RequestError("the manifest's settings of generation are not of their types") from None
