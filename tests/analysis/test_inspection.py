"""`lorakit inspect`: what is measured, what is certain, what is said not to be known, and the page."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.heatmap import heatmap
from lorakit.analysis.inspect_page import render, spectra
from lorakit.analysis.inspection import Inspection, inspect_adapter
from lorakit.cli.inspect import describe
from lorakit.core.errors import UsageError
from lorakit.interop.read import read_header
from lorakit.theory import spectrum as sp

BLOCKS, NAMES = 3, ("q_proj", "up_proj")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(48, 40), "up_proj": nn.Linear(48, 64)}) for _ in range(BLOCKS)
        )


def write_base(model: nn.Module, directory: Path) -> None:
    """Write a model's weights as a base is found on disk."""
    directory.mkdir()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA on six layers, one of them untrained, and the base beside it."""
    torch.manual_seed(0)
    model = Toy()
    write_base(model, tmp_path / "base")
    lk.attach(model, lk.LoRA(r=4, alpha=10, rank_stabilized=True), target_modules=list(NAMES))
    for path, _, one in lk.adapters(model):
        if path != "layers.1.q_proj":
            one.lora_B.data = torch.randn_like(one.lora_B) * 0.1 * torch.tensor([4.0, 2.0, 1.0, 0.5])
    return lk.save(model, tmp_path / "run" / "adapter", base="org/toy")


def inspection(directory: Path, base: bool = False, **options: bool) -> Inspection:
    header = read_header(directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    weights = BaseWeights(directory.parent.parent / "base") if base else None
    return inspect_adapter(directory, header, config, weights, **options)


def rewrite(directory: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    file = directory / "adapter_model.safetensors"
    save_file({name: change(name, t).contiguous() for name, t in load_file(file).items()}, file)


def test_every_number_is_that_of_the_dense_change(adapter: Path) -> None:
    found = inspection(adapter, base=True, intruders=True)
    tensors, base = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(adapter.parent.parent / "base" / "model.safetensors"),
    )
    assert [m.module.path for m in found.modules] == [f"layers.{i}.{n}" for i in range(BLOCKS) for n in NAMES]
    for m in found.modules:
        prefix = f"base_model.model.{m.module.path}"
        delta = 5.0 * (tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double())
        W = base[f"{m.module.path}.weight"].double()
        n = {name: number.value for name, number in m.numbers.items()}
        if m.module.path == "layers.1.q_proj":
            assert m.dead and n["frobenius"] == 0 and n["relative_norm"] == 0
            continue
        U, S, vh = torch.linalg.svd(delta)
        U, S, vh = U[:, :4], S[:4], vh[:4]
        assert m.module.scale == 5.0  # 10 / sqrt(4)
        assert torch.allclose(torch.tensor(m.spectrum, dtype=S.dtype), S)
        assert n["frobenius"] == pytest.approx(float(delta.norm()))
        assert n["nuclear"] == pytest.approx(float(S.sum())) and n["spectral"] == pytest.approx(float(S[0]))
        assert n["relative_norm"] == pytest.approx(float(delta.norm() / W.norm()))
        q = sp.energy_rank(S, 0.9)
        inside = torch.linalg.matrix_norm(U[:, :q].T @ W @ vh[:q].T)
        assert n["amplification"] == pytest.approx(float(delta.norm() / inside), rel=1e-5)
        assert n["dominance"] == pytest.approx(float((S / (U.T @ W).norm(dim=1)).max()), rel=1e-5)
        assert n["intruders_attributable"] + n["intruders_smeared"] <= 10
        assert m.numbers["effective_rank"].null == pytest.approx(3.9, abs=0.1)
        assert math.hypot(*m.null_spectrum) == pytest.approx(1.0, rel=0.02)
    assert found.not_measured == {"effect on the loss": "no data is read here"}
    without = inspection(adapter)
    assert set(without.not_measured) > {"relative norm, amplification, dominance", "intruder dimensions"}
    assert without.modules[0].spectrum == pytest.approx(found.modules[0].spectrum)


def kinds(found: Inspection) -> list[str]:
    return [v.kind for v in found.verdicts]


def test_only_what_is_certain_is_a_verdict(adapter: Path) -> None:
    found = inspection(adapter, base=True)
    (verdict,) = found.verdicts
    assert (verdict.kind, verdict.modules) == ("dead module", ("layers.1.q_proj",))

    def component(name: str, t: Tensor) -> Tensor:
        t = t.clone()
        if "layers.0.up_proj" in name:
            (t[2] if "lora_A" in name else t[:, 2]).zero_()
        return t

    rewrite(adapter, component)
    found = inspection(adapter)
    assert kinds(found) == ["dead module", "dead component"]
    assert found.verdicts[1].modules == ("layers.0.up_proj",) and found.modules[1].dead_components == 1

    side = adapter / "lorakit.json"
    content = json.loads(side.read_text())
    side.write_text(json.dumps({**content, "method": {**content["method"], "alpha": 99.0}}))
    assert "scale" in kinds(inspection(adapter))


def test_storage_precision_is_a_verdict_where_it_eats_singular_values(adapter: Path) -> None:
    rewrite(adapter, lambda name, t: t.to(torch.bfloat16))
    assert "storage precision" not in kinds(inspection(adapter))
    small = torch.tensor([1.0, 1.0, 1.0, 1e-4], dtype=torch.bfloat16)
    rewrite(adapter, lambda name, t: t * small if "lora_B" in name else t)
    found = inspection(adapter)
    (verdict,) = [v for v in found.verdicts if v.kind == "storage precision"]
    assert len(verdict.modules) == 5
    assert found.modules[0].numbers["rank_above_bfloat16"].value == 3


def test_what_cannot_be_read_is_said_not_raised(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "init_lora_weights": "pissa_niter_4"}))
    found = inspection(adapter)
    assert kinds(found) == ["unconverted"] and not found.modules
    assert "unconverted" in found.not_measured["everything"]
    assert "path_initial_model_for_weight_conversion" in found.not_measured["everything"]  # what to do about it
    config.write_text(json.dumps(content))
    rewrite(adapter, lambda name, t: t + torch.nan if "layers.2.q_proj.lora_A" in name else t)
    found = inspection(adapter)
    assert not found.modules and "NaN" in found.not_measured["everything"]
    assert any("NaN" in warning for warning in describe(adapter)["warnings"])


def test_what_weight_decay_left_is_read_from_the_run(adapter: Path) -> None:
    run = adapter.parent
    (run / "config.yaml").write_text("optim: {weight_decay: 0.1}\n")
    lrs = [1e-2 * (1 - i / 50) for i in range(50)]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "loss": 1.0, "lr": lr}) + "\n" for i, lr in enumerate(lrs))
    )
    number = inspection(adapter).numbers["decay_survival"]
    assert number.value == pytest.approx(math.prod(1 - 0.1 * lr for lr in lrs)) and number.inputs["steps"] == 50


@pytest.mark.parametrize("method", ["dora", "full", "bitfit", "oft", "loha"])
def test_methods_without_factors_of_the_change(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    write_base(model, tmp_path / "base")
    lk.attach(model, lk.METHODS[method](), target_modules=["q_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    directory = lk.save(model, tmp_path / "run" / "adapter")
    found = inspection(directory, base=True)
    _, layer, adapted = next(lk.adapters(model))
    W = layer.weight.detach()
    change = (adapted.merge(W) - W).detach()
    m = found.modules[0]
    if method == "bitfit":
        assert m.numbers == {} and "changes no matrix" in found.not_measured.values() and found.verdicts == ()
        return
    assert m.numbers["relative_norm"].value == pytest.approx(float(change.norm() / W.norm()), rel=1e-4)
    assert m.numbers["frobenius"].value == pytest.approx(float(change.norm()), rel=1e-4)
    S = torch.linalg.svdvals(change.double())
    assert m.spectrum == pytest.approx(S.tolist(), rel=1e-4, abs=1e-5)
    assert m.numbers["stable_rank"].value == pytest.approx(sp.stable_rank(S), rel=1e-4)


def test_of_dora_the_norm_is_that_of_the_change_or_said_not_to_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    write_base(model, tmp_path / "base")
    lk.attach(model, lk.METHODS["dora"](r=4), target_modules=["q_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    directory = lk.save(model, tmp_path / "run" / "adapter")
    alone, beside = inspection(directory), inspection(directory, base=True, intruders=True)
    _, layer, adapted = next(lk.adapters(model))
    W = layer.weight.detach()
    part = adapted.scale * (adapted.lora_B @ adapted.lora_A).detach()
    assert alone.modules[0].numbers["frobenius"].value == pytest.approx(float(part.norm()), rel=1e-4)
    (said,) = [why for what, why in alone.not_measured.items() if what == f"layers.0.q_proj and {BLOCKS - 1} more"]
    assert "only a part of the change: --base" in said
    numbers = beside.modules[0].numbers
    assert numbers["frobenius"].value == pytest.approx(float((adapted.merge(W) - W).detach().norm()), rel=1e-4)
    assert numbers["imbalance"] == alone.modules[0].numbers["imbalance"]
    assert "intruders_attributable" in numbers and not any("s·B·A" in why for why in beside.not_measured.values())


# --- the page -----------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The page's elements; fails where one is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_heat_map_shows_every_value_and_nothing_for_none() -> None:
    html = heatmap(
        "Norm",
        "",
        ["a", "<b>"],
        ["0", "1"],
        {("a", "0"): 1.0, ("a", "1"): math.nan, ("<b>", "1"): 0.0},
        label=str,
        log=True,
    )
    cells = [attrs for tag, attrs in Elements(html).tags if tag == "rect"]
    assert [cell["class"] for cell in cells] == ["cell", "none", "none"]
    tips = [unescape(tip) for tip in re.findall("<title>(.*?)</title>", html)]
    assert tips == ["a, block 0: 1.0", "a, block 1: not measured", "<b>, block 1: 0.0"]
    shades = heatmap("x", "", ["a"], ["0", "1", "2"], {("a", str(i)): 10.0**i for i in range(3)}, label=str, log=True)
    assert [float(v) for v in re.findall('fill-opacity="(.*?)"', shades)] == pytest.approx([0.06, 0.53, 1.0])
    assert heatmap("x", "", ["a"], ["0"], {("a", "0"): math.nan}, label=str) == ""


def page(adapter: Path, **options: bool) -> str:
    return render(describe(adapter), inspection(adapter, **options))


def test_the_page_is_whole_and_loads_nothing(adapter: Path) -> None:
    html = page(adapter, base=True)
    found = Elements(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))
    assert not {k for _, attrs in found.tags for k in attrs} & {"src", "href", "srcset", "action"}
    drawn = [attrs["aria-label"] for tag, attrs in found.tags if tag == "svg"]
    assert len(drawn) == 9 and sum("over components 1 to 4" in str(label) for label in drawn) == 1
    assert html.count("<rect ") == 8 * BLOCKS * len(NAMES)
    for text in ("dead module", "layers.1.q_proj", "Relative norm", "There is no score", "Not measured", "rank"):
        assert text in html


def test_the_picture_has_every_number_in_its_place(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from lorakit.analysis.inspect_picture import draw, write_picture

    seen = inspection(adapter, base=True)
    figure = draw(describe(adapter), seen)
    heats = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.images}
    (norms,) = [axis for title, axis in heats.items() if title.startswith("Norm")]
    grid = norms.images[0].get_array().filled(math.nan)
    rows = [label.get_text() for label in norms.get_yticklabels()]
    for measured in seen.modules:
        _, block, name = measured.module.path.split(".")
        value = grid[rows.index(name), int(block)]
        wanted = measured.numbers["frobenius"].value
        assert math.isnan(value) if wanted == 0 else value == pytest.approx(wanted), measured.module.path
    lines = {line.get_label(): line.get_ydata() for axis in figure.axes for line in axis.lines}
    assert {"q_proj", "up_proj", "random factors"} <= lines.keys()
    assert list(lines["up_proj"]) == pytest.approx(next(s.y for s in spectra(seen) if s.name == "up_proj"))
    file = write_picture(describe(adapter), seen, tmp_path / "deep" / "it.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_picture_says_what_to_install(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.analysis.inspect_picture import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"lorakit\[plot\]"):
        draw(describe(adapter), inspection(adapter))


def test_names_from_the_file_are_never_markup(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    content = json.loads(config.read_text())
    plain = [(tag, sorted(attrs)) for tag, attrs in Elements(page(adapter)).tags]
    hostile = "\"'><script>alert(1)</script><img src=x>"
    config.write_text(json.dumps({**content, "base_model_name_or_path": hostile, "task_type": hostile}))
    html = page(adapter)
    before = [tag for tag, _ in plain]
    assert [tag for tag, _ in Elements(html).tags] == before and escape(hostile) in html


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>
{
const visible = e => e.getClientRects().length > 0;
const box = e => { const {left, top, right, bottom} = e.getBoundingClientRect(); return [left, top, right, bottom]; };
const plot = document.querySelector('.tall .plot');
plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
const output = document.createElement('pre');
output.id = 'probe';
output.textContent = JSON.stringify({
  overflow: document.documentElement.scrollWidth - innerWidth,
  background: getComputedStyle(document.body).backgroundColor,
  cells: [...document.querySelectorAll('rect.cell')].filter(visible).map(e => [...box(e), getComputedStyle(e).fill]),
  tip: plot.querySelector('.tip').innerText,
  names: [...document.querySelector('.heat-names').children].map(box),
});
document.body.append(output);
}
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_in_a_browser(adapter: Path, tmp_path: Path, width: int, dark: bool) -> None:
    def browse(file: Path) -> tuple[str, str]:
        assert CHROMIUM is not None
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ]
        options += [
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
        ]
        options += [f"--user-data-dir={tmp_path / file.stem}", f"--window-size={width},2000", "--dump-dom"]
        options += ["--force-dark-mode"] if dark else []
        done = subprocess.run(
            [CHROMIUM, *options, file.as_uri()], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout, done.stderr

    html = page(adapter, base=True)
    plain, probed = tmp_path / "plain.html", tmp_path / "probed.html"
    plain.write_text(html)
    _, log = browse(plain)
    assert "CONSOLE" not in log, log
    probed.write_text(
        re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</body>", PROBE + "</body>")
    )
    dom, log = browse(probed)
    assert "CONSOLE" not in log, log
    seen: dict[str, Any] = json.loads(unescape(dom.partition('<pre id="probe">')[2].partition("</pre>")[0]))
    assert seen["overflow"] <= 0
    assert (seen["background"] == "rgb(15, 18, 22)") == dark
    assert len(seen["cells"]) >= 8 * (BLOCKS * len(NAMES) - 1)
    first = seen["cells"][0]
    assert 15 < first[2] - first[0] < 30 and first[4] in ("rgb(37, 99, 235)", "rgb(122, 168, 255)")
    rows = sorted({round(c[1]) for c in seen["cells"]})[:2]
    for (_, top, _, bottom), row in zip(seen["names"], rows, strict=True):  # names stand beside their rows
        assert top - 2 <= row <= bottom
    assert seen["tip"].splitlines()[0] == "component 1" and "random factors" in seen["tip"]
