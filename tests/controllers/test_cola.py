"""CoLA: one link is LoRA, three links reach what three times the rank reaches, and what a chain accepts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driving import SPECTRUM, Drive, close
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.train.controllers import Run
from lorakit.train.controllers._links import Links, refuses
from lorakit.train.controllers.cola import CoLA

LEFT_BY_4 = sum(s**2 for s in SPECTRUM[4:])


def test_three_links_of_rank_4_reach_the_optimum_of_rank_12() -> None:
    """Eckart and Young: one rank-4 LoRA cannot leave less than the squares of the other singular values."""
    single = Drive(None, 600, lr=1e-2).steps()
    assert single.loss().item() == pytest.approx(LEFT_BY_4, rel=1e-3)
    chain = Drive(CoLA(links=3), 600, lr=2e-2)
    assert chain.steps(200).loss().item() == pytest.approx(LEFT_BY_4, rel=1e-3)
    assert chain.steps(200).loss().item() < 1e-3  # rank 8 is all there is in D
    assert chain.steps().loss().item() < 1e-6
    assert len(chain.chain.frozen_A) == 8


def test_c14_two_links_of_rank_2_are_the_best_fit_of_rank_4() -> None:
    drive = Drive(CoLA(links=2), 1600, lr=1e-2, r=2)
    assert drive.steps(800).loss().item() == pytest.approx(sum(s**2 for s in SPECTRUM[2:]), rel=1e-3)
    assert drive.steps().loss().item() == pytest.approx(LEFT_BY_4, rel=1e-3)


def test_one_link_is_lora_bit_for_bit() -> None:
    plain, linked = (
        Drive(None, 40, warmup=0.1, weight_decay=0.01),
        Drive(CoLA(links=1), 40, warmup=0.1, weight_decay=0.01),
    )
    for _ in range(40):
        assert plain.step() == linked.step()
    assert all(map(torch.equal, plain.factors, linked.factors))


def test_a_knot_changes_no_function_and_the_optimizer_begins_anew() -> None:
    drive = Drive(CoLA(links=2), 20)
    drive.steps(9)
    seen: list[Tensor] = []
    drive.step(after=lambda: seen.append(drive.change))
    close(drive.change, seen[0], 1e-15)
    assert not drive.optimizer.state
    assert torch.count_nonzero(drive.factors[1]) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "riemannian", "muon", "lora_pro", "lora_fa"])
def test_later_links_can_have_smaller_ranks(optimizer: str) -> None:
    drive = Drive(CoLA(links=3, step_down=0.5), 60, r=8, optimizer=optimizer, lr=1e-3)
    scale, parameters = float(drive.chain.scale), drive.factors
    losses = [drive.step() for _ in range(60)]
    assert [len(drive.factors[0]), len(drive.chain.frozen_A)] == [2, 12]
    assert all(new is old for new, old in zip(drive.factors, parameters, strict=True))
    assert float(drive.chain.scale) == scale
    assert losses[59] < losses[40] < losses[20] < losses[0]


class Tiny(nn.Module):
    """A fused projection, an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.conv = nn.Embedding(11, 6), nn.Linear(6, 12), nn.Conv1d(4, 5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.qkv(self.embed(ids))
        return self.conv(y.reshape(len(ids), 4, -1)).square().mean()


def links_on(model: nn.Module, total: int = 3) -> tuple[CoLA, Run]:
    lk.attach(
        model, lk.LoRA(r=2, alpha=3), target_modules=["embed", "qkv.q", "qkv.v", "conv"],
        rank_pattern={"conv": 3}, fused={"qkv": {"q": 4, "k": 4, "v": 4}},
    )  # fmt: skip
    return CoLA(links=3), Run(model, "default", total, lambda step: 1.0, 0, 0)


def test_every_kind_of_layer_and_the_saved_adapter_is_one_lora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Tiny(), torch.arange(10).reshape(2, 5)[:, :4]
    base = {k: v.clone() for k, v in model.state_dict().items()}
    settings, run = links_on(model)
    controller = settings.start(run)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(3):
        model(ids).backward()
        optimizer.step()
        after = model(ids)
        controller.after_update(step, optimizer)
        optimizer.zero_grad()
        torch.testing.assert_close(model(ids), after, rtol=1e-6, atol=1e-7)
    lk.save(model, tmp_path / "adapter")
    fresh = Tiny()
    fresh.load_state_dict(base)
    lk.load(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(ids), model(ids), rtol=1e-6, atol=1e-7)
    ranks = {
        path: [len(p) for n, p in a.named_parameters() if n.endswith("lora_A")] for path, _, a in lk.adapters(fresh)
    }
    assert ranks == {"embed": [6], "qkv": [6, 6], "conv": [9]}
    assert (fresh(ids) - lk.use(fresh, None)(ids)).abs() > 1e-3
    merged = lk.merge(model)(ids)
    torch.testing.assert_close(merged, after, rtol=1e-5, atol=1e-6)


def test_links_state_gives_the_shapes_back() -> None:
    model, other = Tiny(), Tiny()
    for m in (model, other):
        links_on(m)
    links = Links(links_on_run(model))
    for share in (1.0, 0.4):
        links.freeze()
        links.resize(share)
    fresh = Links(links_on_run(other))
    fresh.restore(links.state())
    shapes = [
        [(n, tuple(p.shape)) for n, p in a.named_parameters()] for m in (model, other) for _, _, a in lk.adapters(m)
    ]
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    assert fresh.state() == {"ranks": [[1, 4], [1, 4], [1, 4], [1, 6]]}


def links_on_run(model: nn.Module) -> Run:
    return Run(model, "default", 3, lambda step: 1.0, 0, 0)


REASONS: dict[str, str | None] = {
    "lora": None,
    "lora_fa": None,
    "dora": "not adding",
    "vera": "share",
    "adalora": "not one product",
    "bitfit": "",
    "full": "",
}


@pytest.mark.parametrize("name", sorted(set(REASONS) & set(lk.METHODS)))
def test_methods_that_cannot_be_linked_are_refused_with_the_reason(name: str) -> None:
    expected, method = REASONS[name], lk.METHODS[name]()
    reason = refuses(method)
    assert (reason is None) == (expected is None)
    if reason is not None:
        assert expected in reason
        model = lk.attach(nn.Sequential(nn.Linear(8, 8)), method)
        with pytest.raises(UsageError, match="cannot be trained in links"):
            CoLA().start(links_on_run(model))


@pytest.mark.parametrize("name", sorted(lk.INITS))
def test_an_init_is_accepted_if_it_can_be_drawn_again(name: str) -> None:
    made: Callable[[], str | None] = lambda: refuses(lk.LoRA(r=2, init=name))  # noqa: E731
    facts = vars(lk.INITS.module(name))
    drawn_again = not facts.get("FROM_BASE") and not facts.get("NEEDS")
    assert (made() is None) == drawn_again


@pytest.mark.parametrize("settings", [{"links": 0}, {"step_down": 0.0}, {"step_down": 1.5}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        CoLA(**settings)  # ty: ignore[invalid-argument-type]
