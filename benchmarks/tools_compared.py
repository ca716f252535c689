"""Who gives the right number for an adapter: lorakit, PEFT's own tools and weightwatcher on adapters that PEFT saved.

    python benchmarks/tools_compared.py [--weightwatcher PYTHON] [--only CASE ...]

PYTHON is an interpreter with weightwatcher beside torch and safetensors (`python -m venv W; W/bin/pip install weightwatcher==0.7.7`);
it is no dependency of lorakit. Two small random models, 14 adapters, about a minute.
Every tool reads the same directory. Its number for one layer is compared with the change of the weight from its definition
(`_tools_adapters.py`): right is a relative error below 1e-5, else the factor by which it is wrong is shown.
"""

import argparse
import json
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, environment, measured_with, table, write_results
from _tools_adapters import CASES, HIDDEN, Made, as_applied, make, open_base, write_bases
from torch import Tensor

RIGHT = 1e-5
ABSENT = "not installed"
SHOWN = {
    "apart": "ΔW itself: the distance from the truth over its norm, of tools that give a matrix",
    "frobenius": "||ΔW||, the Frobenius norm",
    "stable_rank": "The stable rank of ΔW",
    "rank": "The numerical rank of ΔW",
    "intruders": "Intruder dimensions among the first 10 left singular vectors of W + ΔW, cosine below 0.5",
}
"""The tables of the page; the JSON file has the largest singular value as well."""
TOP, COSINE = 10, 0.5
"""PEFT's defaults, which are the paper's."""
READING = """`lorakit inspect` was given the base (`--base`); without it the norms of DoRA are those of s·B·A, and it says so.
An unconverted PiSSA adapter stands on a base that is in no file. PEFT repeats the start when it loads one, which is right where
dtype and SVD are the same again; lorakit refuses it. Random weights have a flat spectrum, on which a randomized SVD is at its
worst. weightwatcher with `peft=True` multiplies B and A without the scale; for `merged - base` PEFT has merged, and what float32
rounds in that difference counts as rank there. PEFT's `reduce_intruder_dimension` takes W as it is stored, of Conv1D transposed,
and DoRA without its magnitudes; its `find_kappa_target_modules` is not here: it reads the base alone.
"""


def of_matrix(change: Tensor, made: Made | None = None) -> dict[str, float]:
    """Give the numbers of a dense change, the rank by the precision that it came in; with `made` also how far it is from the truth."""
    S = torch.linalg.svdvals(change.double())
    far = {"apart": float((change - made.change).norm() / made.change.norm())} if made else {}
    return {**far, **of_spectrum(S, max(change.shape) * torch.finfo(change.dtype).eps)}


def of_spectrum(S: Tensor, noise: float) -> dict[str, float]:
    """Give the numbers of singular values, of which those below `noise` of the first are none."""
    size, largest = float(S.norm()), float(S[0])
    rank = int((noise * S[0] < S).sum())
    return {"frobenius": size, "spectral": largest, "stable_rank": (size / largest) ** 2, "rank": rank}


def intruders(weight: Tensor, change: Tensor) -> int:
    """Count them by their definition (Shuttleworth et al. 2410.21228), on the matrix (out, in) as the layer applies it."""
    before, _, _ = torch.linalg.svd(weight, full_matrices=False)
    after, _, _ = torch.linalg.svd(weight + change, full_matrices=False)
    return int(((before.T @ after[:, :TOP]).abs().amax(0) < COSINE).sum())


# --- the tools, each on the directory of an adapter ----------------------------------------------------------------------


def with_load_adapter(made: Made) -> dict[str, float]:
    from lorakit.analysis.base_weights import BaseWeights
    from lorakit.analysis.loaded import load_adapter

    base = BaseWeights(made.base)
    (module,) = (m for m in load_adapter(made.adapter, base.layer) if m.path == made.path)
    weight = base.matrix(module)
    spectrum = of_spectrum(module.factored(weight).S, max(module.shape) * torch.finfo(torch.float64).eps)
    return {**of_matrix(module.delta(weight), made), **spectrum}


def with_inspect(made: Made) -> dict[str, float]:
    from lorakit.analysis.base_weights import BaseWeights
    from lorakit.analysis.inspection import inspect_adapter
    from lorakit.interop.adapter_directory import CONFIG, WEIGHTS
    from lorakit.interop.read import read_header

    header, config = read_header(made.adapter / WEIGHTS), json.loads((made.adapter / CONFIG).read_text())
    found = inspect_adapter(made.adapter, header, config, BaseWeights(made.base), intruders=True)
    if not found.modules:
        raise ValueError(found.not_measured["everything"])
    (numbers,) = (m.numbers for m in found.modules if m.module.path == made.path)
    names = {"frobenius": "frobenius", "spectral": "spectral", "stable_rank": "stable_rank", "rank": "numerical_rank"}
    counted = numbers["intruders_attributable"].value + numbers["intruders_smeared"].value
    return {**{name: numbers[ours].value for name, ours in names.items()}, "intruders": counted}


def opened(made: Made) -> Any:
    """Load the adapter with PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(open_base(made.base), str(made.adapter)).eval()


def with_delta_weight(made: Made) -> dict[str, float]:
    layer = opened(made).get_base_model().get_submodule(made.path)
    return of_matrix(as_applied(layer.get_base_layer(), layer.get_delta_weight("default").detach()), made)


def with_merge(made: Made) -> dict[str, float]:
    """Merge and take the base away; the merged model stays for weightwatcher."""
    merged = opened(made).merge_and_unload()
    merged.save_pretrained(made.adapter.parent / "merged")
    layer = merged.get_submodule(made.path)
    return of_matrix(as_applied(layer, layer.weight.detach()) - made.weight.float(), made)


def with_convert_to_lora(made: Made) -> dict[str, float]:
    from peft import convert_to_lora

    config, tensors = convert_to_lora(opened(made), rank=HIDDEN, progressbar=False)
    (A,) = (value for key, value in tensors.items() if key.endswith(f"{made.path}.lora_A.weight"))
    (B,) = (value for key, value in tensors.items() if key.endswith(f"{made.path}.lora_B.weight"))
    return of_matrix(config.lora_alpha / config.r * B @ A, made)


def with_reduce_intruders(made: Made) -> dict[str, float]:
    """Count what it says that it has found."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    lines: list[str] = []
    reduce_intruder_dimension(opened(made), top_k=TOP, threshold_epsilon=COSINE, logging_sink=lines.append)
    (line,) = (line for line in lines if line.split(":")[0].endswith(made.path))
    return {"intruders": 0 if "No intruders" in line else int(line.rpartition(":")[2])}


TOOLS: dict[str, Callable[[Made], dict[str, float]]] = {
    "lorakit load_adapter": with_load_adapter,
    "lorakit inspect": with_inspect,
    "PEFT get_delta_weight": with_delta_weight,
    "PEFT merged - base": with_merge,
    "PEFT convert_to_lora": with_convert_to_lora,
    "PEFT reduce_intruder_dimension": with_reduce_intruders,
}
WATCHER = {"factors": "weightwatcher peft=True", "models": "weightwatcher merged - base"}


def measure(names: Sequence[str], work: Path, python: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """Give a row of every adapter, {"case", "title", "truth", "tools": tool -> its numbers or "error"}, and weightwatcher's version."""
    bases = write_bases(work)
    rows, job = [], {}
    for name in names:
        case = CASES[name]
        made = make(case, bases[case.family], work / name)
        truth = {"apart": 0.0, **of_matrix(made.change), "intruders": intruders(made.weight, made.change)}
        tools = {tool: tried(run, made, work) for tool, run in TOOLS.items()}
        rows.append({"case": name, "title": case.title, "truth": truth, "tools": tools})
        merged = made.adapter.parent / "merged"
        job[name] = {"adapter": str(made.adapter), "merged": str(merged), "base": str(made.base), "path": made.path}
    watched = watch(job, work, python) if python else {"version": ABSENT, "rows": {}}
    for row in rows:
        theirs = watched["rows"].get(row["case"], {})
        row["tools"] |= {title: theirs.get(way, {"error": ABSENT}) for way, title in WATCHER.items()}
    return rows, watched["version"]


def tried(run: Callable[[Made], dict[str, float]], made: Made, work: Path) -> dict[str, Any]:
    """Give a tool's numbers, or what it says instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(1)  # not the seed that the adapter was made with: a tool may draw a start again
            return run(made)
    except Exception as error:
        parts = [part for part in (vars(error).get(name) for name in ("what", "why", "fix")) if part]
        said = "; ".join(parts) or " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {said}".replace(str(work), "DIR")}


def watch(job: Mapping[str, Mapping[str, str]], work: Path, python: str) -> dict[str, Any]:
    """Ask weightwatcher, in a process of the interpreter that has it. Raises SystemExit if it does not run."""
    ask, answer = work / "job.json", work / "weightwatcher.json"
    ask.write_text(json.dumps(job))
    command = [python, str(Path(__file__).with_name("_tools_weightwatcher.py").resolve()), str(ask), str(answer)]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"weightwatcher did not run in {python}:\n{done.stdout[-2000:]}")
    return json.loads(answer.read_text())


# --- the page -----------------------------------------------------------------------------------------------------------


def judged(number: str, found: float, truth: float) -> str:
    """Say whether a number is right, and if not how wrong."""
    if number in ("rank", "intruders"):
        return "right" if found == truth else f"{found:g}"
    if number == "apart":
        return "right" if found < RIGHT else f"{found:.2g} off"
    return "right" if abs(found - truth) <= RIGHT * abs(truth) else f"x {found / truth:.6g}"


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write a table for each number, and what the tools said that gave none."""
    said: dict[str, int] = {}
    parts = []
    for number, title in SHOWN.items():
        columns = [tool for tool in rows[0]["tools"] if any(gives(row["tools"][tool], number) for row in rows)]
        lines = []
        for row in rows:
            cells = [cell(row["tools"][tool], number, row["truth"][number], said) for tool in columns]
            truth = () if number == "apart" else (f"{row['truth'][number]:.5g}",)
            lines.append((row["title"], *truth, *cells))
        head = ("adapter", *(() if number == "apart" else ("truth",)), *columns)
        parts.append(f"## {title}\n\n" + table(head, lines))
    notes = "".join(f"{number}. {text}\n" for text, number in said.items())
    return "\n".join([*parts, f"## What was said instead, and how\n\n{notes}" if notes else ""])


def gives(found: Mapping[str, Any], number: str) -> bool:
    """Whether a tool gave this number, or is simply not here."""
    return number in found or (found.get("error") == ABSENT and number not in ("apart", "intruders"))


def cell(found: Mapping[str, Any], number: str, truth: float, said: dict[str, int]) -> str:
    if found.get("error") == ABSENT:
        return ABSENT
    text = found.get("error") or found.get("note")
    mark = f" [{said.setdefault(text, len(said) + 1)}]" if text else ""
    return (judged(number, found[number], truth) if number in found else "none") + mark


def main() -> None:
    """Measure, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="an interpreter that has weightwatcher")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory for the results")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
    where = environment()
    with tempfile.TemporaryDirectory() as work:
        rows, version = measure(given.only, Path(work), given.weightwatcher)
    where["versions"]["weightwatcher"] = version
    explained = (
        f"Truth: ΔW of one layer from its definition in float64. Right: relative error below {RIGHT:g} (ranks and counts: equal); "
        "else what was given over the truth, or the count that was given; none: no number, for the reason below.\n"
    )
    title = "# Who gives the right number for an adapter\n\nMade by `python benchmarks/tools_compared.py --weightwatcher PYTHON`.\n"
    parts = [title, measured_with(where), explained, READING, tables(rows)]
    content = {"environment": where, "right": RIGHT, "rows": rows}
    write_results("tools-compared", given.output, content, "\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    main()
