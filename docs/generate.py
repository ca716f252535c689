"""Write `docs/methods/`: a page for each method, start, optimizer and controller, and an index.

    python docs/generate.py            # `make docs`

Nothing on these pages is written by hand. The prose is the docstring of the file, the settings are those of its dataclass, sizes
come from building it on the meta device, what it works with from attaching it to small layers (`_probe.py`), and what was
measured from `benchmarks/results/`. `tests/test_method_pages.py` compares the pages with the code.
"""

import argparse
import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import _probe as probe

import lorakit as lk
from lorakit.core.adapter import PeftFormat, Sharing
from lorakit.core.start import needs
from lorakit.interop.peft_config import peft_format
from lorakit.optim import OPTIMIZERS
from lorakit.train.config_schema import describe, key_help
from lorakit.train.controllers import CONTROLLERS, brought

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "methods"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("toy.md", "smollm2.md")
"""Pages that the benchmarks write."""
KINDS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "method": (lk.METHODS, "Methods"),
    "init": (lk.INITS, "Starts"),
    "optimizer": (OPTIMIZERS, "Optimizers"),
    "controller": (CONTROLLERS, "Controllers"),
}
KEYS = {"method": "method.name", "init": "method.init", "optimizer": "optim.name", "controller": "train.controller"}
FOLDERS = {"method": "", "init": "init/", "optimizer": "optim/", "controller": "controllers/"}
SOURCES = {"method": "methods", "init": "init", "optimizer": "optim", "controller": "train/controllers"}
URL = re.compile(r"https?://[^\s;,)]+[^\s;,).]")


class NoAdvice(Exception):
    """A file without the final paragraph that says when to use it."""


def doc(kind: str, name: str) -> tuple[str, str]:
    """Give a file's docstring and its last paragraph, which says when to use it and what that costs."""
    registry: Any = KINDS[kind][0]
    text = (registry.module(name).__doc__ or "").rstrip()
    body, found, advice = text.rpartition("\n\nWhen: ")
    if not found or "\n\n" in advice:
        raise NoAdvice(f"{SOURCES[kind]}/{name}.py: the docstring's last paragraph must be 'When: ...'")
    return body, " ".join(advice.split())


def title(text: str) -> str:
    """Give the first sentence of a docstring, without authors and links."""
    first = " ".join(URL.sub("", text.split("\n\n")[0]).split())
    return re.split(r"\.(?=\s+[A-ZÖÜ]|\s*$)|;|, (?=[A-Z]\w+ (?:et al|and) )", first)[0].strip()


def prose(text: str) -> str:
    """Give a docstring as Markdown: its formulas are indented already, and no < is a tag."""
    lines = [line if line.startswith("    ") else line.replace("<", "&lt;") for line in text.splitlines()]
    return URL.sub(lambda url: f"<{url[0]}>", "\n".join(lines))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Give a Markdown table."""
    lines = [header, ["---"] * len(header), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def settings(cls: type[Any], given: str) -> str:
    """Give the fields of a dataclass: type, default and what its docstring says."""
    hints, said = get_type_hints(cls, include_extras=True), key_help(cls)
    rows = []
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        accepted = "the name of a start" if f.name == "init" else describe(hints[f.name])
        rows.append([f"`{f.name}`", accepted, f"`{json.dumps(default)}`", said.get(f.name, "")])
    return table([given, "type", "default", ""], rows) if rows else f"No settings (`{cls.__name__}` has no fields)."


def listed(refused: Mapping[str, str | None]) -> str:
    """Give what is accepted, then what is refused with the reason; names with the same one together, with the first one's."""
    groups: dict[str, list[str]] = {}
    for name, why in refused.items():
        groups.setdefault((why or "").partition(" (")[0], []).append(name)
    accepted = groups.pop("", [])
    lines = [", ".join(accepted) + "." if accepted else "None here."]
    return "\n".join([*lines, *(f"- Not {', '.join(names)}: {refused[names[0]]}." for names in groups.values())])


@cache
def measured(study: str) -> Mapping[str, Any]:
    """Give a study's figures; none if it was not run."""
    file = RESULTS / f"methods_{study}.json"
    return json.loads(file.read_text()) if file.exists() else {"arms": {}}


def figures(kind: str, name: str) -> str:
    """Give what was measured of a file."""
    return "\n".join([toy(kind, name), *real(kind, name)]) + "\n"


def real(kind: str, name: str) -> Iterator[str]:
    """Yield what the study on a real model measured of a file, in a sentence."""
    up = "../" if FOLDERS[kind] else ""
    arm = measured("smollm2")["arms"].get(f"{kind}/{name}")
    if arm is None:
        return
    link = f"[the quickstart's task]({up}smollm2.md)"
    if "check" not in arm:
        yield f"On {link}: not run, {arm['train'].get('refused', 'it failed')}."
        return
    before, after = arm["check"]["before"], arm["check"]["after"]
    yield (
        f"On {link} with a rate of {arm['arm']['lr']:.0e} the loss goes from {before['loss']:.2f} to {after['loss']:.3f}, and "
        f"{after['right']} of {after['of']} answers are right (before: {before['right']})."
    )


def toy(kind: str, name: str) -> str:
    """Give what the toy study measured of a file, in a sentence or two."""
    up = "../" if FOLDERS[kind] else ""
    link = f"[a problem whose best answer is known]({up}toy.md)"
    own = [a for a in measured("toy")["arms"] if a["kind"] == kind and re.split(r"\W", a["name"])[0] == name]
    lines = []
    for arm in own:
        label = "" if arm["name"] == name else f" ({arm['name'].partition(', ')[2]})"
        if "refused" in arm:
            lines.append(f"On {link}{label}: not run, {arm['refused']}.")
            continue
        best = "no closed form of the best possible is known"
        if arm["optimum"] is not None:
            best = f"the best possible is {arm['optimum'] if arm['optimum'] > 1e-9 else 0:.4g}"
        lines.append(
            f"On {link}{label} it comes to {arm['error']:.4g} ± {arm['sd']:.2g} at a rate of {arm['best_lr']:.2g}; {best}, doing "
            f"nothing is 2.55. It trains {arm['trainable']:,} numbers there, and the optimizer keeps {arm['state_bytes']:,} bytes."
        )
    return "\n".join(lines) or f"Nothing yet: it is not in {link}."


def head(kind: str, name: str) -> list[str]:
    """Give the beginning of a page."""
    body, advice = doc(kind, name)
    up = "../" * (3 if FOLDERS[kind] else 2)
    source = f"src/lorakit/{SOURCES[kind]}/{name}.py"
    papers = ", ".join(f"<{url}>" for url in dict.fromkeys(URL.findall(body)))
    return [
        f"# {name}\n",
        f"`{KEYS[kind]}: {name}` · [{source}]({up}{source})" + (f" · {papers}" if papers else "") + "\n",
        f"**When:** {advice}\n",
        prose(body) + "\n",
    ]


def method_page(name: str) -> str:
    """Write the page of a method."""
    cls = lk.METHODS[name]
    method = cls()
    merge = probe.merge_refusal(method)
    return "\n".join(
        [
            *head("method", name),
            "## Settings\n",
            settings(cls, f"`lk.{cls.__name__}`") + "\n",
            "## Size\n",
            size(name) + "\n",
            "## Works with\n",
            f"Layers: {listed(probe.layer_refusals(method))}\n",
            f"Bases: {listed(probe.base_refusals(method))}\n",
            f"Merging: {'yes' if merge is None else f'no, {merge}'}.\n",
            f"Needs: {needed(method)}.\n",
            f"File: {file_format(name, method)}.\n",
            "## Measured\n",
            figures("method", name),
        ]
    )


@cache
def built(name: str) -> probe.Tensors:
    """Give the tensors of a method with default settings."""
    return probe.tensors(lk.METHODS[name]())


def size(name: str) -> str:
    """Give what is trained on two layers, in closed form if there is one, and AdamW's state for it."""
    found = built(name)
    lines = []
    for what, shapes in (("Trained", found.trained), ("Kept beside, not trained", found.kept)):
        closed = found.closed(shapes)
        if closed:
            products = [" · ".join(d for d in dims if d != "1") or "1" for dims in closed.values()]
            each = ", ".join(f"`{t}` ({', '.join(dims)})" for t, dims in closed.items())
            lines.append(f"{what} on a layer (out, in): {' + '.join(products)}. {each}.\n")
        elif any(shapes):
            each = ", ".join(f"`{t}` {shape}" for t, shape in shapes[0].items())
            lines.append(f"{what}, on a layer of {probe.PROBES[0]}: {each}.\n")
    rows = []
    for i, (out, width) in enumerate(probe.SHAPES):
        count = found.count(i)
        share = count / (out * width)
        kept = sum(math.prod(shape) for shape in found.kept[i].values())
        rows.append([f"{out} × {width}", f"{count:,}", f"{share:.3%}", f"{kept:,}", f"{found.state[i]:,}"])
    header = [
        "layer (out × in), default settings",
        "trained",
        "of the layer",
        "kept, not trained",
        "AdamW's state, bytes",
    ]
    return "\n".join([*lines, table(header, rows)])


def needed(method: lk.Method) -> str:
    """Say what a method cannot do without."""
    found = [f"{what} of each layer" for what in sorted(needs(method))]
    found += [f"the controller [{c}](controllers/{c}.md), which comes by itself in a run" for c in brought(method)]
    if isinstance(method, Sharing):
        found.append("all its layers at once, for they can share tensors")
    return ", ".join(found) or "nothing but the layers"


def file_format(name: str, method: lk.Method) -> str:
    """Say who reads what is saved."""
    form: PeftFormat | None = peft_format(method)
    if form is None:
        return f"`lorakit.json` beside the tensors; PEFT has no such method (`peft_type` is `LORAKIT_{name.upper()}`)"
    fixed = "".join(f", `{key}: {json.dumps(value)}`" for key, value in form.constants.items())
    tail = "; to PEFT it is that method, `lorakit.json` tells the two apart" if form.only_with_side_file else ""
    return f"PEFT's `{form.peft_type}`{fixed}, tensors {', '.join(f'`{t}`' for t in form.tensors.values())}{tail}"


def init_page(name: str) -> str:
    """Write the page of a start."""
    file = vars(lk.INITS.module(name))
    wanted = ", ".join(sorted(file.get("NEEDS", ()))) or "nothing but the layer"
    off = (
        "B A is not zero and is taken off again by a second, frozen term: the start is the base model all the same, and "
        "the adapter is saved as one of rank 2r."
        if file.get("FROM_BASE")
        else "The start is the base model, bit for bit."
    )
    if "residual" in file.get("NEEDS", ()):
        off = (
            "B A is what quantization took from the weight, so the start is nearer to the float model than the base is."
        )
    facts = [f"Needs: {wanted}.\n", off + "\n", f"Methods: {listed(probe.init_refusals(name))}\n"]
    return "\n".join([*head("init", name), "## Works with\n", *facts, "## Measured\n", figures("init", name)])


def optimizer_page(name: str) -> str:
    """Write the page of an optimizer."""
    options = vars(OPTIMIZERS.module(name)).get("Options")
    out, width = probe.SHAPES[1]
    states = {method: probe.optimizer_state(name, method) for method in ("lora", "full")}
    kept = [f"{bytes_:,} bytes with {method}" for method, bytes_ in states.items() if bytes_ is not None]
    return "\n".join(
        [
            *head("optimizer", name),
            "## Settings\n",
            (
                settings(options, "`optim.options`")
                if options
                else "Those of the section `optim`; no options of its own."
            )
            + "\n",
            "## Works with\n",
            f"Methods, with default settings on a layer of 192 × 160: {listed(probe.optimizer_refusals(name))}\n",
            "## Size\n",
            f"State on a layer of {out} × {width} with default settings: {', '.join(kept) or 'not measured on a processor'}.\n",
            "## Measured\n",
            figures("optimizer", name),
        ]
    )


def controller_page(name: str) -> str:
    """Write the page of a controller."""
    own = vars(CONTROLLERS.module(name)).get("METHOD_NAME")
    chosen = (
        f"It comes by itself with the method [{own}](../{own}.md).\n" if own else "It is chosen in the configuration.\n"
    )
    return "\n".join(
        [
            *head("controller", name),
            "## Settings\n",
            settings(CONTROLLERS[name], "`train.controller`") + "\n",
            "## Works with\n",
            chosen,
            f"Methods: {listed(probe.controller_refusals(name))}\n",
            "## Measured\n",
            figures("controller", name),
        ]
    )


def index() -> str:
    """Write the page that lists all."""
    lines = [
        "# Methods, starts, optimizers, controllers\n",
        "One page each. They are made from the code by `docs/generate.py` and compared with it by a test; what they say was asked "
        "of the code, not written down. What all of them come to on one small problem: [toy.md](toy.md).\n",
    ]
    if measured("smollm2")["arms"]:
        lines.append("Whether each of them works on a real model, from training to file: [smollm2.md](smollm2.md).\n")
    for kind, (registry, heading) in KINDS.items():
        header = [f"`{KEYS[kind]}`", ""]
        rows = [[f"[{name}]({FOLDERS[kind]}{name}.md)", title(doc(kind, name)[0])] for name in sorted(registry)]
        if kind == "method":
            header += ["trained on 4096 × 4096", "merged", "file"]
            rows = [[*row, *_facts(name)] for row, name in zip(rows, sorted(registry), strict=True)]
        lines += [f"## {heading}\n", table(header, rows) + "\n"]
    return "\n".join(lines)


def _facts(name: str) -> list[str]:
    method = lk.METHODS[name]()
    form = peft_format(method)
    merged = "yes" if probe.merge_refusal(method) is None else "no"
    return [f"{built(name).count(0):,}", merged, form.peft_type if form else "lorakit"]


def pages() -> Iterator[tuple[Path, str]]:
    """Give (path below `docs/methods`, text) of every page."""
    writers = {"method": method_page, "init": init_page, "optimizer": optimizer_page, "controller": controller_page}
    for kind, (registry, _) in KINDS.items():
        for name in sorted(registry):
            yield Path(f"{FOLDERS[kind]}{name}.md"), writers[kind](name)
    yield Path("README.md"), index()


def main() -> None:
    """Write the pages, and take away those of files that are gone."""
    options = argparse.ArgumentParser(description=textwrap.shorten(__doc__ or "", 80))
    options.add_argument("--output", type=Path, default=PAGES)
    output = options.parse_args().output
    made = {output / path: text for path, text in pages()}
    for page, text in made.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
    for page in set(output.rglob("*.md")) - made.keys() - {output / name for name in MEASURED}:
        page.unlink()


if __name__ == "__main__":
    main()
