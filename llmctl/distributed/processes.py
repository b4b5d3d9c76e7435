"""Run several processes as one: rendezvous, broadcasts of process 0's decisions, barriers and ordering.

Without other processes nothing here imports JAX, and every function treats this process as the only one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmctl.config.errors import RequestError
from llmctl.config.terminal import visible
from llmctl.distributed import backend, liveness

T = TypeVar("T")

HEARTBEAT = "LLMCTL_HEARTBEAT"
"""Environment variable: seconds without a reply after which a host is considered dead."""
SECONDS = 60
"""Default of `HEARTBEAT`."""
FOREVER = 7 * 24 * 3600 * 1000
"""Timeout in milliseconds for a process that is busy. `llmctl.distributed.liveness` detects one that dies."""


@dataclass(frozen=True)
class Place:
    """Index of this process and the number of processes."""

    index: int = 0
    count: int = 1


_place = Place()
_decisions = 0


def index() -> int:
    """Return the index of this process, from 0."""
    return _place.index


def count() -> int:
    """Return the number of processes."""
    return _place.count


def first() -> bool:
    """Return whether this is process 0, which prints and writes files for all."""
    return _place.index == 0


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Connect to the other processes of this run, before any JAX backend starts.

    Without arguments, processes that were started together by Slurm or on a TPU pod find each other. A single process
    does nothing.

    Args:
      coordinator: address of process 0 as HOST:PORT.
      num_processes: number of processes; 1 disables the search for other processes.
      process_id: index of this process.

    Raises:
      RequestError: only some of the three are given, they contradict each other, or a process cannot be reached.
    """
    global _place
    if _place.count > 1:
        return
    if not coordinator and num_processes != 1 and process_id < 0 and not num_processes:
        told = found()
    else:
        told = _arguments(coordinator, num_processes, process_id)
    if not told:
        return
    import jax
    from jax._src import distributed

    seconds = _heartbeat()
    liveness.silence()
    if "cpu" in (os.environ.get("JAX_PLATFORMS") or "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `llmctl.train.preemption` handles SIGTERM
    # By default JAX aborts all processes with a stack trace when one dies. As "recoverable" they are left to
    # `liveness`.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(**told, heartbeat_timeout_seconds=2 * seconds)
    except Exception as e:
        where = told.get("coordinator_address", "the coordinator")
        raise RequestError(
            f"--coordinator: the processes did not all come together at {where} ({' '.join(str(e).split())[:120]})"
        ) from None
    state = distributed.global_state
    _place = Place(state.process_id, state.num_processes)
    host = str(state.coordinator_address).rsplit(":", 1)[0]
    liveness.bind(_place.index, _place.count, host, seconds, lambda value: tell(lambda: value))


def _heartbeat() -> int:
    text = os.environ.get(HEARTBEAT, str(SECONDS))
    if not text.isdecimal() or int(text) < 3:
        raise RequestError(f"{HEARTBEAT}={text}: must be seconds, 3 at least")
    return int(text)


def _arguments(coordinator: str, num_processes: int, process_id: int) -> dict[str, Any] | None:
    """Convert the flags to arguments of `jax.distributed.initialize`, or None for a single process."""
    if num_processes == 1 and not coordinator and process_id <= 0:
        return None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or num_processes < 1 or process_id < 0:
        raise RequestError(
            "--coordinator HOST:PORT, --num-processes and --process-id belong together: say all three "
            "(HOST is where process 0 runs)"
        )
    if process_id >= num_processes:
        raise RequestError(f"--process-id: {process_id} is not below --num-processes = {num_processes}")
    if num_processes == 1:
        return None
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # each process uses all devices of its host
    }


def found() -> dict[str, Any] | None:
    """Return arguments of `jax.distributed.initialize` from the environment of Slurm or a TPU pod.

    For a single process the result is None.
    """
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        from jax._src.clusters.slurm_cluster import SlurmCluster

        if env.get("SLURM_STEP_NUM_NODES") != env["SLURM_NTASKS"]:
            # With several processes per host, JAX assigns each its own GPU.
            return {"cluster_detection_method": "slurm"}
        address = SlurmCluster.get_coordinator_address(None, env.get("JAX_COORDINATOR_PORT"))
        return _arguments(address, int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]))
    if env.get("JAX_PLATFORMS", "tpu").startswith("cpu"):
        return None
    pods = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in pods or int(env.get("MEGASCALE_NUM_SLICES") or "1") > 1:
        return {"cluster_detection_method": "gketpu" if pods else "gcetpu"}
    if not pods and any(any(Path("/dev").glob(files)) for files in backend.TPU_FILES):
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

        if GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1:
            return {"cluster_detection_method": "gcetpu"}
    return None


def tell(decide: Callable[[], T]) -> T:
    """Broadcast the result of `decide` in process 0 to all processes. All must call it, in the same order.

    If `decide` raises in process 0, the run ends for all processes.

    Args:
      decide: function without arguments, called in process 0 only; its result must be JSON.

    Returns:
      The result, the same in all processes.
    """
    global _decisions
    if _place.count == 1:
        return decide()
    _decisions += 1
    key = f"llmctl/{_decisions}"
    if first():
        said = decide()
        _client().key_value_set(key, json.dumps(said))
        return said
    return json.loads(_client().blocking_key_value_get(key, FOREVER))


def together(name: str) -> None:
    """Wait until every process has reached this barrier."""
    global _decisions
    if _place.count > 1:
        _decisions += 1
        _client().wait_at_barrier(f"llmctl/{_decisions}/{name}", FOREVER)


def gather(value: T) -> list[T]:
    """Return the values of all processes, by process index. All must call it, in the same order.

    Args:
      value: this process's value; must be JSON.
    """
    global _decisions
    if _place.count == 1:
        return [value]
    _decisions += 1
    client, folder = _client(), f"llmctl/{_decisions}/"
    client.key_value_set(f"{folder}{_place.index}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{folder}{i}", FOREVER)) for i in range(_place.count)]


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Run the block in process 0 first, then in the others.

    The other processes can then read the files that process 0 wrote.
    """
    if not first():
        together("turn")
    yield
    if first():
        together("turn")


def check_same(value: Any, what: str) -> None:
    """Check that this process has the same value as process 0. The value must be JSON.

    Raises:
      RequestError: the values differ.
    """
    if _place.count == 1:
        return
    text = json.dumps(value, sort_keys=True)
    if tell(lambda: hashlib.sha256(text.encode()).hexdigest()) != hashlib.sha256(text.encode()).hexdigest():
        raise RequestError(f"process {index()} was given something else as {what} than process 0; start all alike")


def check_shared(folder: Path) -> None:
    """Check that this process can read what process 0 writes into `folder`.

    Raises:
      RequestError: the file of process 0 is absent or differs.
    """
    if _place.count == 1:
        return
    mark = folder / "shared"
    said = tell(lambda: _write(mark, os.urandom(8).hex()))
    try:
        seen = mark.read_text()
    except OSError:
        seen = ""
    if seen != said:
        raise RequestError(f"{folder}: process {index()} does not see what process 0 writes there; use a shared folder")
    together("seen")


def _write(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return text


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def leave(code: int, line: str) -> int:
    """End a command in every process and return its exit code.

    With several processes, all end together if all succeed. If a process fails, it ends the others and this function
    does not return.

    Args:
      code: exit code.
      line: message that process 0 prints to standard error.
    """
    if first() and line:
        sys.stderr.write(f"llmctl: {visible(line)}\n")
    if _place.count > 1:
        liveness.leave(code, line)
        import jax

        jax.distributed.shutdown()
    return code
