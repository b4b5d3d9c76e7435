"""The shape of the code, read from its source: what may import what, and that documents say what the program says."""

import ast
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from readme import README, generated

import llmctl
from llmctl.cli import app
from llmctl.pipeline import recipe, registry, stage

ROOT = README.parent
PACKAGE = ROOT / "llmctl"

ROOMS = (
    *("config", "distributed", "data", "model", "artifacts", "evaluate", "convert", "compress", "train"),
    *("pipeline", "plan", "cli"),
)
"""The folders of the package, from the lowest up: each imports itself and those before it, type checkers' imports
included. At most twelve."""

JAX_FREE = (
    *("cli", "pipeline", "__main__", "artifacts.workspace", "artifacts.atomic", "artifacts.artifact"),
    *("config", "distributed.backend", "distributed.processes", "model.config", "model.families"),
    *("data.config", "data.source", "data.sources", "train.run_log", "train.adapters"),
    *("train.distill_settings", "train.finetune_settings"),
    *(f"train.robust.{name}" for name in ("settings", "registry", "adversary", "fgm", "pgd", "freelb", "smart")),
    *("evaluate.metrics.base", "evaluate.report", "evaluate.settings", "evaluate.tasks.registry", "evaluate.probes"),
    *(f"evaluate.harm.{name}" for name in ("settings", "word_list")),
