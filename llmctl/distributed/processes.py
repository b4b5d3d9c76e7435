"""Several processes as one run: how they find each other, what process 0 decides for all, and in which order they work.

Without a word about other processes nothing here imports JAX, and everything means "the only process".
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
from llmctl.distributed import backend, liveness

T = TypeVar("T")

HEARTBEAT = "LLMCTL_HEARTBEAT"
"""Environment variable: seconds after which a host that says nothing is given up."""
SECONDS = 60
"""Its default."""
FOREVER = 7 * 24 * 3600 * 1000
"""Milliseconds to wait for a process that works: one that dies is noticed elsewhere (`llmctl.distributed.liveness`)."""


@dataclass(frozen=True)
class Place:
    """This process among all."""

    index: int = 0
    count: int = 1


_place = Place()
_decisions = 0


def index() -> int:
    """The number of this process, from 0."""
    return _place.index


def count() -> int:
    """How many processes there are."""
    return _place.count


def first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return _place.index == 0


def join(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes of this run, before any JAX backend starts; alone it does nothing.

    Args:
      coordinator: address of process 0 as HOST:PORT.
      num_processes: how many there are; 1 keeps this one alone whatever the machine says.
      process_id: which one this is.
      Without them, processes that Slurm or a TPU pod has started together find each other.

    Raises:
      RequestError: the three are given in part or contradict each other, or the others cannot be reached.
    """
    global _place
    if _place.count > 1:
        return
    if not coordinator and num_processes != 1 and process_id < 0 and not num_processes:
        told = found()
    else:
        told = _told(coordinator, num_processes, process_id)
    if not told:
        return
    import jax
    from jax._src import distributed

    seconds = _heartbeat()
    liveness.silence()
    if "cpu" in (os.environ.get("JAX_PLATFORMS") or "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: `llmctl.train.preemption`
    # JAX aborts the others with a stack trace where one dies; told that it may be recovered it leaves that to us.
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


def _told(coordinator: str, num_processes: int, process_id: int) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` takes, from the flags."""
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
        "cluster_detection_method": "deactivate",  # all devices of the host are this process's
    }


def found() -> dict[str, Any] | None:
    """What Slurm or a TPU pod says about the processes that it started; None for one alone."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        from jax._src.clusters.slurm_cluster import SlurmCluster

        if env.get("SLURM_STEP_NUM_NODES") != env["SLURM_NTASKS"]:
            return {"cluster_detection_method": "slurm"}  # several a host: JAX gives each its own GPU
        address = SlurmCluster.get_coordinator_address(None, env.get("JAX_COORDINATOR_PORT"))
        return _told(address, int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]))
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
    """What `decide` says in process 0, in all processes; it must be JSON. All call it, in the same order.

    A process 0 that raises instead ends the run for all.
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
    """Returns once every process is here."""
    global _decisions
    if _place.count > 1:
        _decisions += 1
        _client().wait_at_barrier(f"llmctl/{_decisions}/{name}", FOREVER)


def gather(value: T) -> list[T]:
    """What every process says (JSON), by process; all call it, in the same order."""
    global _decisions
    if _place.count == 1:
        return [value]
    _decisions += 1
    client, folder = _client(), f"llmctl/{_decisions}/"
    client.key_value_set(f"{folder}{_place.index}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{folder}{i}", FOREVER)) for i in range(_place.count)]


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """The block runs in process 0 first, then in the others, which find on the disk what it left there."""
    if not first():
        together("turn")
    yield
    if first():
        together("turn")


def check_same(value: Any, what: str) -> None:
    """Raises RequestError where this process holds another value (JSON) than process 0."""
    if _place.count == 1:
        return
    text = json.dumps(value, sort_keys=True)
    if tell(lambda: hashlib.sha256(text.encode()).hexdigest()) != hashlib.sha256(text.encode()).hexdigest():
        raise RequestError(f"process {index()} was given something else as {what} than process 0; start all alike")


def check_shared(folder: Path) -> None:
    """Raises RequestError where this process does not see what process 0 writes into `folder`."""
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
    """The end of a command in every process: `line` is for people, `code` the exit code, which is returned.

    With other processes, all end well together; a process that ends otherwise takes the others along, and does not
    return.
    """
    if first() and line:
        sys.stderr.write(f"llmctl: {line}\n")
    if _place.count > 1:
        liveness.leave(code, line)
        import jax

        jax.distributed.shutdown()
    return code
