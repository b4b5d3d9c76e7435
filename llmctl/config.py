"""Frozen, strict configuration classes: the one place where a setting has its name, type, default and meaning."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of every settings class. Field docstrings become the help texts of the command line."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, populate_by_name=True
    )

    unkeyed: ClassVar[frozenset[str]] = frozenset()
    """Fields that cannot change the result (mesh, logging); left out of a stage's key."""
