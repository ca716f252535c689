"""PLoRA: what a stage leaves behind, exactly, and the new start of optimizer and schedule."""

import pytest
import torch
from driving import SPECTRUM, Drive, close

from lorakit.core.errors import UsageError
from lorakit.train.controllers.plora import PLoRA
from lorakit.train.controllers.relora import ReLoRA


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 1.0])
def test_unloading_keeps_the_function(momentum: float) -> None:
    drive = Drive(PLoRA(stages=3, momentum=momentum), 30)
    drive.steps(9)
    seen = []

    def look() -> None:
        seen.extend([drive.change, *(f.detach().clone() for f in drive.factors)])

    drive.step(after=look)
    before, A, B = seen
    close(drive.change, before, 1e-14)
    left = float(drive.chain.scale) * drive.chain.frozen_B @ drive.chain.frozen_A
    close(left, momentum * before)
    if momentum < 1:
        close(drive.factors[0], (1 - momentum) ** 0.5 * A)
        close(drive.factors[1], (1 - momentum) ** 0.5 * B)
    assert before.norm() > 0.1


def test_with_all_of_it_unloaded_a_stage_is_a_restart_of_relora() -> None:
    plora = Drive(PLoRA(stages=3), 30, schedule="constant")
    relora = Drive(ReLoRA(every=10, warmup=0, floor=0, prune="forget"), 30, schedule="constant")
    for drive in (plora, relora):
        drive.steps()
    assert torch.equal(plora.change, relora.change)
    assert torch.equal(plora.chain.frozen_A, relora.chain.frozen_A)


@pytest.mark.parametrize("momentum", [0.5, 1.0])
def test_c5_each_stage_begins_like_a_run(momentum: float) -> None:
    """The first Adam step of a stage moves B by exactly the stage's first rate."""
    drive = Drive(PLoRA(stages=3, momentum=momentum), 30, eps=1e-15, warmup=0.2)
    for step in range(30):
        B, sign = drive.factors[1].detach().clone(), []
        drive.step(
            before=lambda sign=sign: sign.append(drive.factors[1].grad.sign()),
            after=lambda B=B: B.sub_(drive.factors[1].detach()),
        )
        if step % 10 == 0:
            close(B, 1e-2 / 2 * sign[0], 1e-9)  # warm-up of 2 steps
            assert B.abs().min() > 0
        if step % 10 == 9 and step < 29:
            assert not drive.optimizer.state


def test_each_stage_has_the_whole_schedule() -> None:
    whole = Drive(None, 10, warmup=0.2)
    staged = Drive(PLoRA(stages=3), 30, warmup=0.2)
    one = [whole.controller.schedule(step) for step in range(10)]
    assert [staged.controller.schedule(step) for step in range(30)] == pytest.approx(3 * one, abs=1e-12)
    uneven = Drive(PLoRA(stages=3), 11)
    assert [step for step in range(11) if uneven.controller.schedule(step) == 1.0] == [0, 3, 7]


def test_stages_add_up_in_rank() -> None:
    drive = Drive(PLoRA(stages=3), 900, lr=2e-2).steps()
    assert drive.loss().item() < 1e-3 < sum(s**2 for s in SPECTRUM[4:])
    assert int(torch.linalg.matrix_rank(drive.change, rtol=1e-9)) <= 12
    assert len(drive.chain.frozen_A) == 8


@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"momentum": 1.1}, {"stages": 0}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        PLoRA(**settings)  # ty: ignore[invalid-argument-type]
    with pytest.raises(UsageError, match="5 steps cannot be cut into 6 stages"):
        Drive(PLoRA(stages=6), 5)
