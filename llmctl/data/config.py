"""Define the settings for data: sources, columns, splits and tokenizers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from llmctl.config.base import Config
from llmctl.data.sources import SOURCES

Split = Literal["train", "validation", "test"]
HELD_OUT: tuple[Split, ...] = ("validation", "test")
"""Names of the splits that are not used for training."""
Packing = Literal["segments", "concat", "fit"]
"""Name of a method of packing documents into rows; `llmctl.data.pretraining.packing` describes the methods."""
Truncate = Literal["tail", "head_tail"]
"""Truncation of long texts: "tail" removes the end, "head_tail" removes the middle."""

TEXT_COLUMNS = ("text", "pair", "prompt", "completion", "chosen", "rejected", "context", "question")
"""Canonical columns (llmctl's own column names) that contain text. If a row has several of these columns, the first
text determines the row's split. All questions about a context are therefore in the same split."""
COLUMNS = (*TEXT_COLUMNS, "label", "tokens", "tags", "answers", "choices", "answer", "messages", "tools")
"""All canonical columns (llmctl's own column names). In a row, `tokens` and `tags` are lists, and `answers` is {"text":
[...], "answer_start": [...]}."""
CHAT_COLUMNS = {"messages", "tools"}
"""Canonical columns of conversations: `messages` (a list), and `tools` (a list of tools that the assistant may
call)."""
LABEL_COLUMNS = {"label", "tags", "answers", "choices", "answer"}
"""Canonical columns (llmctl's own column names) that contain labels instead of text."""
TOGETHER = ({"tokens", "tags"}, {"context", "question", "answers"}, {"chosen", "rejected"}, {"choices", "answer"})
"""Groups of column names, such as choices and answer. If `data.columns` is empty, the columns of a group are read only
if the source has all of them. A column named `answer` without `choices`, for example, may have another meaning."""

SENTENCE_PAIRS = (
    *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text_a", "text_b")),
    *(("question", "sentence"), ("sentence_A", "sentence_B")),
)
"""Names of the two text columns in well-known data sets of sentence pairs: entailment, paraphrase, similarity."""


def sentence_pair(known: Collection[str]) -> dict[str, str]:
    """Return the columns with the first text (`text`) and the second text (`pair`) in a data set of sentence pairs.

    The result is empty if the data set has no such columns, or has a column `text`.

    >>> sentence_pair(["premise", "hypothesis", "label"])
    {'text': 'premise', 'pair': 'hypothesis'}
    >>> sentence_pair(["text", "premise", "hypothesis"])
    {}
    """
    found = next((names for names in SENTENCE_PAIRS if {*names} <= {*known}), ())
    return {} if "text" in known else dict(zip(("text", "pair"), found, strict=False))


Scalar = str | bool | int | float


class SourceConfig(Config):
    """Configure one data source: its location, its columns, and how its rows are filtered and changed."""

    heading: ClassVar[str] = "Data"
    common: ClassVar[tuple[str, ...] | None] = ("source", "path", "columns")
    added: ClassVar[frozenset[str]] = frozenset({"template", "words"})

    source: Annotated[str, AfterValidator(SOURCES.check), SOURCES] = "text"
    """Kind of data: files, a TFDS data set, a saved Hugging Face data set, or prepared data (tokenized by `llmctl
    prepare`). Files of the kinds text, jsonl and csv may be compressed as .gz or .zst."""
    path: str = ""
    """File, glob (`reviews/*.csv`) or file inside an installed package (`pkg:NAME/path`); local or `gs://`. If the
    source is `hf` or `prepared`, the path is the folder that `save_to_disk` or `llmctl prepare` wrote."""
    name: str = ""
    """Name of the TFDS data set, if the source is `tfds`. Config and version are optional, as in `glue/sst2:2.0.0`."""
    split: str = "train"
    """Split to read, if the source is `tfds` or `hf`. tfds supports slices and sums, as in `train[:80%]+test`."""
    data_dir: str = ""
    """Folder of the TFDS data sets, if the source is `tfds`; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    download: bool = False
    """Download and prepare the data set if it is missing, for the source `tfds`."""
    columns: dict[str, str] = {}
    """Map from canonical column names to the source's column names, such as {text = "review"}. If empty, the columns
    with canonical names are read. Canonical names of text columns are text, pair, prompt, completion, chosen and
    rejected (a better and a worse completion), context and question. Other canonical names are label, tokens (a list of
    words), tags (one label per word) and answers. answers has SQuAD's format {text = [...], answer_start = [...]}, with
    empty lists if there is no answer. Multiple choice has choices (a list of texts) and answer (the index, the text or
    the name of the right choice). Conversations have messages (also called conversations) and tools."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Allowed values by column of the source: one value or a list. Rows with other values are dropped."""
    template: dict[str, str] = {}
    """Jinja2 templates of text columns to create for each row, by column name, such as {completion = " {{ words[label]
    }}"}. Templates can read the canonical columns, `row` (all columns of the source) and `words`."""
    words: dict[str, str] = {}
    """Words that templates use for the classes (verbalizer), by class name, such as {pos = "great", neg = "bad"}."""
    replace: dict[str, str] = {}
    """Replacements {substring: new text} in every text column, applied in the given order."""
    documents: Literal["file", "line", "paragraph"] = "file"
    """Unit that is one document, if the source is `text`: the whole file, a line, or a paragraph. Blank lines separate
    paragraphs."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Character between fields, if the source is csv."""
    weight: float = Field(default=1.0, gt=0)
    """Relative weight of this source in a mixture. The number of training rows per source is proportional to the
    weight."""
    epochs: float = Field(default=0.0, ge=0)
    """Maximum number of training epochs of this source; 0 means no limit."""

    @field_validator("template")
    @classmethod
    def _makes_text(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := [column for column in value if column not in TEXT_COLUMNS]:
            raise ValueError(f"makes no column {wrong[0]!r}; it makes {', '.join(TEXT_COLUMNS)}")
        return value

    @property
    def title(self) -> str:
        """Return the name of the source for error messages and logs."""
        return self.path or self.name or self.source

    def inputs(self) -> list[str]:
        """Return the paths of the input files. If the content of a file changes, stages that read the file run again.

        Raises:
            RequestError: If a path matches no file.
        """
        return [str(path) for path in SOURCES[self.source].inputs(self)]


class DataConfig(SourceConfig):
    """Configure the data of a stage: one source or a mixture, labels and splits."""

    added: ClassVar[frozenset[str]] = frozenset(
        {
            "template",
            "words",
            "label_separator",
            "unlabeled",
            "validation_path",
            "test_path",
            "validation_split",
            "test_split",
            "target_len",
            "examples_per_class",
            "examples_seed",
        }
    )

    mixture: list[SourceConfig] = []
    """List of sources, each with a weight, in place of a single source."""
    classes: list[str] = []
    """Label values in the order of their class indices. If empty, the classes are the distinct values of the data, in
    sorted order. If the data set declares class names (tfds, hf, parquet), the classes have the declared order instead.
    If `data.classes` contains numbers, declared names do not replace the numbers."""
    label_type: Literal["class", "number", "set"] = "class"
    """Type of the labels: a class, a number (regression), or a set of classes, which may be empty."""
    label_separator: str = ""
    """Separator between the labels of a row, such as ",", if label_type = "set" and the labels are one text. If empty,
    each row must have a list of labels."""
    unlabeled: Literal["refuse", "drop"] = "refuse"
    """Treatment of rows without a label: refuse the data, or drop the row. A label is missing if the cell is empty,
    null or NaN. The number -1 also means a missing label, unless data.classes lists -1."""
    validation: float = Field(default=0.02, ge=0, lt=1)
    """Fraction of the texts held out for validation."""
    test: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the texts held out for the final measurement. No stage trains on these texts. 1 holds out all texts,
    for data that is only evaluated."""
    validation_path: str = ""
    """Files of the validation split, of the same kind and columns as `path`, in place of a fraction. Rows of `path`
    with a text of these files are dropped, even if dedup is false. Case, Unicode form and white space are ignored in
    this comparison."""
    test_path: str = ""
    """Files of the test split, of the same kind and columns as `path`, in place of a fraction. Rows of `path` with a
    text of these files are dropped, even if dedup is false. Case, Unicode form and white space are ignored in this
    comparison."""
    validation_split: str = ""
    """Name of the validation split of a tfds or hf data set, in place of a fraction."""
    test_split: str = ""
    """Name of the test split of a tfds or hf data set, in place of a fraction."""
    target_len: int = Field(default=0, ge=0)
    """Maximum number of tokens per completion, including the end token, for encoder-decoders. 0 uses train.seq_len."""
    examples_per_class: int = Field(default=0, ge=0)
    """Number of training examples per class (few-shot); 0 uses all. Other splits are not reduced."""
    examples_seed: int = Field(default=0, ge=0)
    """Seed that selects the examples of `examples_per_class`."""
    dedup: bool = True
    """Drop repeated texts (up to case, Unicode form and white space) before splitting. Rows with the text of a held-out
    file or split (test_path, test_split, …) are always dropped."""

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.validation + self.test >= 1 and self.test < 1:
            raise ValueError(f"validation ({self.validation}) + test ({self.test}) leave nothing to train on")
        given = [k for k, field in SourceConfig.model_fields.items() if getattr(self, k) != field.default]
        if self.mixture and given:
            named = ", ".join(given)
            raise ValueError(f"{named} and mixture exclude each other: move {named} into the [[data.mixture]] entries")
        own = [
            f"{split}_{what}" for split in HELD_OUT for what in ("path", "split") if getattr(self, f"{split}_{what}")
        ]
        if own and self.mixture:
            raise ValueError(f"{', '.join(own)} and mixture exclude each other: a mixture is split by fractions")
        if own and self.source == "prepared":
            raise ValueError(f"{', '.join(own)}: not for prepared data; give them to `llmctl prepare`")
        named = [k for k in own if k.endswith("_split") and self.source not in ("tfds", "hf")]
        if named:
            raise ValueError(f"{', '.join(named)}: only sources tfds and hf have splits; name files in test_path")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes are listed twice: {self.classes}")
        return self

    def parts(self) -> list[SourceConfig]:
        """Return the sources of the mixture. If there is no mixture, return a list with only this config."""
        return list(self.mixture) or [self]

    @property
    def titles(self) -> str:
        """Return the names of all sources, for error messages."""
        return ", ".join(part.title for part in self.parts())

    def held_out(self) -> dict[Split, SourceConfig]:
        """Return the sources of held-out splits that have a source of their own, by split (validation, test).

        Settings such as `test_path` and `test_split` define these sources. All other held-out splits are fractions of
        the sources in `parts`, and are not in the result.
        """
        found: dict[Split, SourceConfig] = {}
        settings = {name: getattr(self, name) for name in SourceConfig.model_fields}
        for split in HELD_OUT:
            path, name = getattr(self, f"{split}_path"), getattr(self, f"{split}_split")
            if path or name:
                own = {"path": path or self.path, "split": name or self.split}
                found[split] = SourceConfig.model_construct(**{**settings, **own})
        return found

    def sources(self) -> list[SourceConfig]:
        """Return the sources in `parts`, followed by the sources in `held_out`."""
        return [*self.parts(), *self.held_out().values()]

    def inputs(self) -> list[str]:
        """Return the paths of the input files of all sources.

        Raises:
            RequestError: If a path matches no file.
        """
        if self.mixture:
            return [path for part in self.mixture for path in part.inputs()]
        return [*super().inputs(), *(path for part in self.held_out().values() for path in part.inputs())]


class TokenizerConfig(Config):
    """Configure the tokenizer, which is trained on the corpus or loaded."""

    heading: ClassVar[str] = "Tokenizer"
    common: ClassVar[tuple[str, ...] | None] = ("kind", "path", "vocab_size")

    kind: Literal["unigram", "bpe", "bytes"] = "unigram"
    """Algorithm of the tokenizer to train: unigram or bpe (SentencePiece, arXiv:1808.06226, with byte fallback). bytes
    needs no training."""
    path: str = ""
    """Tokenizer to load, in place of training one: tokenizer.json, a SentencePiece model, or a folder with such a
    file."""
    vocab_size: int = Field(default=4096, ge=264, lt=2**31)
    """Number of tokens, including special tokens and 256 bytes."""
    sample: int = Field(default=10_000_000, ge=1000)
    """Maximum number of characters of the corpus to train on. Complete documents are selected, by a fixed hash."""
    normalize: Literal["identity", "nfkc", "nfkc_lowercase"] = "identity"
    """Unicode normalization before tokenization. If the value is identity, decoding returns the encoded text. There is
    one exception: unigram and bpe decode the character U+2581 as a space."""
    sentinels: int = Field(default=0, ge=0, le=1000)
    """Number of extra tokens `<extra_id_0>`, `<extra_id_1>`, … for span corruption."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether documents and prompts begin with a begin-of-sequence token. auto: true for a new tokenizer, the value in
    the tokenizer's file for a loaded tokenizer."""

    def inputs(self) -> list[str]:
        """Return the paths of the tokenizer's files. If the content of a file changes, stages that read the file run
        again.

        Raises:
            RequestError: If the path matches no file.
        """
        if not self.path:
            return []
        from llmctl.data.paths import files_below

        return [str(path) for path in files_below(self.path)]
