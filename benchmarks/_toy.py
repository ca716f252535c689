"""The problem of `methods_toy.py`, one training run on it, and what the best possible result is.

A layer W (32, 32) is to become W + D, with D of known singular values and random vectors. The inputs have mean zero and
covariance C exactly (they are whitened), so that for a layer that stays linear the loss is tr((D - ΔW) C (D - ΔW)^T) plus the
square of what was added to the bias: no noise, and the least value is known wherever linear algebra knows it.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.chain import Chain
from lorakit.core.errors import UsageError
from lorakit.core.start import needs
from lorakit.core.statistics import Statistics
from lorakit.optim import OPTIMIZERS, parameter_groups, scale_learning_rates, schedule, state_bytes
from lorakit.optim.schedules import warmup_steps
from lorakit.train.config import OptimConfig
from lorakit.train.controllers import CONTROLLERS, Controller, Nothing, Run, brought

SIDE, ROWS, TOKENS = 32, 16, 16
SPECTRUM = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
PLANTED = ((1.0,), (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1))
"""The same eight values on two layers, of ranks 1 and 7."""
SMALLEST = 0.01
"""Singular values above this share of the largest count for the rank; the teacher's smallest is 0.1."""
WARMUP = 0.03
EXPERT_RANK = 4
"""Of the two LoRAs that a mixture of trained adapters is made of."""


@dataclass(frozen=True)
class Arm:
    """What is compared: a method with its optimizer and controller. `spectra`: the singular values of D, layer by layer."""

    kind: str
    name: str
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    controller: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the controller."""
    spectra: Sequence[Sequence[float]] = (SPECTRUM,)
    isotropic: bool = True

    def build(self) -> lk.Method:
        """Make the method. Raises UsageError if it refuses its sizes here."""
        return lk.METHODS[self.method](**self.options)


class Layers(nn.Module):
    """Linear layers side by side on the same input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Give all outputs, one after the other."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


class Problem:
    """Inputs, a base and a teacher, all from one seed."""

    def __init__(self, arm: Arm, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.teacher = Layers(len(arm.spectra)), Layers(len(arm.spectra))
        self.teacher.load_state_dict(self.model.state_dict())
        for layer, spectrum in zip(self.teacher.layers, arm.spectra, strict=True):
            U, V = (torch.linalg.qr(torch.randn(SIDE, len(spectrum)))[0] for _ in range(2))
            layer.weight.data += U @ torch.diag(torch.tensor(spectrum)) @ V.T
        spread = torch.ones(SIDE) if arm.isotropic else torch.logspace(0.5, -0.5, SIDE)
        Q = torch.linalg.qr(torch.randn(SIDE, SIDE))[0]
        self.root = Q @ torch.diag(spread) @ Q.T  # of the covariance
        self.x, self.fresh = self.inputs(), self.inputs()
        with torch.no_grad():
            self.y, self.fresh_y = self.teacher(self.x), self.teacher(self.fresh)

    def inputs(self) -> Tensor:
        """Draw rows of tokens whose mean is zero and whose covariance is exactly root^2: (ROWS, TOKENS, SIDE)."""
        x = torch.randn(ROWS * TOKENS, SIDE, dtype=torch.float64)
        x -= x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x), upper=True))
        return (x.float() @ self.root).reshape(ROWS, TOKENS, SIDE)

    def loss(self, model: nn.Module) -> Tensor:
        """Give the mean squared distance from the teacher's outputs."""
        return (model(self.x) - self.y).square().sum(-1).mean()

    @torch.no_grad()
    def error(self) -> float:
        """Give the same on inputs that were not trained on."""
        return float((self.model.eval()(self.fresh) - self.fresh_y).square().sum(-1).mean())

    def change(self, index: int) -> Tensor:
        """Give D of a layer: what its stored matrix lacks to the teacher's."""
        matrix = self.model.layers[index].matrix()
        return (self.teacher.layers[index].weight - matrix).detach().double()


@dataclass
class Outcome:
    """One run."""

    error: float
    optimum: float | None
    trainable: int
    state_bytes: int
    ranks: list[int] | None
    """Numerical rank of the change, layer by layer."""
    merged_error: float | None


def attach(problem: Problem, method: lk.Method) -> None:
    """Attach the method, with what it needs to know of the layers."""
    wanted, statistics = needs(method), None
    if "experts" in wanted:
        both = zip(problem.teacher.layers, problem.model.layers, strict=True)
        statistics = {f"layers.{i}": experts(new.weight - old.weight) for i, (new, old) in enumerate(both)}
    elif "residual" in wanted:
        statistics = lk.quantize(problem.model, "nf4", method)
    elif wanted:
        statistics = lk.calibrate(problem.model, method, [problem.x], lambda model, _: problem.loss(model))
    lk.attach(problem.model, method, statistics=statistics)


@torch.no_grad()
def experts(D: Tensor) -> Statistics:
    """Give the two halves of D's singular values as LoRAs that were trained before, and trained well."""
    U, S, Vh = torch.linalg.svd(D)
    r = EXPERT_RANK
    halves = [slice(0, r), slice(r, 2 * r)]
    return Statistics(experts=(torch.stack([Vh[h] for h in halves]), torch.stack([U[:, h] * S[h] for h in halves])))


def controller(arm: Arm, run: Run) -> Controller:
    """Start the arm's controller, or the one its method brings along."""
    names = [arm.controller] if arm.controller else brought(arm.build())
    return CONTROLLERS[names[0]](**arm.settings).start(run) if names else Nothing(run)


def train(arm: Arm, lr: float, seed: int, steps: int) -> Outcome:
    """Train one arm with one rate from one seed. A loss that is not finite is an infinite error."""
    problem, config = Problem(arm, seed), OptimConfig(lr=lr, clip=None, warmup=WARMUP, **arm.optim)
    attach(problem, arm.build())
    multiplier, warm = schedule(config.schedule, steps, WARMUP), warmup_steps(steps, WARMUP)
    driven = controller(arm, Run(problem.model, "default", steps, multiplier, warm, seed))
    optimizer = OPTIMIZERS[config.name](parameter_groups(problem.model, "default", config), config)
    trainable = lk.summary(problem.model).trainable
    problem.model.train()
    for step in range(steps):
        scale_learning_rates(optimizer, driven.schedule(step))
        loss = problem.loss(problem.model)
        if not math.isfinite(loss.item()):
            return Outcome(math.inf, None, trainable, 0, None, None)
        penalty = driven.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        driven.after_update(step, optimizer)
        optimizer.zero_grad(set_to_none=True)
    error = problem.error()
    ranks, merged = after_merging(problem)
    return Outcome(
        error if math.isfinite(error) else math.inf, optimum(problem), trainable, state_bytes(optimizer), ranks, merged
    )


def after_merging(problem: Problem) -> tuple[list[int] | None, float | None]:
    """Give the numerical ranks of the change, and how far the merged model is from the adapted one, relatively."""
    model, before = problem.model, [layer.matrix().clone() for layer in problem.model.layers]
    with torch.no_grad():
        y = model(problem.fresh)
        try:
            lk.merge(model)
        except UsageError:
            return None, None
        gap = float((model(problem.fresh) - y).abs().max() / y.abs().max())
        values = [torch.linalg.svdvals(layer.matrix() - W) for layer, W in zip(model.layers, before, strict=True)]
    lk.unmerge(model)
    largest = max(float(v.max()) for v in values)
    return [int((v > SMALLEST * largest).sum()) for v in values], gap


def optimum(problem: Problem) -> float | None:
    """Give the least error that any values of what was trained can have, or None where there is no closed form.

    Least squares if the weight is affine in what is trained; the tail of the singular values (Eckart and Young) if the
    change is one product s·B·A, a chain of such products, or a number of triplets shared by the layers; the nearest
    Kronecker product and the nearest rotation of blocks (`kronecker`, `procrustes`).
    """
    found = [adapter for _, _, adapter in lk.adapters(problem.model)]
    if all("experts" in needs(a.config) for a in found):
        return 0.0  # they add up to the teacher
    if not all(isinstance(a, lk.AbstractAdapter) and a.mergeable() for a in found):
        return None
    budget = vars(found[0].config).get("target_r")
    if budget is not None:
        values = torch.cat([torch.linalg.svdvals(problem.change(i) @ problem.root.double()) for i in range(len(found))])
        return float(values.square().sort(descending=True).values[budget * len(found) :].sum())
    each = [_layer_optimum(problem, index, adapter) for index, adapter in enumerate(found)]
    return None if None in each else sum(e for e in each if e is not None)


def _layer_optimum(problem: Problem, index: int, adapter: nn.Module) -> float | None:
    root, D = problem.root.double(), problem.change(index)
    base = problem.model.layers[index]
    affine = least_squares(adapter, base.matrix().double(), base.bias.double(), D, root)
    if affine is not None:
        return affine
    if not torch.allclose(root, torch.eye(SIDE, dtype=root.dtype), atol=1e-5):
        pass  # what follows is known for isotropic inputs only
    elif isinstance(adapter.config, lk.OFT):
        return procrustes(base.matrix().double(), D, adapter.config.oft_block_size)
    elif set(adapter.state_dict()) == {"lokr_w1", "lokr_w2"}:
        return kronecker(D, adapter.get_parameter("lokr_w1").shape, adapter.get_parameter("lokr_w2").shape)
    if isinstance(adapter, Chain):
        A, B = adapter.frozen_A.double(), adapter.frozen_B.double()
        r, live = len(adapter.factors()[0]), adapter.live
        if adapter.start_off:  # what is taken off stays: the live product may be anything of rank r
            D = D - float(adapter.scale) * (B @ A).detach()
        else:  # each link was free once
            r += len(A)
    else:
        r, live = int(vars(adapter.config).get("r") or 0), adapter
    if not is_product(live):
        return None
    return float(torch.linalg.svdvals(D @ root)[r:].square().sum())


def is_product(adapter: nn.Module) -> bool:
    """Whether the change is s·B·A with both factors trained, and nothing else."""
    if set(adapter.state_dict()) != {"lora_A", "lora_B"} or not isinstance(adapter, lk.AdditiveAdapter):
        return False
    A, B = adapter.get_parameter("lora_A"), adapter.get_parameter("lora_B")
    scale = dict(adapter.named_buffers()).get("scale")
    return scale is not None and torch.allclose(adapter.delta_weight(), scale * B @ A, rtol=1e-4, atol=1e-6)


def kronecker(D: Tensor, left: Sequence[int], right: Sequence[int]) -> float:
    """Give min ‖D - kron(w1, w2)‖² over matrices of these shapes: D rearranged so that the product is one of rank 1.

    Van Loan and Pitsianis 1993.
    """
    blocks = D.reshape(left[0], right[0], left[1], right[1]).permute(0, 2, 1, 3)
    return float(torch.linalg.svdvals(blocks.reshape(left[0] * left[1], -1))[1:].square().sum())


def procrustes(W: Tensor, D: Tensor, size: int) -> float:
    """Give min ‖W blockdiag(R_i)^T - W - D‖² over rotations R_i of `size` inputs each.

    Of each block it is ‖W_i‖² + ‖W_i + D_i‖² minus twice the singular values of W_i^T (W_i + D_i) added up, the last one
    taken off if their product of signs says that the best orthogonal matrix is no rotation (Schönemann 1966).
    """
    total = 0.0
    for own, wanted in zip(W.split(size, dim=1), (W + D).split(size, dim=1), strict=True):
        product = own.T @ wanted
        values = torch.linalg.svdvals(product)
        values[-1] *= torch.linalg.det(product).sign()
        total += float(own.square().sum() + wanted.square().sum() - 2 * values.sum())
    return total


@torch.no_grad()
def least_squares(adapter: nn.Module, W: Tensor, bias: Tensor, D: Tensor, root: Tensor) -> float | None:
    """Give min ‖(D - ΔW) root‖² + ‖Δb‖² over what is trained, if W' and b' are affine in it; else None."""
    wide = copy.deepcopy(adapter).double()
    trained = [new for new, old in zip(wide.parameters(), adapter.parameters(), strict=True) if old.requires_grad]
    size = sum(p.numel() for p in trained)

    def change(values: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(values, trained)
        return torch.cat([((wide.merge(W) - W) @ root).flatten(), wide.merge_bias(bias) - bias])

    if size > SIDE * SIDE + SIDE:
        return None
    zero = torch.zeros(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    start = change(zero)
    bent = change(a + b) - change(a) - change(b) + start
    if not bool(torch.isfinite(bent).all()) or bent.norm() > 1e-6 * (change(a) - start).norm():
        return None
    J = torch.stack([change(row) - start for row in torch.eye(size, dtype=torch.float64)], dim=1)
    missing = torch.cat([(D @ root).flatten(), torch.zeros(SIDE, dtype=torch.float64)]) - start
    best = torch.linalg.lstsq(J, missing[:, None], driver="gelsd").solution
    return float((missing - (J @ best)[:, 0]).square().sum())


def sized(arm: Arm, sizes: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> Arm:
    """Give the arm's method the sizes of this study: its own if it has some, or those of its fields that are known.

    A size that is 0 or None by itself (OFT's number of blocks) is one that the method finds.
    """
    known = {f.name: sizes[f.name] for f in fields(lk.METHODS[arm.method]) if f.name in sizes and f.default}
    return replace(arm, options={**own.get(arm.method, known), **arm.options})
