"""Format the output of a plan: one JSON object per program, and the tables made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

CLASSES = ("parameters", "optimizer", "temporaries", "batch", "cache")
LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "temporaries": "gradients, activations, temporaries",
    "batch": "batch",
    "cache": "keys and values, or statistics",
}
BINDS = {
    "compute": "arithmetic",
    "hbm": "reading and writing memory (HBM)",
    "ici": "links between chips (ICI)",
    "dcn": "the network between slices or nodes (DCN)",
}
"""Description of each resource that can limit the step time in the roofline model, by the resource's name."""


def size(count: float) -> str:
    """Format a number of bytes with a binary unit: 812 B, 3.40 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Format seconds with a unit: s, ms or µs."""
    for unit, least in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= least:
            return f"{seconds / least:,.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def memory_table(found: dict[str, Any]) -> Table:
    """Return a table of the memory of one device by class (parameters, optimizer, …), with the device's capacity."""
    from rich.table import Table

    table = Table("memory (HBM) of a device")
    table.add_column(justify="right")
    hbm = found["hbm_bytes"]
    for name in CLASSES:
        if hbm[name]:
            table.add_row(LABELS[name], size(hbm[name]))
    table.add_section()
    table.add_row("total", size(hbm["total"]))
    if hbm["capacity"]:
        table.add_row("capacity", size(hbm["capacity"]))
        left = hbm["capacity"] - hbm["total"]
        table.add_row(_verdict(found["fits"], "fits, free", "does not fit, lacks"), size(abs(left)))
    return table


def summary(found: list[dict[str, Any]]) -> Table:
    """Return a table of all programs of a plan, one per row."""
    from rich.table import Table

    table = Table("stage", "program", title="all of it", title_justify="left")
    for column in ("memory of a device", "", "run in at least", "runs", "chip-hours at least"):
        table.add_column(column, justify="right")
    for one in found:
        seconds, hours = one["step_seconds"], one["chip_hours"]
        table.add_row(
            one["stage"], one["program"], size(one["hbm_bytes"]["total"]),
            _verdict(one["fits"], "fits", "does not fit"),
            duration(seconds) if seconds else "", _runs(one),
            f"{hours:,.3g}" if hours is not None else "",
        )  # fmt: skip
    return table


def _runs(one: dict[str, Any]) -> str:
    """Return the number of times that a stage runs the program, as text for a table.

    The number is unknown if the stage sets `train.epochs`, because a plan does not count the data's rows.
    """
    return f"{one['steps']:,}" if one["steps"] else "by train.epochs" if one["program"] == "train step" else ""


def _verdict(good: bool, yes: str, no: str) -> Text:
    from rich.text import Text

    return Text(yes, "green") if good else Text(no, "red")


def heading(found: dict[str, Any]) -> str:
    """Format stage, program, topology and mesh in one line."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1) or "one device"
    return f"{found['stage']}: {found['program']} on {found['topology']} ({found['chips']} chips, {mesh})"


def work_table(found: dict[str, Any]) -> Table:
    """Return a table of the operations, traffic, collectives and time of one step."""
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in _rows(found):
        table.add_row(*row)
    return table


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    counted = "compiled, loops counted" if found["compiled"] else "model"
    rows: list[tuple[str, str, str]] = []
    if found["tokens_per_step"]:  # compression programs read no tokens for a single weight
        rows = [
            ("tokens a step", f"{found['tokens_per_step']:,}", f"{found['rows_per_step']} x {found['seq_len']}"),
            ("FLOPs a step", f"{found['flops_per_step']:.4g}", "of the model, all devices"),
        ]
    if found["device_flops"]:
        rows.append(("FLOPs a device", f"{found['device_flops']:.4g}", f"{counted}; {_types(found)}"))
    if found["bytes_moved"]:
        rows.append(("HBM traffic a device", size(found["bytes_moved"]), counted))
    for c in found["collectives"]:
        apart = f", {c['overlapped']:g} overlapped" if c["overlapped"] else ""
        rows.append((f"{c['kind']} over {c['axis']}", size(c["bytes"]), f"{_times(c['count'])}{apart}"))
    rows += [(f"kernel {name}", _times(n), "") for name, n in found["kernels"].items()]
    rows += [
        (f"loop {name}", "once", "runs more often, nobody knows how: too little") for name in found["unknown_loops"]
    ]
    if found["step_seconds"]:
        bound = f"at least (roofline), bound by {BINDS.get(found['bound'], found['bound'])}"
        rows.append(("step time", duration(found["step_seconds"]), bound))
    if found["step_seconds"] and found["tokens_per_step"]:
        rows += [
            ("MFU", f"{found['mfu']:.1%}", "at most"),
            ("tokens/s", f"{found['tokens_per_second']:,.0f}", "at most"),
        ]
    if (estimated := found["compiler"].get("optimal_seconds")) and estimated > 0:
        rows.append(("compiler's own time", duration(estimated), "loop bodies counted once; not to be relied on"))
    if found.get("artifact_bytes"):
        rows.append(("artifact", size(found["artifact_bytes"]), "its arrays on disk, before compression"))
    if found.get("cache_bytes"):
        rows.append(("cache of outputs", size(found["cache_bytes"]), "at most, on disk, before compression"))
    if found["chip_hours"] is not None:
        rows.append(("chip-hours", f"{found['chip_hours']:,.3g}", f"at least, for {found['token_budget']:,} tokens"))
    if found["compile_seconds"]:
        rows.append(("compiled in", f"{found['compile_seconds']:.0f} s", ""))
    return rows


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:g} times"


def _types(found: dict[str, Any]) -> str:
    parts = [f"{dtype} {flops:.3g}" for dtype, flops in found["device_flops_by_type"].items()]
    kernels = found["device_flops"] - sum(found["device_flops_by_type"].values())
    return ", ".join([*parts, *([f"kernels {kernels:.3g}"] if found["kernels"] else [])])


def facts(found: dict[str, Any]) -> str:
    """Return one line that tells which figures come from the compiler and which from the analytic or roofline model."""
    if not found["compiled"] and not found.get("checked"):
        return "compiled fact: the compiler refused it for want of memory, and says how much it needs"
    if not found["compiled"]:
        return "model: memory and work are estimates from config and mesh" + (
            f"; {found['checked']}" if found.get("checked") else ""
        )
    return (
        "compiled fact: memory, FLOPs, HBM traffic, collectives, kernels; "
        "model: step time, MFU, tokens/s and chip-hours, from the roofline"
    )


def whole(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON object of a plan.

    The object has the fields of the program that needs the most memory, and the list "programs" of all programs.
    """
    return max(found, key=lambda one: one["hbm_bytes"]["total"], default={}) | {"programs": found}
