"""Compare exported files with llmctl on texts: tokenization, padding, pooling and outputs.

The comparison starts from texts, not from token ids. The comparison therefore also tests special tokens, padding and
the pooling position. If transformers and torch are installed, transformers reads the files; otherwise llmctl reads the
files.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError, WorkError
from llmctl.convert import parity
from llmctl.convert.tokenizers import pools_last, projects_pooled, reads_texts
from llmctl.data.examples.labelled import templated
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.model.config import ModelConfig

TEXTS = (
    "The film was better than the book.",
    "x",
    "Ein Satz, 12 Worte?  Two spaces",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
)
"""Sample texts of unequal length. The last text is truncated, because it has more than `LENGTH` tokens."""
LENGTH = 24
"""Maximum number of tokens per row."""
COPY = 1.5
"""Memory that transformers needs to load a model, as a multiple of the size of the model's float32 weights."""

OUR_READER = "llmctl reads the written weights"

Rows = list[list[int]]


def texts_of(cfg: ModelConfig, folder: Path, seq_len: int = 0) -> tuple[Rows, int]:
    """Return the token ids of `TEXTS` from the tokenizer in a folder, and their maximum length T.

    Without a tokenizer, return one row of random tokens.
    """
    T = min(LENGTH, cfg.max_seq_len, seq_len or LENGTH)
    if not (folder / loading.DESCRIPTOR).is_file():
        return [np.random.default_rng(1).integers(0, cfg.vocab_size, T).tolist()], T
    words = loading.load(folder)
    return [_ids(cfg, words, text, T) for text in TEXTS], T


def _ids(cfg: ModelConfig, words: Tokenizer, text: str, T: int) -> list[int]:
    if reads_texts(cfg):
        return templated(words.template, np.array(words.encode(text), np.int32), None, T)[0].tolist()
    return words.prompt(text)[:T]


def batch_of(cfg: ModelConfig, rows: Rows, T: int) -> dict[str, jax.Array]:
    """Return the batch of `parity.probe` (random tokens), extended by one row for each sequence in `rows`."""
    probe = {k: np.asarray(v) for k, v in parity.probe(cfg, T).items()}
    side = _padded(rows, T, "encoder_" if cfg.encoder_layers else "")
    if cfg.encoder_layers:
        side |= _padded([_decoded(ids, T) for ids in rows], T, "")
    return {k: jnp.asarray(np.concatenate([v, side[k]]), jnp.int32) for k, v in probe.items()}


def _decoded(ids: Sequence[int], T: int) -> list[int]:
    """Return tokens for the decoder of an encoder-decoder: the start token, and up to five tokens of the text."""
    return [0, *ids[: min(5, T - 1)]]


def _padded(rows: Rows, T: int, prefix: str) -> dict[str, np.ndarray]:
    tokens, segments = np.zeros((2, len(rows), T), np.int32)
    for b, ids in enumerate(rows):
        tokens[b, : len(ids)], segments[b, : len(ids)] = ids, 1
    positions = np.arange(T, dtype=np.int32) * segments
    return {f"{prefix}tokens": tokens, f"{prefix}segments": segments, f"{prefix}positions": positions}


def available(found_bytes: int, package: str = "") -> str:
    """Return the reason why transformers cannot load the model; "" if there is none.

    The reason is a missing package or too little memory.

    Args:
        found_bytes: Size of the model's weights in float32.
        package: Name of another package that the format needs; empty if none.
    """
    for name in filter(None, ("transformers", "torch", package)):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    with contextlib.suppress(ValueError, OSError, AttributeError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if found_bytes * COPY > free:
            return f"transformers would need {found_bytes * COPY / 1e9:.1f} GB of memory"
    return ""


def tokens_there(cfg: ModelConfig, folder: Path, T: int, theirs: bool) -> Rows:
    """Return the token ids of `TEXTS` that transformers (or the library `tokenizers`) gets from the tokenizer in a
    folder.

    If the model is a decoder with a pooled head, padding tokens at the end of a row are removed. transformers also
    removes these tokens before pooling.

    Args:
        cfg: Config of the model.
        folder: Folder of the model.
        T: Maximum number of tokens per row.
        theirs: Whether transformers reads the tokenizer; if false, the library `tokenizers` reads it.
    """
    if theirs:
        with _quietly() as hf:
            words = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            rows = [words(text, truncation=True, max_length=T)["input_ids"] for text in TEXTS]
    else:
        from tokenizers import Tokenizer as Backend

        made = Backend.from_file(str(folder / "tokenizer.json"))
        made.no_padding()
        made.enable_truncation(T)
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        made.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        rows = [made.encode(text).ids for text in TEXTS]
    if not pools_last(cfg):
        return rows
    pad = json.loads((folder / "config.json").read_text("utf-8")).get("pad_token_id")
    return [ids[: max((n + 1 for n, i in enumerate(ids) if i != pad), default=0)] for ids in rows]


def same_tokens(what: str, ours: Rows, there: Rows) -> str:
    """Describe the first text for which the token ids in `ours` and `there` differ; return "" if all are equal."""
    for text, a, b in zip(TEXTS, ours, there, strict=True):
        if a != b:
            return f"{what}: others read {text!r} as {b[:8]}…{b[-2:]} ({len(b)} tokens), llmctl as {a[:8]}…{a[-2:]}"
    return ""


def read_rows(
    found: Artifact, cfg: ModelConfig, folder: Path, theirs: bool, say: Callable[[str], None]
) -> tuple[Rows, int, str]:
    """Tokenize the texts for the comparison of the artifact with the written model.

    Args:
        found: The artifact.
        cfg: Config of the written model.
        folder: Folder of the written model.
        theirs: Whether transformers reads the written tokenizer; if false, the library `tokenizers` reads it.
        say: Function that is called with one line if the written tokenizer gives other ids than the artifact's
            tokenizer. The ids of the written tokenizer are then returned.

    Returns:
        (token ids, maximum number of tokens T, beginning of the comparison's description). If a tokenizer was written,
        the description begins with "from text, ". If token ids are random, the beginning is "".

    Raises:
        WorkError: If the written tokenizer gives other ids than the artifact's tokenizer, and the model reads complete
            texts.
    """
    rows, T = texts_of(cfg, found.tokenizer_dir, found.manifest.seq_len)
    if not (folder / "tokenizer.json").is_file():
        return rows, T, ""
    try:
        there = tokens_there(cfg, folder, T, theirs=theirs)
    except Exception as e:  # the libraries raise many exception types
        raise RequestError(
            f"{found.path}: other programs cannot read its tokenizer ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:200]}); correct its tokenizer_config.json"
        ) from None
    if differs := same_tokens(str(found.path), rows, there):
        if reads_texts(cfg):
            raise WorkError(f"{differs}; nothing was written")
        say(f"{differs}; both sides are compared on theirs, and prompts there need llmctl's tokens for its answers")
        rows = there
    return rows, T, "from text, "


def tokenization_difference(cfg: ModelConfig, source: Path, folder: Path) -> str:
    """Describe the first text that transformers and llmctl tokenize differently.

    transformers reads the files in `source`. llmctl uses the tokenizer in `folder`. Return "" if all texts have the
    same token ids. Also return "" if transformers is not installed, or if the model does not read complete texts.
    """
    if not reads_texts(cfg) or importlib.util.find_spec("transformers") is None:
        return ""
    rows, T = texts_of(cfg, folder)
    try:
        return same_tokens(str(source), rows, tokens_there(cfg, source, T, theirs=True))
    except Exception as e:  # the library raises many exception types
        return f"{source}: transformers cannot load its tokenizer ({type(e).__name__}); not compared"


def answers_there(
    cfg: ModelConfig, folder: Path, rows: Rows, T: int, adapter: Path | None = None, prompt: int = 0
) -> np.ndarray:
    """Compute the outputs of the model in `folder` by transformers, in the layout of `parity.answers`.

    A classifier runs on all texts as one batch, padded by the written tokenizer. Other models run on one row at a time.

    Args:
        cfg: Config of the model.
        folder: Folder of the model.
        rows: Token ids of the texts.
        T: Maximum number of tokens per row.
        adapter: Folder of an adapter, which PEFT loads onto the model.
        prompt: Number of outputs at the vectors of a trained prompt. 0 if there is no prompt. Also 0 for an
            encoder-decoder, because the decoder does not read the prompt.

    Raises:
        WorkError: If transformers cannot load the model, or finds that weights are missing.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    with _quietly() as hf:
        import torch

        try:
            kind = getattr(hf, config["architectures"][0])
            model: Any
            model, info = kind.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, trust_remote_code=False
            )
        except Exception as e:  # the library raises many exception types
            raise WorkError(f"transformers cannot load what was written ({type(e).__name__}: {e})") from None
        odd = [str(n) for k in ("missing_keys", "mismatched_keys") for n in info[k]]
        if cfg.head_kind.bare:  # an embedding model has no use for the pooler that these classes construct
            odd = [n for n in odd if "pooler" not in n]
        if odd:
            raise WorkError(f"transformers misses {', '.join(odd[:4])} in what was written")
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        module: Any
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):  # weights stay integers; see Decisions on W8A8
                module.quantization_enabled = False
        model.eval()
        with torch.no_grad():
            if projects_pooled(cfg) and (folder / "tokenizer.json").is_file():
                words = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                given = words(list(TEXTS), truncation=True, max_length=T, padding=True, return_tensors="pt")
                return model(**given).logits.float().numpy().reshape(len(rows), -1)
            return np.stack([_one(cfg, model, torch, ids, T, folder, prompt) for ids in rows])


def _one(cfg: ModelConfig, model: Any, torch: Any, ids: list[int], T: int, folder: Path, prompt: int) -> np.ndarray:
    given = {"input_ids": torch.tensor([ids])}
    if cfg.encoder_layers:
        given["decoder_input_ids"] = torch.tensor([_decoded(ids, T)])
    out = model(**given)
    if cfg.head_kind.bare:
        return _pooled(out.last_hidden_state[0].float().numpy(), folder)
    if projects_pooled(cfg):
        return out.logits.float().numpy().reshape(-1)
    if "start_logits" in out:
        found = torch.stack([out.start_logits[0], out.end_logits[0]], -1)
    else:
        found = out.prediction_logits[0] if cfg.next_sentence else out.logits[0]
    flat = np.zeros((T + prompt, found.shape[-1]), np.float32)
    flat[: len(found)] = found.float().numpy()
    follows = out.seq_relationship_logits[0].float().numpy() if cfg.next_sentence else np.zeros(0, np.float32)
    return np.concatenate([flat.reshape(-1), follows])


def _pooled(x_TD: np.ndarray, folder: Path) -> np.ndarray:
    """Return the pooled and normalized vector [D], as the sentence-transformers files specify."""
    settings = json.loads((folder / "1_Pooling" / "config.json").read_text("utf-8"))
    if settings.get("pooling_mode_cls_token"):
        y_D = x_TD[0]
    else:
        y_D = x_TD[-1] if settings.get("pooling_mode_lasttoken") else x_TD.mean(0)
    return y_D / max(float(np.linalg.norm(y_D)), 1e-12)


@contextlib.contextmanager
def _quietly() -> Iterator[Any]:
    """Import transformers without progress bars and warnings, and yield the module."""
    # Progress bars of compressed-tensors cannot be disabled. Log handlers keep this stream, so it is never closed.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import transformers as hf
        from transformers.utils import logging

        level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield hf
        finally:
            logging.set_verbosity(level)
            if shown:
                logging.enable_progress_bar()
