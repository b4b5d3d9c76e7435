"""Coordinate the processes of a command: connect them, broadcast values of process 0, gather values, and synchronize.

If the command runs in only one process, this module does not import JAX, and all functions return at once.
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
"""Environment variable for the number of seconds without a reply after which a host is considered dead."""
SECONDS = 60
"""Default number of seconds without a reply after which a host is considered dead."""
FOREVER = 7 * 24 * 3600 * 1000
"""Timeout for waits on other processes in milliseconds: one week. `llmctl.distributed.liveness` detects dead processes
earlier."""


@dataclass(frozen=True)
class ProcessInfo:
    """Store the index of this process and the number of processes."""

    index: int = 0
    count: int = 1


_this = ProcessInfo()
_exchanges = 0


def index() -> int:
    """Return the index of this process, from 0."""
    return _this.index


def count() -> int:
    """Return the number of processes."""
    return _this.count


def first() -> bool:
    """Return True if this is process 0, which prints messages and writes files for all processes."""
    return _this.index == 0


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Connect to the other processes of this command. Call this before any JAX backend starts.

    Without arguments, the processes are detected if Slurm started them, or if they run on a TPU pod. If there is only
    one process, this function does nothing.

    Args:
        coordinator: Address of process 0 as HOST:PORT.
        num_processes: Number of processes; 1 disables the detection of other processes.
        process_id: Index of this process.

    Raises:
        RequestError: If only some arguments are given. If arguments contradict each other. If a process is unreachable.
    """
    global _this
    if _this.count > 1:
        return
    if not coordinator and num_processes != 1 and process_id < 0 and not num_processes:
        arguments = cluster_arguments()
    else:
        arguments = _arguments(coordinator, num_processes, process_id)
    if not arguments:
        return
    import jax
    from jax._src import distributed

    seconds = _heartbeat()
    liveness.silence()
    if "cpu" in (os.environ.get("JAX_PLATFORMS") or "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # `llmctl.train.preemption` handles SIGTERM
    # By default, JAX aborts all processes with a stack trace when one dies. With "recoverability", JAX does not, and
    # `liveness` ends them.
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=2 * seconds)
    except Exception as e:
        where = arguments.get("coordinator_address", "the coordinator")
        raise RequestError(
            f"--coordinator: the processes did not all come together at {where} ({' '.join(str(e).split())[:120]})"
        ) from None
    state = distributed.global_state
    _this = ProcessInfo(state.process_id, state.num_processes)
    host = str(state.coordinator_address).rsplit(":", 1)[0]
    liveness.connect(_this.index, _this.count, host, seconds, lambda value: broadcast(lambda: value))


def _heartbeat() -> int:
    text = os.environ.get(HEARTBEAT, str(SECONDS))
    if not text.isdecimal() or int(text) < 3:
        raise RequestError(f"{HEARTBEAT}={text}: must be seconds, 3 at least")
    return int(text)


def _arguments(coordinator: str, num_processes: int, process_id: int) -> dict[str, Any] | None:
    """Convert flags to arguments of `jax.distributed.initialize`. If there is only one process, return None.

    Raises:
        RequestError: If the flags are incomplete or contradict each other.
    """
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


def cluster_arguments() -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize` for processes of Slurm or of a TPU pod.

    The arguments are derived from environment variables and device files. If there is only one process, return None.
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


def broadcast(compute: Callable[[], T]) -> T:
    """Call `compute` in process 0, and return its result in all processes.

    All processes must call this function, in the same order. If `compute` raises an error, all processes end.

    Args:
        compute: Function without arguments. Its result must be JSON data.

    Returns:
        The result, equal in all processes.
    """
    global _exchanges
    if _this.count == 1:
        return compute()
    _exchanges += 1
    key = f"llmctl/{_exchanges}"
    if first():
        result = compute()
        _client().key_value_set(key, json.dumps(result))
        return result
    return json.loads(_client().blocking_key_value_get(key, FOREVER))


def barrier(name: str) -> None:
    """Wait until every process has called this function with the same `name`."""
    global _exchanges
    if _this.count > 1:
        _exchanges += 1
        _client().wait_at_barrier(f"llmctl/{_exchanges}/{name}", FOREVER)


def gather(value: T) -> list[T]:
    """Return the values of all processes, ordered by process index. All processes must call this function, in the same
    order.

    Args:
        value: Value of this process, as JSON data.
    """
    global _exchanges
    if _this.count == 1:
        return [value]
    _exchanges += 1
    client, folder = _client(), f"llmctl/{_exchanges}/"
    client.key_value_set(f"{folder}{_this.index}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{folder}{i}", FOREVER)) for i in range(_this.count)]


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """Run the body of a `with` statement in process 0, and then in all other processes at the same time.

    The other processes can then read files that process 0 wrote in the body.
    """
    if not first():
        barrier("turn")
    yield
    if first():
        barrier("turn")


def check_same(value: Any, what: str) -> None:
    """Check that all processes have the same `value`, which must be JSON data.

    Args:
        value: Value of this process.
        what: Name of the value, for the error message.

    Raises:
        RequestError: If the value differs from the value of process 0.
    """
    if _this.count == 1:
        return
    text = json.dumps(value, sort_keys=True)
    if broadcast(lambda: hashlib.sha256(text.encode()).hexdigest()) != hashlib.sha256(text.encode()).hexdigest():
        raise RequestError(f"process {index()} was given something else as {what} than process 0; start all alike")


def check_shared(folder: Path) -> None:
    """Check that all processes see the same `folder`, as on a shared file system.

    Process 0 writes a file into the folder, and the other processes read the file.

    Raises:
        RequestError: If the file is missing or differs.
    """
    if _this.count == 1:
        return
    mark = folder / "shared"
    result = broadcast(lambda: _write(mark, os.urandom(8).hex()))
    try:
        seen = mark.read_text()
    except OSError:
        seen = ""
    if seen != result:
        raise RequestError(f"{folder}: process {index()} does not see what process 0 writes there; use a shared folder")
    barrier("seen")


def _write(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return text


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def exit_together(code: int, line: str) -> int:
    """End a command in every process, and return its exit code.

    If all processes succeed, they end together. If one process fails, the others are ended, and this function does not
    return.

    Args:
        code: Exit code.
        line: Message that process 0 prints to standard error.
    """
    if first() and line:
        sys.stderr.write(f"llmctl: {visible(line)}\n")
    if _this.count > 1:
        liveness.exit_together(code, line)
        import jax

        jax.distributed.shutdown()
    return code
