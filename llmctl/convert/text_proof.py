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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError, WorkError
from llmctl.convert.proof_texts import Rows, Samples, decoded, samples_of
from llmctl.convert.tokenizers import pools_last, projects_pooled, reads_texts
from llmctl.model.config import ModelConfig

COPY = 1.5
"""Memory that transformers needs to load a model, as a multiple of the size of the model's float32 weights."""

OUR_READER = "llmctl reads the written weights"


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


def tokens_there(cfg: ModelConfig, folder: Path, samples: Samples, theirs: bool) -> Rows:
    """Tokenize samples by the tokenizer in a folder, with transformers or the library `tokenizers`. Return the ids.

    If the model is a decoder with a pooled head, padding tokens at the end of a row are removed. transformers also
    removes these tokens before pooling.

    Args:
        cfg: Config of the model.
        folder: Folder of the model.
        samples: The texts, and pairs of texts.
        theirs: Whether transformers reads the tokenizer; if false, the library `tokenizers` reads it.
    """
    if theirs:
        with _quietly() as hf:
            words = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            short = {"truncation": True, "max_length": samples.length}
            rows = [words(text, **short)["input_ids"] for text in samples.texts]
            rows += [words(*pair, **short)["input_ids"] for pair in samples.pairs]
    else:
        from tokenizers import Tokenizer as Backend

        made = Backend.from_file(str(folder / "tokenizer.json"))
        made.no_padding()
        made.enable_truncation(samples.length)
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        made.encode_special_tokens = bool(settings.get("split_special_tokens", False))
        rows = [made.encode(text).ids for text in samples.texts]
        rows += [made.encode(*pair).ids for pair in samples.pairs]
    if not pools_last(cfg):
        return rows
    pad = json.loads((folder / "config.json").read_text("utf-8")).get("pad_token_id")
    return [ids[: max((n + 1 for n, i in enumerate(ids) if i != pad), default=0)] for ids in rows]


def read_rows(
    found: Artifact, cfg: ModelConfig, folder: Path, theirs: bool, say: Callable[[str], None]
) -> tuple[Samples, str]:
    """Tokenize the texts for the comparison of the artifact with the written model.

    Args:
        found: The artifact.
        cfg: Config of the written model.
        folder: Folder of the written model.
        theirs: Whether transformers reads the written tokenizer; if false, the library `tokenizers` reads it.
        say: Function that is called with one line if the written tokenizer gives other ids than the artifact's
            tokenizer. The ids of the written tokenizer are then returned.

    Returns:
        (samples, beginning of the comparison's description). The beginning is "from texts and pairs, " if
        there are sample pairs, otherwise "from text, ". Without a written tokenizer, it is "".

    Raises:
        WorkError: If the written tokenizer gives other ids than the artifact's tokenizer, and the model reads complete
            texts.
    """
    samples = samples_of(cfg, found.tokenizer_dir, found.manifest.seq_len)
    if not (folder / "tokenizer.json").is_file():
        return samples, ""
    try:
        there = tokens_there(cfg, folder, samples, theirs=theirs)
    except Exception as e:  # the libraries raise many exception types
        raise RequestError(
            f"{found.path}: other programs cannot read its tokenizer ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:200]}); correct its tokenizer_config.json"
        ) from None
    if differs := samples.difference(str(found.path), there):
        if reads_texts(cfg):
            raise WorkError(f"{differs}; nothing was written")
        say(f"{differs}; both sides are compared on theirs, and prompts there need llmctl's tokens for its answers")
        samples = samples.with_rows(there)
    return samples, "from texts and pairs, " if samples.pairs else "from text, "


def tokenization_difference(cfg: ModelConfig, source: Path, folder: Path) -> str:
    """Describe the first text that transformers and llmctl tokenize differently.

    transformers reads the files in `source`. llmctl uses the tokenizer in `folder`. Return "" if all texts have the
    same token ids. Also return "" if transformers is not installed, or if the model does not read complete texts.
    """
    if not reads_texts(cfg) or importlib.util.find_spec("transformers") is None:
        return ""
    samples = samples_of(cfg, folder)
    try:
        return samples.difference(str(source), tokens_there(cfg, source, samples, theirs=True))
    except Exception as e:  # the library raises many exception types
        return f"{source}: transformers cannot load its tokenizer ({type(e).__name__}); not compared"


def answers_there(
    cfg: ModelConfig, folder: Path, samples: Samples, adapter: Path | None = None, prompt: int = 0
) -> np.ndarray:
    """Compute the outputs of the model in `folder` by transformers, in the layout of `parity.answers`.

    A classifier runs on all texts as one batch, and on all pairs as another batch. The written tokenizer pads both
    batches. Other models run on one row at a time.

    Args:
        cfg: Config of the model.
        folder: Folder of the model.
        samples: The texts, and pairs of texts.
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
                kinds = [(list(samples.texts),), tuple(map(list, zip(*samples.pairs, strict=True)))]
                short = {"truncation": True, "max_length": samples.length, "padding": True, "return_tensors": "pt"}
                found = [model(**words(*texts, **short)).logits.float().numpy() for texts in kinds if texts]
                return np.concatenate(found).reshape(len(samples.rows), -1)
            both = zip(samples.rows, samples.types, strict=True)
            return np.stack([_one(cfg, model, torch, row, samples.length, folder, prompt) for row in both])


def _one(
    cfg: ModelConfig, model: Any, torch: Any, row: tuple[list[int], list[int]], T: int, folder: Path, prompt: int
) -> np.ndarray:
    """Compute the outputs for one row, which is (token ids, token types)."""
    ids, types = row
    given = {"input_ids": torch.tensor([ids])}
    if any(types) and cfg.token_types > 1:  # without types, transformers reads every token as one of the first text
        given["token_type_ids"] = torch.tensor([types])
    if cfg.encoder_layers:
        given["decoder_input_ids"] = torch.tensor([decoded(ids, T)])
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
