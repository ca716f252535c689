"""Sharpness on problems whose Hessian is known, and what the command makes of a checkpoint."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.analysis.sharpness import Adam, Sharpness, sharpness
from lorakit.core.attach import adapters
from lorakit.core.errors import DivergenceError, UsageError
from lorakit.theory import curvature


class Bilinear:
    """1/2 ||s·B·A - diag(3, 1)||^2 in (5, 4), rank 2, at its balanced optimum: a real LoRA on a layer of zeros."""

    def __init__(self, scale: float, dtype: torch.dtype = torch.float64) -> None:
        model = nn.Sequential(nn.Linear(4, 5, bias=False)).to(dtype)
        model[0].weight.data.zero_()
        lk.attach(model, lk.LoRA(r=2, alpha=2 * scale), target_modules=["0"])
        ((_, _, adapter),) = adapters(model)
        self.model, self.wanted = model.eval(), torch.zeros(5, 4, dtype=dtype)
        with torch.no_grad():
            adapter.lora_A.zero_()
            adapter.lora_B.zero_()
            for i, sigma in enumerate((3.0, 1.0)):
                self.wanted[i, i] = sigma
                adapter.lora_A[i, i] = adapter.lora_B[i, i] = (sigma / scale) ** 0.5
        self.parameters = [adapter.lora_A, adapter.lora_B]

    def gradient(self) -> Sequence[Tensor]:
        out = self.model(torch.eye(4, dtype=self.wanted.dtype)).T
        return torch.autograd.grad((out - self.wanted).square().sum() / 2, self.parameters)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_eigenvalues_of_the_bilinear_problem(scale: float, dtype: torch.dtype, tolerance: float) -> None:
    """Six distinct ones, found in six steps: multiplicities are invisible. The parameters are back, bit for bit."""
    problem = Bilinear(scale, dtype)
    before = [p.detach().clone() for p in problem.parameters]
    found = sharpness(problem.parameters, problem.gradient, steps=18)
    known = curvature.bilinear_spectrum([3.0, 1.0, 0.0, 0.0], [0, 1], 5, 4, 2, scale)
    assert found.steps == 6
    assert found.values.tolist() == pytest.approx(sorted(set(known.tolist())), abs=scale * tolerance)
    assert found.largest.value == pytest.approx(6 * scale, abs=scale * tolerance)
    assert float(found.residuals.max()) < scale * tolerance
    assert found.negative == []
    assert found.ratio is None
    assert found.judgement() is None
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))


def test_at_a_saddle_the_negative_eigenvalues_are_found() -> None:
    problem = Bilinear(1.0)
    with torch.no_grad():
        for p in problem.parameters:
            p.zero_()
    found = sharpness(problem.parameters, problem.gradient, steps=18)
    assert [round(n.value, 6) for n in found.negative] == [-3.0, -1.0]
    assert found.values.tolist() == pytest.approx([-3, -1, 0, 1, 3], abs=1e-6)


def test_the_preconditioned_eigenvalues_are_those_of_the_dense_matrix() -> None:
    problem = Bilinear(1.0)
    generator = torch.Generator().manual_seed(0)
    squares = [torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in problem.parameters]
    adam = Adam(squares, [0.1, 0.4], 0.9, 1e-8)
    found = sharpness(problem.parameters, problem.gradient, steps=18, adam=adam)
    A, B = problem.parameters

    def loss(A: Tensor, B: Tensor) -> Tensor:
        return (B @ A - problem.wanted).square().sum() / 2

    blocks = torch.autograd.functional.hessian(loss, (A.detach(), B.detach()))
    n = A.numel()
    H = torch.zeros(18, 18, dtype=torch.float64)
    for i, rows in enumerate((slice(0, n), slice(n, 18))):
        for j, columns in enumerate((slice(0, n), slice(n, 18))):
            H[rows, columns] = blocks[i][j].reshape(rows.stop - rows.start, columns.stop - columns.start)
    rates = torch.cat([torch.full((n,), 0.1), torch.full((18 - n,), 0.4)])
    root = (rates / (torch.cat([s.flatten() for s in squares]).sqrt() + 1e-8)).sqrt()
    wanted = torch.linalg.eigvalsh(root[:, None] * H * root)
    assert found.largest.value == pytest.approx(float(wanted[-1]), rel=1e-5)
    ratio = found.ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(float(wanted[-1]) / 38, rel=1e-5)


@pytest.mark.parametrize(("share", "name"), [(0.97, "learning_rate_stable"), (1.03, "learning_rate_high")])
def test_the_verdict_is_what_adam_with_a_fixed_second_mean_does(share: float, name: str) -> None:
    """Descent with momentum as a running mean, near the optimum of the bilinear problem: stable below the edge, not above."""
    problem = Bilinear(1.0)
    lr = share * 38 / 6
    adam = Adam([torch.ones_like(p) for p in problem.parameters], [lr, lr], 0.9, 0.0)
    judgement = sharpness(problem.parameters, problem.gradient, steps=18, adam=adam).judgement()
    assert judgement is not None
    assert judgement.name == name
    means = [torch.zeros_like(p) for p in problem.parameters]
    generator = torch.Generator().manual_seed(0)
    start = [1e-6 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in problem.parameters]
    with torch.no_grad():
        for p, d in zip(problem.parameters, start, strict=True):
            p.add_(d)
    for _ in range(600):
        gradient = problem.gradient()
        with torch.no_grad():
            for p, mean, g in zip(problem.parameters, means, gradient, strict=True):
                p.sub_(lr * mean.lerp_(g, 0.1))
    out = (problem.parameters[1] @ problem.parameters[0]).detach()
    assert (float((out - problem.wanted).norm()) < 1e-4) == (share < 1)  # above the edge it is NaN in the end


def test_what_cannot_be_measured_is_refused_and_the_parameters_are_back() -> None:
    problem = Bilinear(1.0)
    before = [p.detach().clone() for p in problem.parameters]
    with pytest.raises(DivergenceError):
        sharpness(problem.parameters, lambda: [torch.full_like(p, torch.nan) for p in problem.parameters])
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters, strict=True))
    adam = Adam([torch.ones_like(p) for p in problem.parameters], [0.0, 0.0], 0.9, 1e-8)
    with pytest.raises(UsageError, match="rate"):
        sharpness(problem.parameters, problem.gradient, adam=adam)


def test_the_command_takes_the_rate_in_force_from_the_checkpoint(
    tiny_model: Path, rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli.main import run

    output = tmp_path / "run"
    train = [
        "train",
        "-q",
        "--model",
        tiny_model,
        "--data",
        rows(8),
        "--output",
        output,
        "--max-steps",
        4,
        "--lr",
        0.01,
    ]
    more = ["--dtype", "float32", "--save-steps", 2, "--schedule", "linear", "--warmup", 0, "--b-ratio", 2]
    assert run([str(a) for a in [*train, *more]]) == 0
    capsys.readouterr()
    call = ["sharpness", output, "--base", tiny_model, "--data", tmp_path / "train.jsonl", "--rows", 4, "--steps", 4]
    assert run([str(a) for a in [*call, "--json"]]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["ratio"] is None
    assert raw["judgements"] == []
    checkpoint = ["--checkpoint", output / "checkpoints" / "step-000002", "--json"]
    assert run([str(a) for a in [*call, *checkpoint]]) == 0
    found = json.loads(capsys.readouterr().out)
    lrs = [json.loads(line)["lr"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert found["ratio"]["inputs"]["lr"] == pytest.approx(lrs[1])
    assert found["judgements"][0]["name"].startswith("learning_rate")
    assert run([str(a) for a in [*call, *checkpoint, "--lr", lrs[1] / 2]]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"]["value"] == pytest.approx(found["ratio"]["value"] / 2, rel=0.02)
    assert run([str(a) for a in [*call, "--checkpoint", tmp_path]]) == 4


def test_a_largest_value_comes_with_what_its_residual_allows() -> None:
    found = Sharpness(torch.tensor([-1.0, 0.1, 2.0]), torch.tensor([0.5, 0.3, 0.2]), 3, None)
    assert found.largest.interval == pytest.approx((1.8, 2.2))
    assert [n.value for n in found.negative] == [-1.0]
