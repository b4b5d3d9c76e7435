"""What must be settled before JAX is imported, so that it compiles for chips that are not there."""

from __future__ import annotations

import importlib.util
import os
import sys

from llmctl.config.errors import RequestError
from llmctl.distributed.backend import NO_TPU
from llmctl.plan.topologies import Topology

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # also where there is a TPU: it may be at work, and is not the one that is asked about
    "TPU_SKIP_MDS_QUERY": "1",  # no machine of a cloud, whose metadata would be asked
    **NO_TPU,
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""What JAX and libtpu must find before they are imported."""


def prepare(topology: Topology) -> None:
    """Sets the environment that JAX must find when it is imported, with as many CPU devices as are asked for.

    Raises RequestError where the compiler for the topology is not installed.
    """
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise RequestError(
            f"plan: compiling for {topology.name} needs libtpu: pip install 'llmctl[plan]'; no TPU is needed"
        )
    if "jax" in sys.modules:
        return
    os.environ |= ENVIRONMENT
    if topology.platform != "tpu":  # also in place of GPUs, whose programs are lowered alone
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip()
