"""What people write about their data: where it lies, which columns count, how it is split, how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from llmctl.config.base import Config
from llmctl.data.sources import SOURCES

Split = Literal["train", "validation", "test"]
Packing = Literal["segments", "concat", "fit"]
"""How documents share rows: `llmctl.data.pretraining.packing`."""
Truncate = Literal["tail", "head_tail"]
"""What a text too long keeps: its beginning, or its beginning and its end."""

TEXT_COLUMNS = ("text", "pair", "prompt", "completion", "context", "question")
"""Canonical columns that hold text. The first that there is decides a row's split, so a passage and all that is asked
about it are in one."""
COLUMNS = (*TEXT_COLUMNS, "label", "tokens", "tags", "answers")
"""All canonical columns; `tokens` and `tags` are lists, `answers` is {"text": [...], "answer_start": [...]}."""
TOGETHER = ({"tokens", "tags"}, {"context", "question", "answers"})
"""Columns that are taken unasked only where all of a set are there: alone they may mean anything."""

Scalar = str | bool | int | float


class SourceConfig(Config):
    """One place that rows come from, and how its columns map to ours."""

    heading: ClassVar[str] = "Data"
    common: ClassVar[tuple[str, ...] | None] = ("source", "path", "columns")

    source: Annotated[str, AfterValidator(SOURCES.check), SOURCES] = "text"
    """Kind of data: files (text, jsonl and csv also as .gz or .zst), a TFDS data set, a saved Hugging Face data set, or
    the tokens that `llmctl prepare` wrote."""
    path: str = ""
    """File, glob (`reviews/*.csv`) or a file inside an installed package (`pkg:NAME/path`); local or `gs://` alike.
    Sources hf and prepared: the folder that `save_to_disk` or `llmctl prepare` wrote."""
    name: str = ""
    """Source tfds: name of the data set, with config and version if wanted (`glue/sst2:2.0.0`)."""
    split: str = "train"
    """Sources tfds and hf: which of their splits to read; tfds may slice and add (`train[:80%]+test`)."""
    data_dir: str = ""
    """Source tfds: where data sets lie; $TFDS_DATA_DIR or ~/tensorflow_datasets by default."""
    download: bool = False
    """Source tfds: download and prepare the data set if it is not there."""
    columns: dict[str, str] = {}
    """Our column = their column, such as {text = "review"}; empty takes what is called as ours: text, pair, prompt,
    completion, label; tokens (words) and tags (a label each), both lists; context, question and answers as SQuAD has
    them, {text = [...], answer_start = [...]}, empty lists where there is no answer."""
    filter: dict[str, Scalar | list[Scalar]] = {}
    """Keeps the rows whose column (their name) has this value, or one of these values."""
    replace: dict[str, str] = {}
    """Substrings replaced in every text column, in this order."""
    documents: Literal["file", "line", "paragraph"] = "file"
    """Source text: what one document is. Paragraphs are separated by blank lines."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """Source csv: the character between fields."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the training rows of a mixture, relative to the other weights."""
    epochs: float = Field(default=0.0, ge=0)
    """How often training may read this source; then it is used up. 0 is endless."""

    @property
    def title(self) -> str:
        """The source in messages."""
        return self.path or self.name or self.source

    def inputs(self) -> list[str]:
        """Return the files that are read; their content belongs to a stage's key.

        Raises:
          RequestError: a path matches no file.
        """
        return [str(path) for path in SOURCES[self.source].inputs(self)]


class DataConfig(SourceConfig):
    """The data of a stage: one source or a mixture, its labels, its splits."""

    added: ClassVar[frozenset[str]] = frozenset({"label_separator"})

    mixture: list[SourceConfig] = []
    """Several sources instead of the one above, each with a weight."""
    classes: list[str] = []
    """Label values in the order of their class indices. Empty takes the distinct values, sorted, or in the order in
    which the data set declares their names (sources tfds, hf, parquet). Listed numbers keep the numbers."""
    label_type: Literal["class", "number", "set"] = "class"
    """Labels are classes, numbers for regression, or sets: any number of classes per row, also none."""
    label_separator: str = ""
    """Text between the labels of a set in one string, such as ","; empty takes lists only."""
    validation: float = Field(default=0.02, ge=0, lt=1)
    """Fraction of the texts held out for validation."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the texts held out for the final measurement; no stage trains on it."""
    dedup: bool = True
    """Drop repeated texts (up to case, Unicode form and white space) before splitting."""

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation ({self.validation}) + test ({self.test}) leave nothing to train on")
        given = [k for k, field in SourceConfig.model_fields.items() if getattr(self, k) != field.default]
        if self.mixture and given:
            named = ", ".join(given)
            raise ValueError(f"{named} and mixture exclude each other: move {named} into the [[data.mixture]] entries")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes are listed twice: {self.classes}")
        return self

    def parts(self) -> list[SourceConfig]:
        """The sources, one or many."""
        return list(self.mixture) or [self]

    def inputs(self) -> list[str]:
        """Files that are read, over all sources.

        Raises:
            RequestError: a path that leads to no file.
        """
        return [path for part in self.mixture for path in part.inputs()] if self.mixture else super().inputs()


class TokenizerConfig(Config):
    """How text becomes token ids: trained on the corpus, or given."""

    heading: ClassVar[str] = "Tokenizer"
    common: ClassVar[tuple[str, ...] | None] = ("kind", "path", "vocab_size")

    kind: Literal["unigram", "bpe", "bytes"] = "unigram"
    """Algorithm of the tokenizer that is trained (SentencePiece, arXiv:1808.06226, with byte fallback); bytes needs no
    training."""
    path: str = ""
    """Take this tokenizer (tokenizer.json or SentencePiece model, or a folder with one) instead of training."""
    vocab_size: int = Field(default=4096, ge=264)
    """Tokens, the special ones and 256 bytes included."""
    sample: int = Field(default=10_000_000, ge=1000)
    """Characters of the corpus to train on at most, drawn as whole documents by a fixed hash."""
    normalize: Literal["identity", "nfkc", "nfkc_lowercase"] = "identity"
    """Text form before tokenization; identity decodes to exactly the text that was encoded."""
    sentinels: int = Field(default=0, ge=0, le=1000)
    """Extra ids `<extra_id_0>` and on, for span corruption."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Documents and prompts begin with a begin-of-sequence token; auto: yes if trained, as the file says if given."""

    def inputs(self) -> list[str]:
        """Files of the given tokenizer; their content belongs to a stage's key.

        Raises:
            RequestError: a path that leads nowhere.
        """
        if not self.path:
            return []
        from llmctl.data.paths import files_below

        return [str(path) for path in files_below(self.path)]
