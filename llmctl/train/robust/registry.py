"""Register adversarial methods by name.

A method imports JAX only inside its functions, so that settings can read this registry without loading JAX.

Another package adds a method by an entry point:

    [project.entry-points."llmctl"]
    "adversary.noise" = "my_package.noise:METHOD"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmctl.config.registry import Registry

if TYPE_CHECKING:
    from llmctl.train.robust.adversary import Adversary

ADVERSARIES: Registry[Adversary] = Registry(
    "adversary",
    {
        "fgm": "llmctl.train.robust.fgm:METHOD",
        "pgd": "llmctl.train.robust.pgd:METHOD",
        "freelb": "llmctl.train.robust.freelb:METHOD",
        "smart": "llmctl.train.robust.smart:METHOD",
    },
)
