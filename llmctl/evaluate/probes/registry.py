"""Register the probes by name. No probe imports JAX when it is imported.

Another package adds a probe by an entry point:

    [project.entry-points."llmctl"]
    "probe.brevity" = "my_package.brevity:PROBE"
"""

from __future__ import annotations

from llmctl.config.registry import Registry
from llmctl.evaluate.probes.base import Probe

PROBES: Registry[Probe] = Registry(
    "probe",
    {
        "robustness": "llmctl.evaluate.robustness.probe:ROBUSTNESS",
        "attack": "llmctl.evaluate.robustness.probe:ATTACK",
        "crows_pairs": "llmctl.evaluate.bias.probes:CROWS_PAIRS",
        "stereoset": "llmctl.evaluate.bias.probes:STEREOSET",
        "bbq": "llmctl.evaluate.bias.probes:BBQ",
        "identity_swaps": "llmctl.evaluate.bias.probes:IDENTITY_SWAPS",
        "toxicity": "llmctl.evaluate.harm.probes:TOXICITY",
        "memorization": "llmctl.evaluate.harm.probes:MEMORIZATION",
        "contamination": "llmctl.evaluate.harm.probes:CONTAMINATION",
    },
)
"""Probes by name."""
