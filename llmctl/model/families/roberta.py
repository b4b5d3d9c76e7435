"""Define RoBERTa: BERT without token types and without next-sentence prediction (Liu et al., 2019, arXiv:1907.11692).

Position ids start after the id of the padding token.
"""

from __future__ import annotations

from typing import Any

from llmctl.model import hf_config, hf_names
from llmctl.model.families import bert
from llmctl.model.hf_config import Fields, Keys
from llmctl.model.hf_names import Bridge, Head

FLAGS: Fields = {
    **bert.FLAGS, "norm_eps": 1e-5, "token_types": 1, "pooler": False, "next_sentence": False, "position_offset": 2,
    "vocab_size": 50_265,
}  # fmt: skip

SIZES: dict[str, Fields] = {
    "roberta-tiny": {"d_model": 128, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 64, "d_ff": 512},
    "roberta-base": {"d_model": 768, "layers": 12, "heads": 12, "kv_heads": 12, "head_dim": 64, "d_ff": 3072},
    "roberta-large": {"d_model": 1024, "layers": 24, "heads": 16, "kv_heads": 16, "head_dim": 64, "d_ff": 4096},
}


def from_config(keys: Keys) -> Fields:
    """Convert a RoBERTa config.json to fields of ModelConfig.

    The first position has the id `pad_token_id + 1`, so the table has `pad_token_id + 1` rows before position 0.
    """
    offset = keys.all.get("pad_token_id", 1) + 1
    fields = bert.from_config(keys)
    # The head for masked language modelling has GELU, whatever hidden_act is.
    head = "" if fields["activation"] == "gelu" else "gelu"
    return {
        **fields,
        "max_seq_len": fields["max_seq_len"] - offset,
        "position_offset": offset,
        "head_activation": head,
    }


def to_config(cfg: Any) -> Fields:
    """Convert a ModelConfig to a RoBERTa config.json; inverse of `from_config`."""
    if cfg.head == "lm" and (cfg.head_activation or cfg.activation) != "gelu":
        hf_config.refuse(cfg, "RoBERTa", head_activation="gelu")
    return {**bert.shared_to_keys(cfg), "pad_token_id": cfg.position_offset - 1}


MASKED = {
    **hf_names.linear({"lm_head/transform": "lm_head.dense"}),
    **hf_names.norm({"lm_head/norm": "lm_head.layer_norm"}),
    "lm_head/bias": "lm_head.bias",
    "lm_head/kernel": "lm_head.decoder.weight",
}
PAIR = hf_names.linear({"head/pooler": "classifier.dense", "head/out": "classifier.out_proj"})
OUT, NO_LM = bert.OUT, bert.NO_LM

BRIDGE = Bridge(
    "roberta",
    "roberta.",
    bert.names_of,
    {
        "lm": Head("RobertaForMaskedLM", MASKED, {"pooler": False}),
        "classify": Head("RobertaForSequenceClassification", PAIR, {"pooler": True, "pooling": "first", **NO_LM}),
        "regress": Head("RobertaForSequenceClassification", PAIR, {"pooler": True, "pooling": "first", **NO_LM}),
        "tokens": Head("RobertaForTokenClassification", OUT, {"pooler": False, **NO_LM}),
        "span": Head(
            "RobertaForQuestionAnswering", hf_names.linear({"head/out": "qa_outputs"}), {"pooler": False, **NO_LM}
        ),
        "embed": Head("RobertaModel", hf_names.linear({"head/pooler": "pooler.dense"}), {"pooler": True, **NO_LM}),
    },
    from_config,
    to_config,
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    buffers=(r"(roberta\.)?embeddings\.position_ids",),
    copies={"lm_head.decoder.bias": "lm_head.bias"},
)
