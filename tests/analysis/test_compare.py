"""Planted agreement is found, chance is not, and the numbers do not depend on which factors a change is written with."""

from pathlib import Path

import pytest
import torch
from planted import adapter, basis, llama
from torch import Tensor

import lorakit as lk
from lorakit.analysis.compare import compare
from lorakit.analysis.compare_page import render
from lorakit.analysis.loaded import load_adapter
from lorakit.core.errors import FileError, UsageError


def sharing(count: int, own: int, r: int = 6, sign: float = 1.0):
    """Changes of rank r whose first `count` directions, left and right, depend on the layer alone, the rest on `own` too."""

    def fill(path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        layer = sum(map(ord, path))

        def directions(n: int, seed: int) -> Tensor:
            mine = torch.randn(n, r - count, generator=torch.Generator().manual_seed(1000 * own + layer + seed))
            return torch.linalg.qr(torch.cat([basis(n, count, layer + seed), mine.double()], 1))[0]

        U, V = directions(len(B), 0), directions(A.shape[1], 1)
        order = torch.randperm(r, generator=torch.Generator().manual_seed(own))  # shared ones are not the largest
        sigma = torch.linspace(2, 1, r).double()
        mix = torch.randn(r, r, generator=torch.Generator().manual_seed(own + 7), dtype=torch.float64)
        return torch.linalg.inv(mix) @ V.T, sign * U * sigma[order] @ mix

    return fill


METHOD = lk.LoRA(r=6, alpha=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 160, "intermediate_size": 224, "num_key_value_heads": 4}
    return llama(tmp_path_factory.mktemp("wide") / "base", **sizes)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_shared_directions_replicate_and_no_others(base: Path, tmp_path: Path, count: int) -> None:
    found = compare(
        [load_adapter(adapter(base, tmp_path / str(i), sharing(count, i), METHOD)) for i in (1, 2)], ["a", "b"]
    )
    (pair,) = found.pairs
    assert len(pair.modules) == 14
    assert [m.numbers["replicated"].value for m in pair.modules] == [count] * 14
    for m in pair.modules:
        for side, n in (("left", m.numbers["phi_left"]), ("right", m.numbers["phi_right"])):
            cosines = torch.tensor(m.cosines[side])
            assert n.value == pytest.approx(float(cosines.square().sum()) / 6)
            assert m.curves[side][6].value == n.value
            assert n.null == pytest.approx(6 / n.inputs["n"])
            assert n.value == pytest.approx((count + (6 - count) * 6 / n.inputs["n"]) / 6, abs=0.08)


def test_interference_is_the_cosine_of_the_changes(base: Path, tmp_path: Path) -> None:
    made = [
        adapter(base, tmp_path / "a", sharing(6, 1), METHOD),
        adapter(base, tmp_path / "b", sharing(3, 2), METHOD),
        adapter(base, tmp_path / "c", sharing(6, 1, sign=-2.0), METHOD),
    ]
    loaded = [load_adapter(path) for path in made]
    found = compare(loaded, ["a", "b", "c"])
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    for pair in found.pairs:
        dense = [{m.path: m.delta() for m in loaded[i]} for i in (pair.first, pair.second)]
        inner = energy_1 = energy_2 = 0.0
        for m in pair.modules:
            D1, D2 = dense[0][m.path], dense[1][m.path]
            wanted = float((D1 * D2).sum() / (D1.norm() * D2.norm()))
            assert m.numbers["interference"].value == pytest.approx(wanted, abs=1e-6)
            inner, energy_1 = inner + float((D1 * D2).sum()), energy_1 + float(D1.square().sum())
            energy_2 += float(D2.square().sum())
        assert pair.numbers["interference"].value == pytest.approx(inner / (energy_1 * energy_2) ** 0.5, abs=1e-6)
    assert found.pairs[1].numbers["interference"].value == pytest.approx(-1)
    assert found.pairs[1].numbers["phi_left"].value == pytest.approx(1)


def test_what_is_not_comparable_is_said(base: Path, tmp_path: Path) -> None:
    first = load_adapter(adapter(base, tmp_path / "a", sharing(2, 1), METHOD, target_modules=["q_proj"]))
    other = load_adapter(adapter(base, tmp_path / "b", sharing(2, 2), METHOD, target_modules=["q_proj", "v_proj"]))
    apart = load_adapter(adapter(base, tmp_path / "c", sharing(2, 3), METHOD, target_modules=["o_proj"]))
    small = llama(tmp_path / "small")
    foreign = load_adapter(adapter(small, tmp_path / "d", sharing(2, 4), METHOD, target_modules=["q_proj"]))
    assert "2 modules are changed by one of them only" in compare([first, other], ["a", "b"]).notes[0]
    with pytest.raises(UsageError, match="no module in common"):
        compare([first, apart], ["a", "c"])
    with pytest.raises(FileError, match="different bases"):
        compare([first, foreign], ["a", "d"])
    dora = load_adapter(adapter(base, tmp_path / "e", sharing(2, 4), lk.DoRA(r=6, alpha=6), target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="depends on the base"):
        compare([first, dora], ["a", "e"])


def test_the_page_shows_every_module_and_escapes_names(base: Path, tmp_path: Path) -> None:
    made = [load_adapter(adapter(base, tmp_path / str(i), sharing(2, i), METHOD)) for i in (1, 2)]
    page = render(compare(made, ["<b>x</b>", "y"]))
    assert "<b>x</b>" not in page
    assert page.count("model.layers.1.mlp.down_proj") == 1
    assert "down_proj, block 1: 2" in page, "the cell of the heat map"
