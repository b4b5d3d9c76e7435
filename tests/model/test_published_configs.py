"""Published config.json files, with old keys, equal the presets of their names; also --drop and renamed tensors."""

import numpy as np
import pytest
import transformers as hf

from llmctl.config.errors import RequestError
from llmctl.convert import architectures, name_map
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import of_array
from llmctl.model.config import ModelConfig, family
from llmctl.model.hf_config import Keys

LLAMA = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
T5 = {
    "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
    "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
    "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "vocab_size": 32128,
}  # fmt: skip
BERT = {
    "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "num_attention_heads": 12, "num_hidden_layers": 12, "position_embedding_type": "absolute", "use_cache": True,
}  # fmt: skip
PUBLISHED = {
    "llama3.1-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": False, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": [128001, 128008],
    },
    "llama2-7b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None, "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "smollm2-135m": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    },
    "mistral-7b": {
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen2.5-0.5b": {
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma2-2b": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
    "gemma3-1b": {
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
        "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gpt2": {
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "bert-base": BERT | {
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "pad_token_id": 0,
        "type_vocab_size": 2, "vocab_size": 30522,
    },
    "roberta-base": BERT | {
        "layer_norm_eps": 1e-05, "max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1,
        "type_vocab_size": 1, "vocab_size": 50265,
    },
    "t5-small": T5 | {"d_ff": 2048, "n_positions": 512, "num_heads": 8, "num_layers": 6},
    "t5-v1.1-small": T5 | {
        "d_ff": 1024, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_config_is_the_preset(preset):
    name = ModelConfig(preset=preset).family
    keys = Keys(PUBLISHED[preset])
    fields = family(name).BRIDGE.from_config(keys)
    keys.finish(preset)
    found = ModelConfig.model_validate({**family(name).FLAGS, **fields, "family": name})
    expected = ModelConfig(preset=preset)
    odd = {k: (v, getattr(expected, k)) for k, v in found if v != getattr(expected, k)}
    assert odd.keys() <= {"preset", "dropout"}, odd  # what is pretrained here starts without dropout


def test_what_a_config_leaves_out_is_what_transformers_takes():
    def understood(preset, leave_out, **more):
        name = ModelConfig(preset=preset).family
        given = {k: v for k, v in (PUBLISHED[preset] | more).items() if k not in leave_out}
        return family(name).BRIDGE.from_config(Keys(given)), hf.AutoConfig.for_model(**given)

    ours, theirs = understood("mistral-7b", ["sliding_window"])
    assert ours["window"] == theirs.sliding_window == 4096
    assert understood("mistral-7b", [], sliding_window=None)[0]["window"] == 0  # null says that there is none
    ours, theirs = understood("gemma2-2b", ["attn_logit_softcapping", "final_logit_softcapping"])
    assert (ours["attn_softcap"], ours["final_softcap"]) == (50.0, 30.0)
    assert (theirs.attn_logit_softcapping, theirs.final_logit_softcapping) == (50.0, 30.0)
    more = {"use_sliding_window": True, "num_hidden_layers": 30}
    ours, theirs = understood("qwen2.5-0.5b", ["max_window_layers", "sliding_window"], **more)
    assert ours["window"] == theirs.sliding_window == 4096
    assert ours["window_layers"] == tuple(i for i, k in enumerate(theirs.layer_types) if k == "sliding_attention")
    assert ours["window_layers"] == (28, 29)


def test_old_names_and_heads_that_the_config_does_not_mention(tmp_path):
    """The files of bert-base-uncased: LayerNorm.gamma, and a next-sentence head that its config does not name."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = PUBLISHED["bert-base"] | sizes | {"vocab_size": 11, "max_position_embeddings": 6}
    config |= {"architectures": ["BertForMaskedLM"]}
    ours = {"d_model": 8, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 4, "d_ff": 12}
    cfg = ModelConfig(preset="bert-tiny", vocab_size=11, max_seq_len=6, **ours)
    tensors = {}
    for name, joint in name_map.tensor_layouts(cfg, *architectures.of(cfg)).items():
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[old] = of_array(np.zeros(joint.shape, np.float32))
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    found = folders.understand(tmp_path, config, tensors)
    assert (found.model.next_sentence, found.model.pooler) == (True, True)
    del tensors["cls.seq_relationship.bias"]
    with pytest.raises(RequestError, match=r"not understood: bert\.pooler\.dense\.weight.*--drop"):
        folders.understand(tmp_path, config, tensors)
    found = folders.understand(tmp_path, config, tensors, drop=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*"))
    assert (found.model.next_sentence, found.model.pooler) == (False, False)
