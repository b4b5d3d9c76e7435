"""Write a tokenizer with fewer tokens, and the tokenizer files that other programs read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.config.errors import RequestError
from llmctl.convert.tokenizers import BESIDE, GENERATION, ids_of, read_json
from llmctl.data.tokenizers import loading, vocabulary_subset
from llmctl.data.tokenizers.base import DESCRIPTOR, Tokenizer
from llmctl.data.tokenizers.sentencepieces import SentencePieces

REBUILT = ("vocab.txt", "vocab.json", "merges.txt")
"""Files of older programs that repeat the vocabulary. The files are omitted, because all programs read
tokenizer.json."""

SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
"""Keys of a generation_config.json that contain lists of token ids, although their names do not end in token_id."""


def write(folder: Path, kept: Sequence[int], rows: int, out: Path) -> Tokenizer:
    """Write an artifact's tokenizer with only the tokens `kept`, and return the new tokenizer.

    The token `kept[n]` gets the id n. The tokens of a trained prompt get the first ids after the new vocabulary.

    Args:
        folder: Folder of the artifact's tokenizer.
        kept: Ids of the kept tokens, ascending.
        rows: Number of rows of the model's embedding table.
        out: Folder to write to. An existing folder is replaced.

    Raises:
        RequestError: If the token `kept[n]` has another id than n in the written tokenizer.
    """
    old, at = loading.load(folder), {i: n for n, i in enumerate(kept)}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in BESIDE:
        if (folder / name).is_file() and name not in REBUILT:
            shutil.copy(folder / name, out / name)
    for name in ("tokenizer_config.json", "added_tokens.json", GENERATION):
        if content := read_json(out / name):
            (out / name).write_text(json.dumps(_renumbered(name, content, at), indent=2) + "\n", encoding="utf-8")
    described = json.loads((folder / DESCRIPTOR).read_text(encoding="utf-8"))
    (out / old.file).write_bytes(vocabulary_subset.of(old).subset(kept))
    described |= {"digest": type(old).open((out / old.file).read_bytes(), described, _epath(out)).digest}
    if template := old.own_template:
        parts = {name: [at[i] for i in getattr(template, name)] for name in ("begin", "end", "between")}
        described["template"] = parts
    if old.prefix:
        described["prefix"] = [i - rows + len(kept) for i in old.prefix]
    (out / DESCRIPTOR).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    _write_model_beside(folder, kept, old, out)
    new = loading.load(out)
    before, after = (vocabulary_subset.of(t).tokens for t in (old, new))
    if after != {n: before[i] for n, i in enumerate(kept) if i in before}:
        raise RequestError("vocabulary: this tokenizer numbers its added tokens by itself, so its tokens must stay")
    return new


def _write_model_beside(folder: Path, kept: Sequence[int], old: Tokenizer, out: Path) -> None:
    """Write a SentencePiece model with the kept tokens next to the tokenizer.json. The GGUF export needs this model."""
    file = folder / SentencePieces.file
    if old.file == SentencePieces.file or not file.is_file():
        return
    model = SentencePieces(file.read_bytes(), old.add_bos)
    own = [i for i in kept if i < model.vocab_size]
    (out / SentencePieces.file).write_bytes(vocabulary_subset.of(model).subset(own))


def _renumbered(name: str, content: dict[str, Any], at: dict[int, int]) -> dict[str, Any]:
    """Return the content of the tokenizer file `name` with new token ids, for `at` = {old id: new id}. Removed tokens
    are omitted."""
    if name == "added_tokens.json":
        return {token: at[i] for token, i in content.items() if i in at}
    out = dict(content)
    if decoder := content.get("added_tokens_decoder"):
        out["added_tokens_decoder"] = {str(at[int(i)]): token for i, token in decoder.items() if int(i) in at}
    if name != GENERATION:
        return out
    for key, value in content.items():
        if (key.endswith("token_id") or key in SUPPRESSED) and (ids := ids_of(value)):
            new = [at[i] for i in ids if i in at]
            out[key] = new if isinstance(value, list) else (new[0] if new else None)
    return out


def _epath(path: Path) -> Any:
    from etils import epath

    return epath.Path(path)
