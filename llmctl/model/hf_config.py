"""Convert keys of a Hugging Face config.json to fields of ModelConfig, and back.

Each family (`llmctl.model.families`) converts its own keys with these functions. `hf_names` maps the names of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.config.limits import LAYERS

Fields = dict[str, Any]


IRRELEVANT = frozenset({
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "initializer_factor", "initializer_cutoff_factor", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "_name_or_path", "name_or_path", "gradient_checkpointing",
    "return_dict", "output_attentions", "output_hidden_states", "output_past", "torchscript", "use_bfloat16",
    "chunk_size_feed_forward", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop",
    "classifier_dropout", "classifier_dropout_prob", "problem_type", "task_specific_params", "pretraining_tp",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "reorder_and_upcast_attn", "_attn_implementation", "attn_implementation", "cache_implementation", "id2label",
    "label2id", "num_labels", "finetuning_task", "tokenizer_class", "prefix", "auto_map", "directionality",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "transformers.js_config",
})  # fmt: skip
"""Keys of config.json that the conversion to a ModelConfig ignores. Most of these keys affect neither the outputs nor
the shapes of the network. `llmctl.convert.hf_folder` reads the remaining keys of this set, such as `architectures` and
`id2label`."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


class Keys:
    """Read the keys of a config.json one by one, and collect problems such as unsupported values.

    Every method that reads a key removes the key from `given`. `finish` then reports problems and all remaining keys.
    """

    def __init__(self, given: Mapping[str, Any], ignore: frozenset[str] = frozenset()):
        self.given = {k: v for k, v in given.items() if k not in IRRELEVANT | ignore}
        self.all = dict(given)
        self.problems: list[str] = []

    def take(self, key: str, default: Any = ...) -> Any:
        """Remove a key and return its value. If the key is missing or null, return the default.

        Without a default, a missing key is recorded as a problem.
        """
        value = self.given.pop(key, None)
        if value is not None:
            return value
        if default is ...:
            self.problems.append(f"{key} is missing")
            return 1
        return default

    def set_default(self, key: str, value: Any) -> None:
        """Add a missing key with `value`, its default in `transformers`. A key that exists is not changed, even if it
        is null."""
        self.given.setdefault(key, value)

    def check(self, key: str, *allowed: Any) -> None:
        """Remove a key. If its value is neither null nor one of the `allowed` values, record a problem."""
        value = self.given.pop(key, None)
        if value is not None and value not in allowed:
            self.problems.append(f"{key} = {value!r} is not supported")

    def activation(self, key: str, default: str) -> str:
        """Remove a key that names an activation, and return llmctl's name of the activation.

        An unknown activation is recorded as a problem.
        """
        value = self.take(key, default)
        if value not in ACTIVATIONS:
            self.problems.append(f"{key} = {value!r} is not a known activation")
        return ACTIVATIONS.get(value, "silu")

    def drop(self, *keys: str) -> None:
        """Accept keys with any value, because no value changes the outputs of a model of this family.

        The keys are removed, so that `finish` does not report them as unknown.
        """
        for key in keys:
            self.given.pop(key, None)

    def finish(self, where: str) -> None:
        """Raise an error if there are problems, or keys that no method has read.

        Args:
            where: Location of the config, for the error message.

        Raises:
            RequestError: If there are problems or unknown keys. The message lists up to eight of them.
        """
        unknown = [f"{k} = {v!r} is not understood" for k, v in sorted(self.given.items()) if v is not None]
        if self.problems + unknown:
            raise RequestError(f"{where}: {'; '.join((self.problems + unknown)[:8])}")


def rope_from_keys(keys: Keys, theta: float = 10_000.0, local: bool = False) -> Fields:
    """Convert the rotary keys of a config.json to fields of ModelConfig: the rotary bases and the scaling.

    Older files have the keys rope_theta and rope_scaling. Newer files have the key rope_parameters. If rope_parameters
    lacks the base, rope_theta is used.

    Args:
        keys: The config.json to read.
        theta: Rotary base if no key defines it.
        local: Whether local layers have a separate rotary base, as in Gemma 3.
    """
    theta = keys.take("rope_theta", theta)
    given = {"rope_theta": theta, **(keys.take("rope_scaling", None) or {})}
    given = keys.take("rope_parameters", None) or given
    if not local:
        return _rope(keys, given, theta)
    near = keys.take("rope_local_base_freq", 10_000.0)
    if "full_attention" in given:
        sliding = given.get("sliding_attention") or {}
        if sliding.get("rope_type", "default") != "default":
            keys.problems.append(f"rope_parameters.sliding_attention = {sliding!r} is not supported")
        near, given = sliding.get("rope_theta", near), given["full_attention"]
    return {**_rope(keys, given, theta), "rope_local_theta": float(near)}


SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"},
}
"""Types of rotary scaling, with their allowed parameters."""


def wrong_scaling(scaling: Mapping[str, Any]) -> str:
    """Return the error message for an invalid `rope_scaling` dict; an empty string if the dict is valid."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    numbers = {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
    if not scaling or kind == "default":
        return ""
    if kind not in SCALINGS:
        return f"rope_scaling of type {kind!r} is not known; known: {', '.join(SCALINGS)}"
    needed = {"factor", *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ())}
    if missing := sorted(needed - set(numbers)):
        return f"rope_scaling of type {kind!r} needs {', '.join(missing)}"
    if odd := sorted(set(numbers) - SCALINGS[kind]):
        return f"rope_scaling of type {kind!r} knows no {', '.join(odd)}; it knows {', '.join(sorted(SCALINGS[kind]))}"
    plain = {k: v for k, v in numbers.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    if bad := [k for k in numbers if not 0 < plain.get(k, 0) < math.inf]:
        return f"rope_scaling: {bad[0]} must be a number above 0"
    return ""


def _rope(keys: Keys, given: Mapping[str, Any], theta: float) -> Fields:
    scaling = {k: v for k, v in given.items() if v is not None and k not in ("rope_theta", "type", "rope_type")}
    kind = given.get("rope_type", given.get("type", "default"))
    fields: Fields = {"rope_theta": float(given.get("rope_theta") or theta), "rope_scaling": {}}
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        keys.problems.append(f"partial_rotary_factor = {given['partial_rotary_factor']} is not supported")
    if kind == "default":
        return fields
    if kind not in SCALINGS or (odd := set(scaling) - SCALINGS[kind]):
        what = kind if kind not in SCALINGS else f"{kind} with {', '.join(sorted(odd))}"
        keys.problems.append(f"rope scaling of type {what} is not supported")
    elif absent := ({"factor"} if kind == "yarn" else SCALINGS[kind]) - set(scaling):
        keys.problems.append(f"rope scaling of type {kind} lacks {', '.join(sorted(absent))}")
    return fields | {"rope_scaling": {"rope_type": kind, **scaling}}


def rope_to_keys(cfg: Any, local: bool = False) -> Fields:
    """Convert the rotary settings of a ModelConfig to keys of config.json; inverse of `rope_from_keys`.

    Both the older and the newer keys are returned, so that every release of transformers can read the rotary settings.
    """
    scaling = dict(cfg.rope_scaling)
    old = {"rope_scaling": scaling} if scaling else {}
    full = {"rope_type": "default", **scaling, "rope_theta": cfg.rope_theta}
    if not local:
        return {"rope_theta": cfg.rope_theta, "rope_parameters": full, **old}
    near = cfg.rope_local_theta or cfg.rope_theta
    return {
        "rope_theta": cfg.rope_theta,
        "rope_local_base_freq": near,
        **old,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        },
    }


def windows_from_keys(keys: Keys, layers: int, window: int, every: int = 1) -> Fields:
    """Return the fields of ModelConfig that define which layers have local attention.

    The key `layer_types` of config.json has one entry per layer. If the key is missing, the last of every `every`
    layers is global, and the others are local. If `every` is 1, all layers are local.

    Args:
        keys: The config.json to read.
        layers: Number of layers.
        window: Width of the attention window in tokens; 0 means that no layer is local.
        every: Period of the attention pattern in layers, if `layer_types` is missing.

    Raises:
        ValueError: If there are more layers than `LAYERS`.
    """
    kinds = keys.take("layer_types", None)
    if layers > LAYERS:
        raise ValueError(f"{layers:,} layers; at most {LAYERS:,} are supported")
    if not window:
        if kinds and set(kinds) != {"full_attention"}:
            keys.problems.append("layer_types has windows, but there is no sliding_window")
        return {"window": 0, "window_every": 1, "window_layers": ()}
    rule = [every == 1 or (i + 1) % every != 0 for i in range(layers)]
    if kinds is None:
        return {"window": window, "window_every": every, "window_layers": ()}
    if odd := set(kinds) - {"full_attention", "sliding_attention"}:
        keys.problems.append(f"layer_types {', '.join(sorted(odd))} are not supported")
    if len(kinds) != layers:
        keys.problems.append(f"layer_types has {len(kinds)} entries for {layers} layers")
    local = [k == "sliding_attention" for k in kinds]
    if local == rule:
        return {"window": window, "window_every": every, "window_layers": ()}
    if not any(local):
        return {"window": 0, "window_every": 1, "window_layers": ()}
    return {
        "window": window,
        "window_every": 1,
        "window_layers": () if all(local) else tuple(i for i, x in enumerate(local) if x),
    }


def windows_to_keys(cfg: Any) -> list[str]:
    """Return the value of the config key `layer_types`, with one entry per layer.

    An entry is "sliding_attention" for a layer with local attention, and "full_attention" for any other layer.
    """
    return ["sliding_attention" if local else "full_attention" for local in cfg.local_layers(cfg.layers)]


def refuse(cfg: Any, what: str, **needed: Any) -> None:
    """Check that fields of a ModelConfig have the values that a family requires.

    Args:
        cfg: The ModelConfig.
        what: Name of the family, for the error message.
        **needed: Required value of each field.

    Raises:
        RequestError: If a field has another value.
    """
    odd = [f"{k} = {getattr(cfg, k)!r}" for k, v in needed.items() if getattr(cfg, k) != v]
    if odd:
        raise RequestError(f"{what} models have no {', '.join(odd)}; this model has no counterpart to export to")


def check_width(cfg: Any, what: str) -> None:
    """Check that the number of heads divides the model width `d_model`, as transformers requires for some families.

    Args:
        cfg: The ModelConfig.
        what: Name of the family, for the error message.

    Raises:
        RequestError: If the number of heads does not divide the model width.
    """
    if cfg.d_model % cfg.heads:
        raise RequestError(
            f"{what} models in transformers need a hidden width that is a multiple of their heads, and this one has "
            f"width {cfg.d_model} and {cfg.heads} heads; prune to other sizes"
        )
