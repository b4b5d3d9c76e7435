"""Every test runs on 8 fake CPU devices; what XLA compiled once is read from disk the next time."""

import os
from pathlib import Path

# Before anything imports JAX: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # 8 devices on 2 busy cores: a late participant is not a deadlock.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
).strip()
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Subprocesses that tests start must not talk to anyone, nor draw bars.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TERM", "dumb")
