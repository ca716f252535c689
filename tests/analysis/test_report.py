"""The report: its figures, text never taken for markup, and the page as a browser shows it."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakit.analysis.charts import short
from lorakit.analysis.report import render, write_report
from lorakit.core.errors import FileError, UsageError


def config(name: str, seed: int) -> str:
    tree = {
        "model": {"name": name},
        "data": {"path": f"{name}/train.jsonl", "format": None},
        "method": {"name": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "optim": {"lr": 0.001},
        "train": {"task": "sft", "seed": seed},
    }
    return json.dumps(tree)  # which is YAML, too


def record(step: int, steps: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / steps,
        "loss": 2.5 * math.exp(-4 * step / steps) + 0.02 * (step % 3),
        "lr": 1e-3 * (1 - step / steps),
        "grad_norm": 1 + 1 / step,
        "tokens": 400 * step,
        "trained_tokens": 240 * step,
        "tok_s": 230.0 + step % 7,
        "mem_gb": 1.25,
        "t": 1.5 * step,
    }


def make_run(
    directory: Path,
    steps: int = 60,
    *,
    name: str = "smollm2",
    seed: int = 0,
    accuracy: bool = False,
    finished: bool = True,
) -> Path:
    directory.mkdir(parents=True)
    metrics: list[dict[str, Any]] = []
    samples = []
    for step in range(1, steps + 1):
        metrics.append(record(step, steps))
        if step % 10 == 0:
            evaluation = {"step": step, "eval_loss": 3.0 / step} | ({"eval_accuracy": step / 100} if accuracy else {})
            metrics.append(evaluation)
            samples += [{"step": step, "prompt": p, "text": f"{name} says {step}"} for p in (f"ask {name}", "other")]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    (directory / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
    (directory / "config.yaml").write_text(config(name, seed))
    (directory / "env.json").write_text(json.dumps({"packages": {"torch": torch.__version__}, "processor": name}))
    if finished:
        make_adapter(directory / "adapter", name)
    return directory


def make_adapter(directory: Path, name: str) -> None:
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": name, "layers_pattern": None}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for layer in range(3):
        for kind in ("q_proj", "v_proj"):
            path = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            tensors |= {f"{path}.lora_A.weight": torch.zeros(8, 16), f"{path}.lora_B.weight": torch.zeros(32, 8)}
    save_file(tensors, directory / "adapter_model.safetensors")


class Page(HTMLParser):
    """The elements of a page; fails where one is not closed in order."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (element, its text)
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def text(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("style", "script"))

    def having(self, tag: str, css: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag and css in attrs.get("class", "").split()]


def figures(page: Page) -> dict[str, str]:
    """The headline numbers by their label."""
    own = [text for tag, text in page.texts if tag in ("dt", "dd")]
    return dict(zip(own[::2], own[1::2], strict=True))


# --- the page -----------------------------------------------------------------------------------------------------


def test_headline_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", accuracy=True)
    page = Page(render([run]))
    adapter = run / "adapter" / "adapter_model.safetensors"
    assert figures(page) == {
        "Final loss": short(record(60, 60)["loss"]),
        "Best evaluation loss": "0.05",
        "Best accuracy": "60%",
        "Optimizer steps": "60",
        "Tokens": "24,000",
        "Trained tokens": "14,400",
        "Time": "0:01:30",
        "Tokens per second": "267",
        "Peak memory": "1.25 GB",
        "Adapter parameters": f"{3 * 2 * (8 * 16 + 32 * 8):,}",
        "Adapter file": f"{adapter.stat().st_size / 1e3:.1f} kB",
    }
    text = page.text()
    for expected in ("finished", "smollm2 says 60", "q_proj, v_proj", "optim", "1,152", torch.__version__):
        assert expected in text, expected
    assert len(page.having("figure", "chart")) == 7
    assert [len(page.having("path", css)) for css in ("line", "points", "marks")] == [11, 4, 4]


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    html = render([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)])
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))
    assert not {k for _, attrs in page.tags for k in attrs} & {"src", "href", "srcset", "action", "poster"}
    assert not [k for _, attrs in page.tags for k in attrs if k.startswith("on")]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert "://" not in script and "innerHTML" not in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_tables_and_charts_are_labelled(tmp_path: Path) -> None:
    page = Page(render([make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]))
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    drawn = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert drawn and all(attrs["role"] == "img" and " over steps 1 to 60. " in attrs["aria-label"] for attrs in drawn)
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert ("html", {"lang": "en"}) in page.tags


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;<!--]]></style></pre>"


def test_text_from_a_run_is_never_markup(tmp_path: Path) -> None:
    def structure(name: str, directory: str) -> list[tuple[str, list[str]]]:
        runs = [
            make_run(tmp_path / directory / "a", name=name),
            make_run(tmp_path / directory / "b", name=name, seed=1),
        ]
        pages = [Page(render([runs[0]])), Page(render(runs))]
        assert all(name in page.text() for page in pages)
        return [(tag, sorted(attrs)) for page in pages for tag, attrs in page.tags]

    assert structure("plain", "one") == structure(HOSTILE, "two")
    named = make_run(tmp_path / "<b>&name")
    other = make_run(tmp_path / "other")
    assert "<b>&name" in Page(render([named, other])).text()


def test_an_unfinished_empty_or_damaged_run(tmp_path: Path) -> None:
    unfinished = make_run(tmp_path / "unfinished", steps=5, finished=False)
    text = Page(render([unfinished])).text()
    assert "unfinished" in text and "at step 5" in text

    empty = tmp_path / "empty"
    empty.mkdir()
    page = Page(render([empty]))
    assert "Nothing has been recorded yet." in page.text()
    assert not page.having("figure", "chart")
    Page(render([unfinished, empty]))

    damaged = make_run(tmp_path / "damaged")
    lines = [
        '{"step": 1, "loss": null}',
        '{"step": 2, "loss": NaN}',
        '{"step": 3, "loss": "x"}',
        "[]",
        '{"step": 4, "lo',
    ]
    (damaged / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "loss": 1.5, "tok_s": 1e308, "t": true}']))
    (damaged / "samples.jsonl").write_bytes(b'\xff\xfe{"step": 1}\n{"step": 2, "prompt": 5}\n')
    (damaged / "config.yaml").write_text("{unclosed: [")
    (damaged / "env.json").write_text("[1]")
    (damaged / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    page = Page(render([damaged]))
    assert figures(page)["Final loss"] == "1.5"
    assert "adapter_model.safetensors cannot be read" in page.text()


def test_several_runs_show_what_differs_and_which_is_best(tmp_path: Path) -> None:
    a = make_run(tmp_path / "x" / "run")
    b = make_run(tmp_path / "y" / "run", seed=1, steps=40, finished=False)
    html = render([a, b])
    page = Page(html)
    text = page.text()
    assert "x/run" in text and "y/run" in text  # equal names get their parents
    assert re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>', html) == ["train.seed"]
    assert "8 that agree" in text
    assert [t for tag, t in page.texts if t.endswith("★")] == [
        f"{short(record(60, 60)['loss'])} ★",
        "0.05 ★",
    ]
    assert {f"c{i}" for i in (1, 2)} <= set(re.findall(r'class="line (c\d)"', html))


def test_where_it_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    assert write_report([run]) == run / "report.html"
    assert write_report([run, run], tmp_path / "new" / "both.html") == tmp_path / "new" / "both.html"
    assert Page((tmp_path / "new" / "both.html").read_text(encoding="utf-8")).tags
    with pytest.raises(UsageError):
        write_report([])
    with pytest.raises(FileError, match="missing"):
        write_report([tmp_path / "missing"])


def test_long_runs_stay_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", steps=5_000, finished=False)
    assert len(render([run])) < 600_000


# --- in a browser -------------------------------------------------------------------------------------------------

PROBE = """
<script>
{
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const luminance = color => {
  const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (one, other) => {
  const [a, b] = [luminance(one), luminance(other)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
};
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (rgb(color)[3] !== 0) return color;
  }
  return 'rgb(255, 255, 255)';
};
const visible = e => e.getClientRects().length > 0;
const texts = [...document.querySelectorAll('body *')].filter(e => visible(e) && !e.closest('script, svg') &&
  [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
const lines = [...document.querySelectorAll('.plot path.line')].filter(visible);
const box = e => { const {left, top, right, bottom} = e.getBoundingClientRect(); return [left, top, right, bottom]; };
const plot = [...document.querySelectorAll('.tall .plot')].find(visible);
const [left, top, right, bottom] = box(plot);
const before = plot.querySelector('.tip').hidden;
plot.dispatchEvent(new PointerEvent('pointermove', {clientX: right, clientY: top, bubbles: true}));
const tip = plot.querySelector('.tip').innerText;
plot.dispatchEvent(new PointerEvent('pointerleave'));
plot.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
const result = {
  before, tip, first: plot.querySelector('.tip').innerText,
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
  background: getComputedStyle(document.body).backgroundColor,
  lines: lines.length, lengths: lines.map(l => l.getTotalLength()),
  plot: [left, top, right, bottom], curves: lines.map(box),
  strokes: Math.min(...lines.map(l => contrast(getComputedStyle(l).stroke, ground(l)))),
  faint: texts.map(e => [contrast(getComputedStyle(e).color, ground(e)), e.className, e.innerText.slice(0, 40)])
    .filter(([ratio]) => ratio < 4.5),
  tall: [...document.querySelectorAll('.tall')].filter(visible).map(e => e.className),
};
document.querySelector('#log').click();
result.after = [...document.querySelectorAll('.tall')].filter(visible).map(e => e.className);
const output = document.createElement('pre');
output.id = 'probe';
output.textContent = JSON.stringify(result);
document.body.append(output);
}
</script>
"""

# A window has a least width, a frame has none.
FRAME = """<!doctype html>
<body><iframe style="width: {width}px; height: {height}px; border: 0" srcdoc="{page}"></iframe><pre id="seen"></pre>
<script>
document.querySelector('iframe').onload = event =>
  document.querySelector('#seen').textContent = event.target.contentDocument.querySelector('#probe').textContent;
</script>
"""

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def browse(file: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Load a page in a browser without a network; give the document it became and what it logged."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr"),
            *("--virtual-time-budget=2000", "--dump-dom", *options, file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, done.stderr


@needs_chromium
@pytest.mark.parametrize(
    ("size", "dark", "several"), [((1200, 900), False, False), ((1200, 900), True, True), ((390, 844), False, True)]
)
def test_in_a_browser(tmp_path: Path, size: tuple[int, int], dark: bool, several: bool) -> None:
    runs = [make_run(tmp_path / "a", accuracy=True), *([make_run(tmp_path / "b", seed=1)] if several else [])]
    report = write_report(runs, tmp_path / "report.html")
    html = report.read_text(encoding="utf-8")
    _, log = browse(report, tmp_path / "profile")
    assert "CONSOLE" not in log, log  # no error, nothing the policy had to stop

    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace(
        "</body>", PROBE + "</body>"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(FRAME.format(width=size[0], height=size[1], page=escape(open_page)))
    dom, log = browse(probe, tmp_path / "probe-profile", *(["--force-dark-mode"] if dark else []))
    assert "CONSOLE" not in log, log
    seen = json.loads(unescape(dom.partition('<pre id="seen">')[2].partition("</pre>")[0]))

    assert seen["overflow"] <= 0 and seen["width"] == size[0]
    assert (seen["background"] == "rgb(15, 18, 22)") == dark
    assert seen["lines"] == (13 if several else 7)
    assert min(seen["lengths"]) > 100
    left, top, right, bottom = seen["plot"]
    a, b, c, d = seen["curves"][0]
    assert abs(a - left) < 3 and abs(c - right) < 3 and top - 3 <= b < d <= bottom + 3 and d - b > (bottom - top) / 2
    assert seen["strokes"] >= 3
    assert seen["faint"] == []
    assert seen["before"] is True
    assert seen["tip"].splitlines()[0] == "step 60"
    assert "0.05" in seen["tip"]
    assert seen["first"].splitlines()[0] == "step 1"
    assert len(seen["tall"]) == len(seen["after"]) == 1
    assert "log" in seen["after"][0].split()
