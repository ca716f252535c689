"""ReLoRA: restarts that change nothing, the jagged schedule, what is left of Adam's state, and the rank."""

import math
from typing import Any

import pytest
import torch
from driving import SPECTRUM, Drive, close
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.train.controllers import Run
from lorakit.train.controllers.relora import ReLoRA, prune

# t -> multiplier in the authors' code, for 1000 steps, 50 of warm-up, a restart every 200 with 10 of warm-up, floor 0.1
GOLDEN = {
    1: 0.02, 25: 0.5, 50: 1.0, 100: 0.9938625865, 199: 0.9464692909, 200: 0.0, 201: 0.0938465416, 205: 0.4692327082,
    209: 0.8446188748, 210: 0.9384654164, 400: 0.0, 405: 0.358519381, 410: 0.717038762, 999: 0.1000024606,
}  # fmt: skip


def authors_schedule(t: float) -> float:
    """The cosine and the first warm-up of the authors' code, which counts that from 0."""
    return t / 50 if t < 50 else 0.5 * (1 + math.cos(math.pi * (t - 50) / 950))


def test_the_schedule_is_the_authors_jagged_cosine() -> None:
    model = lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.LoRA(r=2))
    controller = ReLoRA(every=200, warmup=10, floor=0.1).start(Run(model, "default", 1000, authors_schedule, 50, 0))
    for t, multiplier in GOLDEN.items():
        assert controller.schedule(t) == pytest.approx(multiplier, abs=1e-10), t


def test_a_restart_changes_no_function_and_starts_the_factors_anew() -> None:
    drive = Drive(ReLoRA(every=5), 20)
    for cycle in range(1, 4):
        drive.steps(4)
        seen: list[Tensor] = []
        drive.step(after=lambda seen=seen: seen.append(drive.change))
        assert len(drive.chain.frozen_A) == 4 * cycle
        close(drive.change, seen[0], 1e-15)
        A, B = drive.factors
        assert torch.count_nonzero(B) == 0
        assert A.abs().max() <= 1 / math.sqrt(32)
        assert A.abs().max() > 0.9 / math.sqrt(32)
    drive.steps()
    assert len(drive.chain.frozen_A) == 12  # none after the last step
    assert torch.count_nonzero(drive.factors[1]) > 0


def test_a_is_drawn_from_the_seed_and_the_number_of_the_restart_alone() -> None:
    def drawn(seed: int, before: int, lr: float) -> list[Tensor]:
        drive, found = Drive(ReLoRA(every=3), 9, seed=seed, lr=lr), []
        for _ in range(2):
            torch.manual_seed(before)
            drive.steps(3)
            assert torch.initial_seed() == before
            found.append(drive.factors[0].detach().clone())
        return found

    one, again, other = drawn(0, 1, 1e-2), drawn(0, 2, 1e-3), drawn(1, 1, 1e-2)
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_no_cycle_is_without_a_gradient_and_each_lowers_the_loss() -> None:
    drive, norms, losses = Drive(ReLoRA(every=25, warmup=2, prune="reset"), 100), [], []
    for _ in range(100):
        losses.append(drive.step(before=lambda: norms.append(max(float(f.grad.norm()) for f in drive.factors))))
    assert min(norms) > 1e-3
    assert all(losses[k + 25] < losses[k] for k in (0, 25, 50, 74))


def test_the_rank_of_the_change_grows_with_the_cycles() -> None:
    r, cycles = 2, 3
    drive = Drive(ReLoRA(every=40), 40 * cycles, r=r, lr=2e-2)
    ranks = []
    for _ in range(cycles):
        drive.steps(40)
        ranks.append(int(torch.linalg.matrix_rank(drive.change, rtol=1e-9)))
    assert ranks == [r, 2 * r, 3 * r]
    assert len(drive.chain.frozen_A) == r * (cycles - 1)


def test_c14_successive_best_fits_are_the_best_fit_of_the_rank_sum() -> None:
    """Each cycle trained to its end takes the next four singular values off."""
    drive = Drive(ReLoRA(every=600, warmup=10, floor=0.0, prune="forget"), 1200, lr=2e-2, warmup=10)
    drive.steps(600)
    # the jagged schedule is at half its height there: near the first optimum, the rest is learned in the second cycle
    assert drive.loss().item() == pytest.approx(sum(s**2 for s in SPECTRUM[4:]), rel=2e-2)
    assert drive.steps().loss().item() < 1e-3


def state_after(mode: str, share: float = 0.9) -> tuple[torch.optim.Optimizer, nn.Parameter, dict[str, Tensor]]:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50, 40))
    optimizer = torch.optim.AdamW([p], lr=1e-2)
    for _ in range(3):
        p.grad = torch.randn(50, 40)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    prune(optimizer, p, mode, share, seed=7)
    return optimizer, p, before


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_pruning_clears_the_share_that_was_asked_for(key: str) -> None:
    optimizer, p, before = state_after("magnitude")
    old, new = before[key], optimizer.state[p][key]
    assert torch.equal(new, old * (old.abs() > torch.quantile(old.abs(), 0.9)))  # the authors' rule
    assert int((new != 0).sum()) == 200
    optimizer, p, _ = state_after("random")
    new = optimizer.state[p][key]
    kept = int((new != 0).sum())
    assert abs(kept - 200) < 5 * math.sqrt(2000 * 0.9 * 0.1)
    assert torch.equal(new[new != 0], old[new != 0])
    again, q, _ = state_after("random")
    assert torch.equal(again.state[q][key], new)
    optimizer, p, _ = state_after("reset")
    assert torch.count_nonzero(optimizer.state[p][key]) == 0
    assert float(optimizer.state[p]["step"]) == 3
    optimizer, p, _ = state_after("forget")
    assert p not in optimizer.state


def test_quantile_of_more_entries_than_torch_takes() -> None:
    values = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    p = nn.Parameter(values)
    optimizer = torch.optim.SGD([p], lr=0.0, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = values.clone()
    prune(optimizer, p, "magnitude", 0.75, seed=0)
    assert int(optimizer.state[p]["momentum_buffer"].count_nonzero()) == 2**22


@pytest.mark.parametrize(
    ("mode", "beta2", "size"),
    [
        ("reset", 0.999, 0.1 / math.sqrt(0.001)),
        ("reset", 0.95, 0.1 / math.sqrt(0.05)),
        ("forget", 0.999, 1.0),
        ("forget", 0.95, 1.0),
    ],
)
def test_c17_first_update_after_a_reset(mode: str, beta2: float, size: float) -> None:
    """With the means zeroed and Adam's count going on the update is (1 - beta1)/sqrt(1 - beta2) times the rate."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 4).double())
    optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, beta2), eps=1e-15, weight_decay=0.0)
    optimizer.state[p] = {"step": torch.tensor(1e6), "exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    prune(optimizer, p, mode, 0.9, seed=0)
    before, p.grad = p.detach().clone(), torch.randn(5, 4).double()
    optimizer.step()
    close(p.detach() - before, -size * 1e-3 * p.grad.sign(), 1e-8)


def test_only_the_factors_state_is_pruned() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 2)})
    lk.attach(model, lk.LoRA(r=2), target_modules=["body"], modules_to_save=["head"])
    controller = ReLoRA(every=1, warmup=0, prune="reset").start(Run(model, "default", 4, lambda step: 1.0, 0, 0))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values())
    for p in trained.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    controller.after_update(0, optimizer)
    cleared = {n for n, p in trained.items() if not optimizer.state[p]["exp_avg"].count_nonzero()}
    assert cleared == {n for n in trained if ".live.lora_" in n}
    assert len(trained) == len(cleared) + 2


@pytest.mark.parametrize(
    ("settings", "total", "warmup", "message"),
    [
        ({"every": 100}, 100, 0, "never restart"),
        ({"every": 10, "warmup": 10}, 100, 0, "does not fit"),
        ({"every": 10}, 100, 11, "does not fit"),
        ({"every": 0}, 100, 0, "every must be at least 1"),
        ({"floor": 1.5}, 100, 0, "floor in"),
        ({"share": 0.0}, 100, 0, "share in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: dict[str, Any], total: int, warmup: int, message: str
) -> None:
    model = lk.attach(nn.Sequential(nn.Linear(4, 4)), lk.LoRA(r=2))
    with pytest.raises(UsageError, match=message):
        ReLoRA(**settings).start(Run(model, "default", total, lambda step: 1.0, warmup, 0))
