"""Convert SentencePiece models to tokenizer.json, and check that both tokenize equally.

Many programs read only tokenizer.json. A converted tokenizer is used only if it tokenizes all sample texts like the
SentencePiece model. A folder may have both a SentencePiece model and a tokenizer.json. The SentencePiece model is then
used only if both tokenize the sample texts identically.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from llmctl.data.tokenizers.sentencepieces import SentencePieces
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""Piece types of SentencePiece models."""
SPACE = "▁"

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "Numbers such as 3.14159, 2024 and 1,000,000; it's (so) [they] {say}!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — naïve façade, Ωμέγα, привет, 你好, 🙂",
    "  leading,  double   spaces and trailing ",
    "lines\nand\ttabs\n\n",
    "",
)
"""Texts that both tokenizers must tokenize identically."""


def model_beside(words: JsonTokenizer, folder: Path) -> SentencePieces | None:
    """Return the SentencePiece model of a folder that also contains a tokenizer.json, if both tokenize equally.

    Folders of Llama 2, Mistral and Gemma contain both files.

    Args:
        words: Tokenizer of the file tokenizer.json.
        folder: The folder.

    Returns:
        The model. None if the folder has no such model. Also None if the model has other tokens than the
        tokenizer.json, or if the two differ on a sample text. Texts that begin with a space may be tokenized
        differently (`spaces_differ`).
    """
    file = folder / SentencePieces.file
    if not file.is_file():
        return None
    try:
        found = SentencePieces(file.read_bytes(), words.add_bos)
    except ValueError:
        return None
    if found.vocab_size > words.vocab_size:
        return None
    names = {i: t for t, i in Tokenizer.from_buffer(words.model).get_vocab(with_added_tokens=True).items()}
    if any(names.get(i) != found.piece(i) for i in range(found.vocab_size)):
        return None
    return found if all(words.encode(t) == found.encode(t) for t in SAMPLES if not t.startswith(" ")) else None


def spaces_differ(words: JsonTokenizer, found: SentencePieces) -> bool:
    """Return True if the tokenizer.json and the SentencePiece model tokenize texts that begin with spaces differently.

    Newer files of tokenizer.json add no space before such texts, but SentencePiece does.
    """
    return any(words.encode(t) != found.encode(t) for t in SAMPLES if t.startswith(" "))


def convert(words: SentencePieces) -> Tokenizer | None:
    """Convert a SentencePiece model to a tokenizer of the library `tokenizers`.

    Returns:
        The tokenizer. None if the type of the model is not supported. Also None if the tokenizer and the model differ
        on a sample text.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(words.model)
    pieces = [(p.piece, p.score) for p in model.pieces]
    spec, trainer = model.normalizer_spec, model.trainer_spec
    made: Any
    if trainer.model_type == proto.TrainerSpec.UNIGRAM:
        made = Tokenizer(models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback))
    elif trainer.model_type == proto.TrainerSpec.BPE:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        unknown = model.pieces[trainer.unk_id].piece
        merges = _merges(vocab, [p.score for p in model.pieces])
        bpe = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
        made = Tokenizer(bpe)
    else:
        return None
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    # The Metaspace step is not used: it adds no space before a text that begins with one, but SentencePiece does.
    steps += [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    ending = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ending])
    special = [p.piece for p in model.pieces if p.type in (CONTROL, UNKNOWN)]
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.add_tokens([AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == USER])
    made.encode_special_tokens = True
    alike = all(made.encode(t, add_special_tokens=False).ids == words.encode(t) for t in SAMPLES)
    made.encode_special_tokens = False
    return made if alike else None


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE model: all pairs of pieces that form a piece, by descending score of the
    piece."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[i], vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
