"""`lorakit selftest`: every formula of the library against its closed form, on this machine."""

import sys
from typing import TYPE_CHECKING

import typer

from ..core.errors import CheckError, UsageError
from .output import json_result, result, style, table

if TYPE_CHECKING:
    from ..theory.selftest import Result


def selftest(
    device: str = typer.Option("cpu", "--device", help="Where to compute: cpu, cuda, cuda:1, mps."),
    dtype: str = typer.Option("float64", "--dtype", help="float64 or float32; tolerances follow it."),
    only: list[str] = typer.Option([], "--only", help="Ids of checks, such as T6; all when absent."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Check the formulas on this machine.

    Each number that lorakit reports comes from a formula with a test that has a closed form. This runs all of them here:
    on your processor or accelerator, with your torch. Exit code 8 if one fails.
    """
    import torch

    from ..analysis.loader_check import LOADER
    from ..theory.selftest import CHECKS
    from ..theory.selftest import selftest as run
    from .machine import set_threads

    set_threads()
    kinds = {"float64": torch.float64, "float32": torch.float32}
    if dtype not in kinds:
        raise UsageError(f"--dtype {dtype} is not one to check in", fix="float64 or float32")
    _require(device, dtype)
    checks = [*CHECKS, LOADER]
    wanted = {name.upper() for name in only}
    unknown = wanted - {check.id.upper() for check in checks}
    if unknown:
        raise UsageError(f"no check {', '.join(sorted(unknown))}", fix=f"there are: {' '.join(c.id for c in checks)}")
    chosen = [check for check in checks if not wanted or check.id.upper() in wanted]
    results = list(run(chosen, device, kinds[dtype]))
    if json:
        machine = {"device": device, "dtype": dtype, "torch": torch.__version__}
        json_result({**machine, "ok": all(r.ok is not False for r in results), "checks": [r.json() for r in results]})
    else:
        _show(results)
    failed = [r.id for r in results if r.ok is False]
    if failed:
        raise CheckError(
            f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}",
            why="on this machine these formulas do not compute what they say; numbers that name them are not to be trusted",
            fix="report it with the output of `lorakit selftest --json` and `lorakit doctor`",
        )


def _show(results: "list[Result]") -> None:
    rows: list[tuple[object, ...]] = [("check", "", "of what is allowed", "seconds", "what")]
    for found in results:
        verdict = {True: "ok", False: "FAILED", None: "-"}[found.ok]
        share = found.error or (f"{found.worst:.1%}" if found.worst >= 5e-4 else "< 0.1%")
        rows.append((found.id, verdict, share[:60], round(found.seconds, 3), found.what))
    result(table(rows).replace("FAILED", style("FAILED", "red", sys.stdout)))
    counts = {ok: sum(r.ok is ok for r in results) for ok in (True, False, None)}
    skipped = f", {counts[None]} say nothing in this dtype" if counts[None] else ""
    seconds = sum(r.seconds for r in results)
    result(f"\n{counts[True]} of {counts[True] + counts[False]} hold{skipped}; {seconds:.1f} s")


def _require(device: str, dtype: str) -> None:
    """Raise UsageError for a device that is not here, or that has no float64."""
    import torch

    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    kind, _, index = device.partition(":")
    if (
        not there.get(kind)
        or (index and not index.isdigit())
        or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count())
    ):
        raise UsageError(f"no device {device!r} here", fix=f"there are: {', '.join(k for k, v in there.items() if v)}")
    if kind == "mps" and dtype == "float64":
        raise UsageError("MPS has no float64", fix="--dtype float32")
