"""Test tokenizers: exact round trips, deterministic training, and special tokens that text cannot spell."""

import json

import pytest

from llmctl.config.errors import RequestError
from llmctl.data.config import TokenizerConfig
from llmctl.data.corpus import Corpus, cached, tokenize
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.sentencepieces import _sample, _sentences

SMALL = TokenizerConfig(vocab_size=300)


@pytest.fixture(scope="module")
def trained(sentences):
    return loading.train(sentences, SMALL)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_twice_gives_the_same_bytes_and_says_nothing(sentences, kind, capfd):
    cfg = TokenizerConfig(kind=kind, vocab_size=300, sentinels=3)
    first, second = (loading.train(sentences, cfg) for _ in range(2))
    assert first.digest == second.digest
    assert first.vocab_size == 300
    assert (first.pad_id, first.unk_id, first.bos_id, first.eos_id, first.mask_id) == (0, 1, 2, 3, 4)
    assert first.sentinel_ids == (5, 6, 7)
    assert first.digest != loading.train(sentences[:500], cfg).digest
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text", ["the film was good", "", " two  spaces ", "tab\tline\n\r\nend", "naïve 漢字 🙂", "<mask></s><unk> <pad>"]
)
def test_round_trips_are_exact(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(i > 4 for i in ids), "text must not spell special tokens"
    assert trained.encode_batch([text, "x"])[0] == ids
    # A model may also emit special tokens and ids beyond the vocabulary.
    assert trained.decode([2, *ids, 4, 3, 0, 10**6]) == text


def test_prompt_begins_with_bos(trained, sentences):
    assert trained.prompt("the film") == [2, *trained.encode("the film")]
    assert trained.sentinel_ids == ()
    bare = loading.train(sentences, TokenizerConfig(vocab_size=300, bos="no"))
    assert bare.prompt("the film") == bare.encode("the film")


def test_saving_and_loading(trained, tmp_path):
    trained.save(tmp_path / "t")
    again = loading.load(tmp_path / "t")
    assert again.digest == trained.digest
    assert again.encode("the film") == trained.encode("the film")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "tokenizer.model").write_bytes(trained.model)
    given = loading.load_or_train([], TokenizerConfig(path=str(foreign), bos="no"))
    assert given.digest == trained.digest
    assert not given.add_bos
    assert loading.load(foreign / "tokenizer.model").add_bos
    assert TokenizerConfig(path=str(foreign)).inputs() == [str(foreign / "tokenizer.model")]


def test_what_cannot_be_loaded(trained, tmp_path):
    with pytest.raises(RequestError, match=r"no tokenizer there"):
        loading.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(RequestError, match=r"tokenizer.model: not a usable tokenizer"):
        loading.load(tmp_path)
    trained.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained.model[:-1])
    with pytest.raises(RequestError, match=r"the tokenizer is damaged"):
        loading.load(tmp_path)
    descriptor = tmp_path / "llmctl_tokenizer.json"
    descriptor.write_text(json.dumps(json.loads(descriptor.read_text()) | {"kind": "runes"}))
    with pytest.raises(RequestError, match=r"unknown kind 'runes'"):
        loading.load(tmp_path)
    descriptor.write_text("{")
    with pytest.raises(RequestError, match=r"damaged tokenizer descriptor"):
        loading.load(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        *({"bos": v} for v in ("yes", 2, None)),
        *({"kind": 1}, {"file": ["tokenizer.model"]}, {"digest": None}, {"special": {"bos": 1}}),
        *({"prefix": v} for v in (1, ["1"], [1.5], [-1], [2**31])),
        *({"template": v} for v in ([], {"begin": []}, {"begin": [True], "end": [], "between": []})),
    ],
)
def test_a_descriptor_with_values_of_other_types_is_refused(trained, tmp_path, edit):
    trained.save(tmp_path)
    descriptor = tmp_path / "llmctl_tokenizer.json"
    descriptor.write_text(json.dumps(json.loads(descriptor.read_text()) | edit))
    with pytest.raises(RequestError, match=r"damaged tokenizer descriptor"):
        loading.load(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_beyond_the_corpus(kind):
    with pytest.raises(RequestError, match=r"vocab_size = 4096 is larger .* the largest possible is (\d+)") as caught:
        loading.train(["hello hello world"] * 3, TokenizerConfig(kind=kind))
    largest = int(str(caught.value).split()[-1])
    assert loading.train(["hello hello world"] * 3, TokenizerConfig(kind=kind, vocab_size=largest))
    with pytest.raises(RequestError, match=r"too small for the bytes and characters"):
        loading.train(["".join(map(chr, range(0x4E00, 0x4E80)))] * 3, TokenizerConfig(kind=kind, vocab_size=264))
    with pytest.raises(RequestError, match=r"no text to train"):
        loading.train(["", "  "], TokenizerConfig(kind=kind))


def test_the_training_sample_is_whole_documents_up_to_a_budget():
    texts = [chr(97 + i) * 10 for i in range(20)]
    assert _sample(texts, 200) == texts
    some = _sample(texts, 45)
    assert sum(map(len, some)) == 45
    assert some == _sample(texts, 45)
    assert set(some[:-1]) < set(texts)
    long = "word " * 1000
    assert "".join(_sentences([long])) == long.rstrip() + " "
    assert max(map(len, _sentences([long, "x" * 5000]))) <= 2000


def test_a_corpus_is_flat_and_kept(trained, sentences, tmp_path):
    corpus = tokenize(sentences, trained)
    assert corpus.tokens.dtype == "uint16"
    assert len(corpus) == 600
    assert corpus[7].tolist() == trained.encode(sentences[7])
    kept = cached(tmp_path / "c", sentences, "texts", trained)
    assert (kept.tokens == corpus.tokens).all()
    # The second call reads the cache and tokenizes nothing.
    assert (cached(tmp_path / "c", (), "texts", trained).tokens == corpus.tokens).all()
    assert Corpus.load(tmp_path / "c", trained.digest, "other texts") is None
    assert Corpus.load(tmp_path / "c", "other tokenizer", "texts") is None
    (tmp_path / "c" / "tokens.npy").write_bytes(b"")
    assert Corpus.load(tmp_path / "c", trained.digest, "texts") is None
    with pytest.raises(RequestError, match=r"no text to tokenize"):
        tokenize([], trained)


def test_bytes_are_exact(tmp_path):
    made = loading.load_or_train([], TokenizerConfig(kind="bytes", sentinels=2))
    assert (made.vocab_size, made.sentinel_ids, made.mask_id, made.add_bos) == (263, (261, 262), 4, True)
    assert made.encode("aé") == [5 + 97, 5 + 0xC3, 5 + 0xA9]
    for text in ("naïve 漢字 🙂", "", "<mask>\n"):
        assert made.decode([2, *made.encode(text), 3, 262]) == text
    assert made.decode([5 + 0xC3]) == "\ufffd"
    made.save(tmp_path)
    assert loading.load(tmp_path).digest == made.digest
    assert loading.load(tmp_path, add_bos=False).prompt("a") == [102]


@pytest.fixture
def published(tmp_path):
    """Write a folder like those of published models: byte-level BPE, special tokens, a post-processor that adds bos."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|start|>", "<|stop|>", "<extra_id_0>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["the film was good", "the film was bad"] * 9, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<|start|>"}, "eos_token": "<|stop|>", "pad_token": None})
    )
    return tmp_path


def test_tokenizer_json(published, tmp_path_factory):
    made = loading.load(published)
    assert made.kind == "json"
    assert (made.bos_id, made.eos_id, made.pad_id, made.mask_id) == (0, 1, 1, None)
    assert made.add_bos
    assert made.sentinel_ids == (2,)
    for text in ("the film was quite good", "naïve 漢字 🙂\n", "<|stop|> is text", ""):
        ids = made.encode(text)
        assert all(i > 2 for i in ids)
        assert made.decode([0, *ids, 1, 10**6]) == text
        assert made.encode_batch([text]) == [ids]
    # The copy in the artifact needs no other files.
    kept = tmp_path_factory.mktemp("kept")
    made.save(kept)
    again = loading.load(kept)
    assert (again.digest, again.bos_id, again.eos_id, again.add_bos) == (made.digest, 0, 1, True)
    assert again.prompt("the") == made.prompt("the")
    given = loading.load_or_train([], TokenizerConfig(path=str(published / "tokenizer.json"), bos="no"))
    assert given.prompt("the") == made.encode("the")


def test_whether_texts_begin_with_a_token_is_as_the_folder_says_and_only_where_there_is_one(published, trained):
    said = json.loads((published / "tokenizer_config.json").read_text())
    (published / "tokenizer_config.json").write_text(json.dumps(said | {"add_bos_token": False}))
    assert not loading.load(published).add_bos
    assert loading.load(published, add_bos=True).add_bos
    (published / "tokenizer.json").unlink()
    (published / "tokenizer.model").write_bytes(trained.model)
    assert not loading.load(published).add_bos
    (published / "tokenizer.model").unlink()
    vocab = {"</s>": 0, "a": 1}
    (published / "tokenizer_config.json").unlink()
    (published / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    assert not loading.load(published).add_bos
    with pytest.raises(RequestError, match=r"has no begin-of-sequence token to begin with"):
        loading.load(published, add_bos=True)


def test_tokenizer_json_that_does_not_fit(published):
    (published / "tokenizer_config.json").write_text('{"eos_token": "<|over|>"}')
    with pytest.raises(RequestError, match=r"its eos token '<\|over\|>' is not in its vocabulary"):
        loading.load(published)
    (published / "tokenizer_config.json").unlink()
    with pytest.raises(RequestError, match=r"no end-of-sequence token that is known"):
        loading.load(published)
    (published / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match=r"tokenizer.json: not a usable tokenizer"):
        loading.load(published)


def test_files_outside_a_tokenizers_folder_are_not_read(tmp_path):
    made = ByteTokenizer.new()
    made.save(tmp_path / "words")
    made.save(tmp_path)
    for name in ("../bytes.json", str(tmp_path / "bytes.json")):
        described = json.loads((tmp_path / "words" / "llmctl_tokenizer.json").read_text()) | {"file": name}
        (tmp_path / "words" / "llmctl_tokenizer.json").write_text(json.dumps(described))
        with pytest.raises(RequestError, match=rf"words: names '{name}', which is not inside it"):
            loading.load(tmp_path / "words")
    for name, read in (("bytes.json", loading.load), ("chat_template.jinja", loading.chat_template)):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "bytes.json")
        with pytest.raises(RequestError, match=rf"{name}: is a link to {tmp_path}/bytes.json, outside"):
            read(folder)


def test_a_vocabulary_is_not_larger_than_its_file(tmp_path):
    """Arrays and lists are as long as the vocabulary."""
    (tmp_path / "bytes.json").write_text('{"sentinels": 1000000000000}')
    with pytest.raises(RequestError, match="1000000000000 sentinels; 1000 at most"):
        loading.load(tmp_path)
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 4_000_000_000}, "unk_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(RequestError, match="its largest token id is 4,000,000,000, and it does not hold so many"):
        loading.load(tmp_path)


FAULTS = {
    "panics when it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "panics on a text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "fails on a text": {"model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "[UNK]"}},
    "has a large id": {"model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 2**31}, "unk_token": "a"}},
    "has no vocabulary": {"model": {"type": "Unigram", "vocab": [], "unk_id": 3}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tokenizer_json_at_which_the_library_fails(tmp_path, capfd, fault):
    """A panic of the library is no Exception, and writes a report to standard error."""
    plain = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "a"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({**plain, **FAULTS[fault]}))
    with pytest.raises(RequestError, match=r"tokenizer.json: not a usable tokenizer \("):
        loading.load(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_text_at_which_the_library_fails():
    from llmctl.data.tokenizers import rust_errors

    def fails(text: str) -> str:
        raise type("PanicException", (BaseException,), {})("index out of bounds\nmore")

    with pytest.raises(RequestError, match=r"the tokenizer fails on a text \(index out of bounds\)$"):
        rust_errors.call(fails, "a")
    with pytest.raises(KeyboardInterrupt):
        rust_errors.reason(KeyboardInterrupt())
