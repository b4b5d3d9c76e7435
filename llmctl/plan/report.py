"""What a plan says: one JSON object a program, and the tables made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

CLASSES = ("parameters", "optimizer", "temporaries", "batch", "cache")
LABELS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "temporaries": "gradients, activations, temporaries",
    "batch": "batch",
    "cache": "cache, statistics",
}
GIB = 2**30


def memory_table(found: dict[str, Any]) -> Table:
    """Memory of one device by class, against its capacity."""
    from rich.table import Table

    table = Table(title=heading(found), title_justify="left")
    table.add_column("HBM a device")
    table.add_column("GiB", justify="right")
    hbm = found["hbm_bytes"]
    for name in CLASSES:
        if hbm[name]:
            table.add_row(LABELS[name], f"{hbm[name] / GIB:.3f}")
    table.add_section()
    table.add_row("total", f"{hbm['total'] / GIB:.3f}")
    if hbm["capacity"]:
        table.add_row("capacity", f"{hbm['capacity'] / GIB:.3f}")
        left = hbm["capacity"] - hbm["total"]
        table.add_row(
            "[green]fits, free[/green]" if found["fits"] else "[red]does not fit, lacks[/red]", f"{abs(left) / GIB:.3f}"
        )
    return table


def heading(found: dict[str, Any]) -> str:
    """Stage, program, topology and mesh in one line."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1) or "one device"
    return f"{found['stage']}: {found['program']} on {found['topology']} ({found['chips']} chips, {mesh})"


def work_table(found: dict[str, Any]) -> Table:
    """Operations, traffic, collectives and time of one step."""
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
    if found["tokens_per_step"]:  # a weight's turn in compression reads none
        rows = [
            ("tokens a step", f"{found['tokens_per_step']:,}", f"{found['rows_per_step']} x {found['seq_len']}"),
            ("FLOPs a step", f"{found['flops_per_step']:.4g}", "of the model, all devices"),
        ]
    if found["device_flops"]:
        rows.append(("FLOPs a device", f"{found['device_flops']:.4g}", f"{counted}; {_types(found)}"))
    if found["bytes_moved"]:
        rows.append(("HBM traffic a device", f"{found['bytes_moved'] / GIB:.2f} GiB", counted))
    for c in found["collectives"]:
        apart = f", {c['overlapped']:g} overlapped" if c["overlapped"] else ""
        rows.append((f"{c['kind']} over {c['axis']}", f"{c['bytes'] / GIB:.3f} GiB", f"{c['count']:g} times{apart}"))
    rows += [(f"kernel {name}", f"{n:g} times", "") for name, n in found["kernels"].items()]
    if found["step_seconds"]:
        rows.append(("step time", f"{found['step_seconds']:.4g} s", f"roofline, a bound: {found['bound']} binds"))
    if found["step_seconds"] and found["tokens_per_step"]:
        rows += [
            ("MFU", f"{found['mfu']:.1%}", "at that bound"),
            ("tokens/s", f"{found['tokens_per_second']:,.0f}", "at that bound"),
        ]
    if (said := found["compiler"].get("optimal_seconds")) and said > 0:
        rows.append(("compiler's own time", f"{said:.4g} s", "loop bodies counted once; not to be relied on"))
    if found["chip_hours"] is not None:
        rows.append(("chip-hours", f"{found['chip_hours']:,.4g}", f"for {found['token_budget']:,} tokens"))
    if found["compile_seconds"]:
        rows.append(("compiled in", f"{found['compile_seconds']:.0f} s", ""))
    return rows


def _types(found: dict[str, Any]) -> str:
    return ", ".join(f"{dtype} {flops:.3g}" for dtype, flops in found["device_flops_by_type"].items())


def facts(found: dict[str, Any]) -> str:
    """What of it was compiled and what was reckoned."""
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
    """One object of a plan: the program that takes most memory, and all of them."""
    return max(found, key=lambda one: one["hbm_bytes"]["total"]) | {"programs": found}
