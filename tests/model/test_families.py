"""Families versus `transformers`: random models of unusual sizes keep their logits in import and export."""

import functools
import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open

from llmctl.config.errors import RequestError
from llmctl.convert import architectures, hf_export
from llmctl.convert import hf_folder as folders
from llmctl.evaluate.tasks.registry import default
from llmctl.model import functional
from llmctl.model.config import ModelConfig

VOCAB = 67
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
}
T5 |= {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 9}

MODELS = {
    "llama-untied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    "llama-tied": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**GROUPED, tie_word_embeddings=True, head_dim=10, attention_bias=True, mlp_bias=True)
    ),
    "llama-yarn": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, rope_parameters=YARN)),
    "llama-yarn-shorter": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**GROUPED, rope_parameters=YARN | {"factor": 0.5})
    ),
    "llama-yarn-long": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**GROUPED, rope_parameters=YARN | {"original_max_position_embeddings": 4_000_000})
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=5)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen2-window": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    "qwen2-heads-pruned": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED, head_dim=10)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=10)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **GROUPED, head_dim=10, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0, attn_implementation="eager",
        )
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **{**GROUPED, "num_hidden_layers": 7}, head_dim=10, sliding_window=5, query_pre_attn_scalar=7,
            rope_parameters=GEMMA3_ROPE,
        )
    ),
    "gemma3-cap": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GROUPED, head_dim=10, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=3, n_head=3, n_positions=48)),
    "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**SMALL)),
    "bert-masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, hidden_act="gelu_new")),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**{**SMALL, "pad_token_id": 3}, type_vocab_size=1)),
    "roberta-relu": lambda: hf.RobertaForMaskedLM(
        hf.RobertaConfig(**{**SMALL, "pad_token_id": 3}, type_vocab_size=1, hidden_act="relu")
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-v1.1": lambda: untied(
        hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    ),
}  # fmt: skip
HEADS = {
    "llama-classify": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED, num_labels=3)),
    "llama-tokens": lambda: hf.LlamaForTokenClassification(hf.LlamaConfig(**GROUPED, num_labels=3)),
    "llama-span": lambda: hf.LlamaForQuestionAnswering(hf.LlamaConfig(**GROUPED)),
    "mistral-span": lambda: hf.MistralForQuestionAnswering(hf.MistralConfig(**GROUPED, sliding_window=5)),
    "qwen2-span": lambda: hf.Qwen2ForQuestionAnswering(hf.Qwen2Config(**GROUPED)),
    "qwen3-tokens": lambda: hf.Qwen3ForTokenClassification(hf.Qwen3Config(**GROUPED, head_dim=10, num_labels=3)),
    "gemma2-tokens": lambda: hf.Gemma2ForTokenClassification(
        hf.Gemma2Config(**GROUPED, head_dim=10, sliding_window=5, attn_implementation="eager", num_labels=3)
    ),
    "gemma3-classify": lambda: hf.Gemma3TextForSequenceClassification(
        hf.Gemma3TextConfig(**GROUPED, head_dim=10, sliding_window=5, num_labels=3)
    ),
    "gpt2-tokens": lambda: hf.GPT2ForTokenClassification(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=3, n_positions=48, num_labels=3)
    ),
    "gpt2-span": lambda: hf.GPT2ForQuestionAnswering(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=3, n_positions=48)
    ),
    "gpt2-classify": lambda: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=3, n_positions=48, num_labels=3, pad_token_id=0)
    ),
    "bert-classify": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3)),
    "bert-regress": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=1)),
    "bert-tokens": lambda: hf.BertForTokenClassification(hf.BertConfig(**SMALL, num_labels=3)),
    "bert-span": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SMALL)),
    "roberta-tokens": lambda: hf.RobertaForTokenClassification(
        hf.RobertaConfig(**{**SMALL, "pad_token_id": 3}, type_vocab_size=1, num_labels=3)
    ),
    "roberta-span": lambda: hf.RobertaForQuestionAnswering(
        hf.RobertaConfig(**{**SMALL, "pad_token_id": 3}, type_vocab_size=1)
    ),
    "t5-tokens": lambda: hf.T5ForTokenClassification(hf.T5Config(**T5, num_labels=3)),
    "t5-v1.1-tokens": lambda: hf.T5ForTokenClassification(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_labels=3)
    ),
    "roberta-classify": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**{**SMALL, "pad_token_id": 3}, num_labels=3)
    ),
}


def untied(model):
    model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 24))
    return model


@functools.cache
def reference(name):
    """A model whose every parameter matters: norms and biases away from their neutral values too."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = {**MODELS, **HEADS}[name]().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            around = 1.0 if "norm" in path.lower() and path.endswith("weight") and "gemma" not in name else 0.0
            p.copy_(around + 0.3 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """name -> (folder of transformers, what we found there, our parameters), made once."""

    @functools.cache
    def make(name):
        path = tmp_path_factory.mktemp(name)
        reference(name).save_pretrained(path)
        found = folders.inspect(path)
        return path, found, folders.load(found, lambda _, w: jnp.asarray(w.read(())))

    return make


LENGTHS = [(13, 9), (9, 6)]
"""Of two sequences: in the encoder (or alone), in the decoder beside it."""


def tokens(T, seed):
    return np.random.default_rng(seed).integers(4, VOCAB, T)


def theirs(name, ids, decoder_ids=None, types=None):
    """Their answer for one sequence without padding, [1, …] arrays."""
    given = {"input_ids": torch.tensor(ids)[None]}
    if decoder_ids is not None:
        given["decoder_input_ids"] = torch.tensor(decoder_ids)[None]
    if types is not None and "bert" in name and "roberta" not in name:
        given["token_type_ids"] = torch.tensor(types)[None]
    with torch.no_grad():
        return {k: v.numpy() for k, v in reference(name)(**given).items() if torch.is_tensor(v)}


def row(prefix, pieces, T):
    """One packed row of T tokens: {tokens, segments, positions}."""
    out = {k: np.zeros(T, np.int32) for k in ("tokens", "segments", "positions")}
    at = 0
    for i, ids in enumerate(pieces):
        n = len(ids)
        out["tokens"][at : at + n], out["segments"][at : at + n] = ids, i + 1
        out["positions"][at : at + n] = np.arange(n)
        at += n
    return {prefix + k: v for k, v in out.items()}


def answers(cfg, params, batch):
    """(logits of the language model or None, the task head's answer or None).

    Not jitted: the models share the shapes of most operations, which are compiled once so.
    """
    x = functional.hidden(cfg, params, batch)
    lm = functional.lm_logits(cfg, params, x) if cfg.head == "lm" else None
    return lm, functional.outputs(cfg, params, x, batch) if cfg.head != "lm" or cfg.next_sentence else None


@pytest.mark.parametrize("name", MODELS)
def test_logits_with_padding_and_packed_rows_are_those_of_transformers(name, saved):
    cfg = saved(name)[1].model
    pieces = [(tokens(a, i), tokens(b, i + 9) if cfg.encoder_layers else None) for i, (a, b) in enumerate(LENGTHS)]
    T = 24  # both fit in a row with two of padding
    rows = [[0], [1], [0, 1]]
    if cfg.encoder_layers:
        batch = [row("encoder_", [pieces[i][0] for i in r], T) | row("", [pieces[i][1] for i in r], T) for r in rows]
    else:
        batch = [row("", [pieces[i][0] for i in r], T) for r in rows]
    batch = {k: jnp.asarray(np.stack([b[k] for b in batch])) for k in batch[0]}
    types = np.zeros(T, np.int32)
    types[4:8] = 1
    if cfg.token_types > 1:
        batch["types"] = jnp.asarray(np.stack([types] * 3))
    logits, follows = answers(cfg, saved(name)[2], batch)
    logits = np.asarray(logits)
    n = [len(p[1] if cfg.encoder_layers else p[0]) for p in pieces]
    second_in_packed = types[n[0] : n[0] + n[1]]
    largest = 0.0
    for r, start, i, kinds in ((0, 0, 0, types), (1, 0, 1, types), (2, 0, 0, types), (2, n[0], 1, second_in_packed)):
        expected = theirs(name, *pieces[i], types=kinds[: n[i]])
        key = "prediction_logits" if "prediction_logits" in expected else "logits"
        assert np.abs(expected[key]).max() > 0.3
        largest = max(largest, np.abs(logits[r, start : start + n[i]] - expected[key][0]).max())
        if cfg.next_sentence and start == 0 and r < 2:
            np.testing.assert_allclose(follows[r], expected["seq_relationship_logits"][0], atol=1e-4)
    assert largest <= 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_task_heads_answer_as_those_of_transformers(name, saved):
    _, found, params = saved(name)
    cfg, ids = found.model, [tokens(a, i) for i, (a, _) in enumerate(LENGTHS)]
    batch = [row("", [x], 24) for x in ids]
    batch = {k: jnp.asarray(np.stack([b[k] for b in batch])) for k in batch[0]}
    ours = np.asarray(answers(cfg, params, batch)[1])
    for i, x in enumerate(ids):
        expected = theirs(name, x)
        if cfg.head == "span":
            both = np.stack([expected["start_logits"][0], expected["end_logits"][0]], -1)
            np.testing.assert_allclose(ours[i, : len(x)], both, atol=1e-4)
        else:
            y = ours[i, : len(x)] if cfg.head == "tokens" else ours[i]
            np.testing.assert_allclose(y, expected["logits"][0].squeeze(), atol=1e-4)


@pytest.mark.parametrize("model_type", architectures.bridges())
def test_every_class_that_we_write_exists_in_transformers(model_type):
    heads = architectures.bridges()[model_type][1].heads.values()
    assert [h.architecture for h in heads if not hasattr(hf, h.architecture)] == []


def test_gemma3_classifiers_of_the_earlier_class_name_come_in(saved, tmp_path):
    """Earlier releases of llmctl wrote the class of the multimodal model."""
    path, found, _ = saved("gemma3-classify")
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Gemma3TextForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma3ForSequenceClassification"]}))
    shutil.copy(path / "model.safetensors", tmp_path)
    assert folders.inspect(tmp_path).model == found.model


@pytest.mark.parametrize("name", [*MODELS, *HEADS])
def test_goes_back_out_with_the_same_bytes_and_transformers_loads_it(name, saved, tmp_path):
    path, found, params = saved(name)
    config = hf_export.config_of(
        found.model, default(found.model), found.labels, {"pad_token_id": found.config.get("pad_token_id")}, "float32"
    )
    hf_export.save(tmp_path, config, hf_export.tensors_of(found.model, params))
    with safe_open(path / "model.safetensors", "np") as a, safe_open(tmp_path / "model.safetensors", "np") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        for n in a.keys():  # noqa: SIM118
            assert a.get_slice(n).get_dtype() == b.get_slice(n).get_dtype()
            np.testing.assert_array_equal(a.get_tensor(n), b.get_tensor(n), err_msg=n, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, info = type(reference(name)).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = {"input_ids": torch.tensor(tokens(13, 0))[None]}
    given |= {"decoder_input_ids": torch.tensor(tokens(9, 9))[None]} if found.model.encoder_layers else {}
    with torch.no_grad():
        a, b = reference(name)(**given), again.eval()(**given)
    for k in ("logits", "prediction_logits", "start_logits"):
        if k in a:
            torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-6)
    second = folders.inspect(tmp_path)
    assert second.model == found.model
    assert second.labels == found.labels


def test_a_t5_encoder_alone_is_an_embedding_model(tmp_path):
    """Means of T5EncoderModel's states in, and out again as transformers loads it; other heads are refused."""
    torch.manual_seed(1)
    theirs_ = hf.T5EncoderModel(hf.T5Config(**T5)).eval()
    with torch.no_grad():
        for path, p in theirs_.named_parameters():
            p.copy_(("norm" in path) + 0.3 * torch.randn(p.shape))
    theirs_.save_pretrained(tmp_path / "a")
    found = folders.inspect(tmp_path / "a")
    params = folders.load(found, lambda _, w: jnp.asarray(w.read(())))
    assert (found.model.architecture, found.model.head, found.model.layers) == ("encoder", "embed", 3)
    batch = [row("", [tokens(a, i)], 16) for i, (a, _) in enumerate(LENGTHS)]
    ours = answers(found.model, params, {k: jnp.asarray(np.stack([b[k] for b in batch])) for k in batch[0]})[1]

    hf_export.save(
        tmp_path / "b",
        hf_export.config_of(found.model, default(found.model), [], {}, "float32"),
        hf_export.tensors_of(found.model, params),
    )
    again, info = hf.T5EncoderModel.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for i, (n, _) in enumerate(LENGTHS):
        ids = torch.tensor(tokens(n, i))[None]
        with torch.no_grad():
            x_D, y_D = (m.eval()(ids).last_hidden_state[0].mean(0) for m in (theirs_, again))
        torch.testing.assert_close(x_D, y_D, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[i], (x_D / x_D.norm()).numpy(), atol=1e-4)
    assert folders.inspect(tmp_path / "b").model == found.model

    for head in ("classify", "regress", "span"):
        cfg = found.model.model_copy(update={"head": head, "labels": 2 if head == "classify" else 0})
        with pytest.raises(RequestError, match=f"t5 models have no head '{head}' to export to"):
            hf_export.config_of(cfg, default(cfg), [], {}, "float32")


def test_every_preset_has_consistent_shapes_and_a_counterpart_with_the_same_config():
    from llmctl.model.config import family, presets

    for name in presets():
        cfg = ModelConfig(preset=name)
        if not hasattr(family(cfg.family), "BRIDGE"):
            continue
        config = json.loads(json.dumps(hf_export.config_of(cfg, default(cfg), [], {}, "float32")))
        assert config["model_type"] == family(cfg.family).BRIDGE.model_type
        assert hf.AutoConfig.for_model(**config).vocab_size == cfg.vocab_size
