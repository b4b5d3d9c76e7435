"""Set the process environment for ahead-of-time compilation, before JAX is imported."""

from __future__ import annotations

import importlib.util
import os
import sys

from llmctl.config.errors import RequestError
from llmctl.distributed.backend import NO_TPU
from llmctl.plan.topologies import Topology

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # an attached TPU may be busy, and is not the planned one
    "TPU_SKIP_MDS_QUERY": "1",  # skip the metadata query, which needs a cloud machine
    **NO_TPU,
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Environment variables that JAX and libtpu read when they are imported."""


def prepare(topology: Topology) -> None:
    """Set the environment for the import of JAX, with the topology's number of CPU devices.

    Raises:
      RequestError: If the compiler for the topology is not installed.
    """
    if topology.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise RequestError(
            f"plan: compiling for {topology.name} needs libtpu: pip install 'llmctl[plan]'; no TPU is needed"
        )
    if "jax" in sys.modules:
        return
    os.environ |= ENVIRONMENT
    if topology.platform != "tpu":  # CPU devices also stand in for GPUs, whose programs are only lowered
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip()
