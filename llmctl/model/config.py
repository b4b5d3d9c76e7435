"""Define ModelConfig: the sizes and flags of a model, from which all array shapes are derived.

The modules in `llmctl/model/families` define the flags and sizes of each model family.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmctl.config.base import Config, hint
from llmctl.config.limits import LAYERS
from llmctl.model.head_kinds import HEAD_KINDS, HeadKind

FAMILIES = "llmctl.model.families"


class ModelConfig(Config):
    """Configure one Transformer: its sizes and flags, including the sizes after structured pruning.

    Example:
        >>> cfg = ModelConfig(preset="llama-tiny", layers=3)
        >>> cfg.family, cfg.layers, cfg.d_model, cfg.gated
        ('llama', 3, 128, True)
    """

    heading: ClassVar[str] = "Model"
    common: ClassVar[tuple[str, ...] | None] = ("preset",)
    unkeyed: ClassVar[frozenset[str]] = frozenset({"preset"})
    added: ClassVar[frozenset[str]] = frozenset(
        {"head_activation", "adapter_size", "adapter_form", "adapter_scale", "prompt_tokens", "prefix_tokens"}
    )
    deciding: ClassVar[tuple[str, ...]] = ("preset", "family")

    preset: str = ""
    """Family and size to start from, such as llama-tiny (`llmctl show --presets` lists all). All other fields override
    the preset."""
    family: str = "llama"
    """Model family. The module of this name in `llmctl/model/families` defines default flags and tensor names."""
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    """Stacks of the model: decoder, encoder, or both."""

    vocab_size: int = Field(default=4096, ge=2)
    """Number of rows of the embedding table. If a model is trained from scratch, the tokenizer determines this
    number."""
    d_model: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    layers: int = Field(default=2, ge=1, le=LAYERS)
    """Number of decoder layers, or of encoder layers if there is no decoder."""
    encoder_layers: int = Field(default=0, ge=0, le=LAYERS)
    """Number of encoder layers in an encoder-decoder."""
    heads: int = Field(default=4, ge=1)
    """Number of query heads per layer."""
    kv_heads: int = Field(default=4, ge=1)
    """Number of key and value heads per layer; fewer than `heads` gives grouped-query attention."""
    head_dim: int = Field(default=32, ge=1)
    """Width of each attention head."""
    d_ff: int = Field(default=512, ge=1)
    """Width of the feed-forward layer."""
    max_seq_len: int = Field(default=2048, ge=2)
    """Maximum sequence length in tokens."""

    norm: Literal["rms", "layer"] = "rms"
    """Type of normalization: RMSNorm or LayerNorm."""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """Position of the norms: before each sublayer, after its residual sum, or before and after the sublayer."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Constant added to the variance in norms."""
    norm_plus_one: bool = False
    """Scale RMSNorm by 1 + weight."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Nonlinearity of the feed-forward layer."""
    gated: bool = True
    """Use a gated feed-forward layer (SwiGLU, GeGLU)."""
    qkv_bias: bool = False
    """Add biases to queries, keys and values."""
    out_bias: bool = False
    """Add a bias to the attention output."""
    mlp_bias: bool = False
    """Add biases to the feed-forward layer."""
    qk_norm: bool = False
    """Apply RMSNorm to each query and key head."""
    attn_scale: float = Field(default=0.0, ge=0)
    """Factor on attention scores; 0 means head_dim ** -0.5."""
    attn_softcap: float = Field(default=0.0, ge=0)
    """Soft cap on attention scores; 0 means none."""
    final_softcap: float = Field(default=0.0, ge=0)
    """Soft cap on logits; 0 means none."""
    window: int = Field(default=0, ge=0)
    """Width of the attention window of local layers in tokens, including the current token; 0 means full attention."""
    window_every: int = Field(default=1, ge=1)
    """Period of the attention pattern in layers. The last layer of each period is global; 1 makes every layer local."""
    window_layers: tuple[int, ...] = ()
    """Indices of the local layers, in place of window_every; indices beyond the last layer are ignored."""

    positions: Literal["rope", "learned", "sinusoidal", "relative", "none"] = "rope"
    """Type of position encoding."""
    position_offset: int = Field(default=0, ge=0)
    """Number of rows before position 0 in the table of learned positions."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_local_theta: float = Field(default=0.0, ge=0)
    """Base of the rotary frequencies in local layers; 0 means rope_theta."""
    rope_scaling: dict[str, Any] = {}
    """Scaling of the rotary frequencies, with the keys of the Hugging Face config; empty means none."""
    relative_buckets: int = Field(default=32, ge=4)
    """Number of buckets of the relative position bias."""
    relative_max_distance: int = Field(default=128, ge=2)
    """Distance limit in tokens of the relative position bias: all larger distances share the last bucket."""

    tied: bool = True
    """Use the embedding table as the output projection."""
    embed_scale: float = Field(default=1.0, ge=0)
    """Factor on token embeddings; 0 means d_model ** 0.5."""
    logit_scale: float = Field(default=1.0, ge=0)
    """Factor on the hidden state before the output projection; 0 means d_model ** -0.5."""
    embed_norm: bool = False
    """Normalize the sum of the embeddings."""
    token_types: int = Field(default=0, ge=0)
    """Number of token types with an embedding each, such as 2 for BERT's first and second text; 0 means none."""
    head_transform: bool = False
    """Apply a dense layer, activation and norm before the output projection, and add a bias to the logits (BERT)."""
    head_activation: Literal["", "silu", "gelu", "gelu_tanh", "relu"] = ""
    """Nonlinearity of head_transform; if empty, the value of `activation`."""
    pooler: bool = False
    """Apply a dense layer with tanh to the pooled vector before classification."""
    next_sentence: bool = False
    """Add a next-sentence head to a language model: the pooler and two classes (BERT)."""
    head_bias: bool = True
    """Add a bias to the task head."""

    prompt_tokens: int = Field(default=0, ge=0)
    """Number of trained prompt vectors (prompt tuning). Their token ids start at vocab_size."""
    prefix_tokens: int = Field(default=0, ge=0)
    """Number of trained keys and values before every text in each layer (prefix tuning). The layers are those of the
    decoder or, if there is none, of the encoder. The first token of a text has the position prefix_tokens."""
    adapter_size: int = Field(default=0, ge=0)
    """Width of the bottleneck adapters in each layer; 0 means no adapters."""
    adapter_form: Literal["sequential", "parallel"] = "sequential"
    """Position of the adapters. sequential: after each sublayer. parallel: parallel to the feed-forward layer."""
    adapter_scale: float = Field(default=1.0, gt=0)
    """Factor on the output of the adapters."""

    head: Literal["lm", "classify", "regress", "tokens", "span", "embed", "choice"] = "lm"
    """Output head of the model: logits over the vocabulary (lm), or a task head."""
    labels: int = Field(default=0, ge=0)
    """Number of classes of a classification head."""
    pooling: Literal["last", "mean", "first"] = "last"
    """Reduction of a sequence to one vector: last token (without padding), mean, or first token."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate on embeddings and sublayer outputs during training."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # JSON has lists in place of tuples, and strict validation of values from Python refuses a list.
        tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return {**defaults(given.get("preset", ""), given.get("family", "")), **given, **tuples}

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        from llmctl.model import hf_config

        if large := next((name for name, v in self if isinstance(v, int) and v >= 2**31), ""):
            raise ValueError(f"{large} must be less than 2 ** 31")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary positions")
        if (self.architecture == "encoder_decoder") != (self.encoder_layers > 0):
            raise ValueError("encoder_layers belongs to the encoder_decoder architecture, which needs it")
        exact = self.relative_buckets // (4 if self.architecture == "encoder" else 2)
        if self.positions == "relative" and self.relative_max_distance <= exact:
            raise ValueError(
                f"relative_max_distance ({self.relative_max_distance}) must be more than {exact}: up to there every "
                f"distance has one of the relative_buckets ({self.relative_buckets}) to itself"
            )
        if wrong := hf_config.wrong_scaling(self.rope_scaling):
            raise ValueError(wrong)
        if self.window_layers and not self.window:
            raise ValueError("window_layers needs a window")
        if self.next_sentence and not (self.pooler and self.head_kind.vocabulary and self.architecture == "encoder"):
            raise ValueError("next_sentence needs an encoder with a pooler and the lm head")
        if self.head_kind.labelled and self.labels < 2:
            raise ValueError(f"head {self.head!r} needs labels >= 2")
        return self

    @property
    def head_kind(self) -> HeadKind:
        """Return the properties of the model's output head, such as whether it has one output per token."""
        return HEAD_KINDS[self.head]

    def of_stack(self, stack: str) -> ModelConfig:
        """Return the config for the layers of one stack, "encoder" or "decoder".

        In an encoder-decoder with prefix tuning, only the decoder has the trained prefix. The encoder's config then has
        no prefix. In all other cases, the result equals this config.
        """
        bare = self.prefix_tokens and self.encoder_layers and stack == "encoder"
        return self.model_copy(update={"prefix_tokens": 0}) if bare else self

    def local_layers(self, layers: int) -> list[bool]:
        """Return whether each of `layers` layers has local attention (a sliding window).

        If `window` is 0, no layer is local. If `window_layers` is set, these layers are local. Otherwise, all layers
        are local except the last of every `window_every` layers; if `window_every` is 1, all layers are local.
        """
        if not self.window:
            return [False] * layers
        if self.window_layers:
            return [i in self.window_layers for i in range(layers)]
        return [self.window_every == 1 or (i + 1) % self.window_every != 0 for i in range(layers)]

    def has_adapter(self, part: str) -> bool:
        """Return True if the sublayer `part` ("attn", "cross" or "mlp") of each layer has a bottleneck adapter."""
        return self.adapter_size > 0 and (part == "mlp" or self.adapter_form == "sequential")

    @property
    def task_head(self) -> bool:
        """Return True if the model has a task head. A next-sentence head is also a task head."""
        return not self.head_kind.vocabulary or self.next_sentence

    @property
    def pools(self) -> bool:
        """Return True if the task head has a pooler, a dense layer that follows the pooling of a sequence."""
        return self.pooler and self.task_head and not self.head_kind.per_token

    @property
    def head_width(self) -> int:
        """Return the output width of the task head's projection, such as the number of classes. Return 0 if the model
        has no task head, or if the task head has no projection."""
        return 0 if self.head_kind.bare or not self.task_head else self.head_kind.width or self.labels


def families() -> list[str]:
    """Return the names of all model families, which are the modules in the folder `families`."""
    folder = importlib.import_module(FAMILIES)
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__))


def presets() -> list[str]:
    """Return the names of all presets of all families."""
    return [name for f in families() for name in family(f).SIZES]


def family(name: str) -> ModuleType:
    """Return the module of a family. The module defines FLAGS, SIZES and, if Hugging Face checkpoints exist, BRIDGE."""
    return importlib.import_module(f"{FAMILIES}.{name}")


def defaults(preset: str, name: str) -> dict[str, Any]:
    """Return the default fields of ModelConfig for a preset or, if `preset` is empty, for a family.

    Args:
        preset: Name of the preset, such as "llama-tiny", or "".
        name: Name of the family, or "".

    Raises:
        ValueError: If the preset or the family is unknown, or if the preset is of another family than `name`.
    """
    if preset:
        given, name = name, next((f for f in families() if preset in family(f).SIZES), "")
        if not name:
            raise ValueError(f"unknown preset {preset!r}{hint(preset, presets())}; known: {', '.join(presets())}")
        if given not in ("", name):
            raise ValueError(f"preset {preset!r} is of the family {name!r}, not {given!r}; name one of the two")
    if not name:
        return {}
    if name not in families():
        raise ValueError(f"unknown family {name!r}; known: {', '.join(families())}")
    module = family(name)
    return {"family": name, **module.FLAGS, **(module.SIZES[preset] if preset else {})}
