"""What weightwatcher says of adapters, run by the interpreter that has it: JOB RESULT, both JSON files.

Each item of the job has an adapter, the merged model, the base (directories) and the path of a layer.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import weightwatcher


def row(path: str, **given: Any) -> dict[str, float] | None:
    """Give the numbers of the one layer, None if it is not among those that were analyzed."""
    found = weightwatcher.WeightWatcher(log_level=logging.CRITICAL).analyze(**given)
    for _, values in found.iterrows():
        if str(values["longname"]).removesuffix(".lora_BA").endswith(path):
            return {
                "frobenius": float(values["norm"]) ** 0.5,  # its norms are sums and maxima of squared singular values
                "spectral": float(values["spectral_norm"]) ** 0.5,
                "stable_rank": float(values["stable_rank"]),
                "rank": int(values["matrix_rank"]),
            }
    return None


def of_factors(item: dict[str, str]) -> dict[str, Any]:
    """Use its option for adapters; by its default it leaves out what has fewer than 8 singular values."""
    found = row(item["path"], model=item["adapter"], peft=True)
    if found is None:
        found = row(item["path"], model=item["adapter"], peft=True, min_evals=1)
        return {**found, "note": "only with min_evals=1"} if found else {"error": "no row for this layer"}
    return found


def of_models(item: dict[str, str]) -> dict[str, Any]:
    """Use its difference of two models: PEFT's merged one and the base."""
    return row(item["path"], model=item["merged"], base_model=item["base"]) or {"error": "no row for this layer"}


def tried(tool: Callable[[dict[str, str]], dict[str, Any]], item: dict[str, str]) -> dict[str, Any]:
    try:
        return tool(item)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    job, result = map(Path, sys.argv[1:])
    items = json.loads(job.read_text())
    rows = {
        name: {"factors": tried(of_factors, item), "models": tried(of_models, item)} for name, item in items.items()
    }
    result.write_text(json.dumps({"version": weightwatcher.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
