"""FLORA: Adafactor whose momentum is kept in a random subspace that changes. Hao, Cao and Mou 2024,
https://arxiv.org/abs/2402.03293; Adafactor is Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235

    U = G / sqrt(V), V factored into row and column means, their decay 1 - t^decay
    step:             O = (1 - beta1) U + beta1 up(M)         W = W - rate · O / max(1, rms(O)/clip)
    every `refresh`:  M = down'(up(M)), and from then on down', up' for down, up
    keep:             M = beta1 M + (1 - beta1) down(U)

    down(X) = P X, up(M) = P^T M with P (rank, rows) if X is wide;  X P^T, M P with P (rank, columns) otherwise
    rate = lr max(1e-3, rms(W)) if scale_parameter, else lr

P is normal with variance 1/rank, so E[P^T P] = I. It is drawn anew from (seed, parameter, number of the refresh)
whenever it is used and never stored: the state of a matrix (n, m) is rank·max(n, m) + n + m numbers, AdamW's is 2 n m.
LoRA with a small rate is this with one P for ever (its A); changing P is what lifts the limit on the rank.

It is an optimizer for weights trained in full. As in the authors' code a matrix is compressed if its short side is at
least `rank` and its long side at most 4 times that, which leaves out embeddings and the factors of a LoRA; the rest is
Adafactor with plain momentum. beta1 is `betas[0]`; at 0 there is no momentum and this is transformers'
`Adafactor(relative_step=False)`. `betas[1]` and `eps` are not used.

The sum of gradients over the micro-batches of a step is compressed too (`Accumulation`, the paper's other use), with
projections of its own, so that it costs rank·max(n, m) numbers between them instead of n m.

When: all weights are to be trained with the least optimizer state, or gradients are accumulated over many
micro-batches. It costs drawing a random matrix a weight and step, and noise that falls with `rank`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..core.errors import UsageError
from ._base import Optimizer
from .groups import Groups, OptimSettings

OTHER_SEED = 0x2545F491  # tells the projections of the sums from those of the momentum
ASPECT = 4  # compressed up to this ratio of the sides
TINY, LEAST_SCALE = 1e-30, 1e-3  # Adafactor's two epsilons
KINDS = ("cpu", "cuda", "mps", "xpu")  # of devices, as numbers in the state: load_state_dict takes texts apart


@dataclass(frozen=True, kw_only=True)
class Options:
    """The compression, and Adafactor's settings.

    rank: dimension of the random subspace
    refresh: steps after which another subspace is taken
    clip: largest root mean square of an update
    decay: exponent of the second moment's decay rate
    scale_parameter: make rates relative to the size of the weights
    compress: compress the sum of the gradients of several micro-batches too
    seed: of the projections
    """

    rank: int = 128
    refresh: int = 1000
    clip: float = 1.0
    decay: float = -0.8
    scale_parameter: bool = True
    compress: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.refresh < 1:
            raise UsageError(f"rank and refresh must be at least 1, not {self.rank} and {self.refresh}")
        if not (self.clip > 0 > self.decay):
            raise UsageError(f"clip must be above 0 and decay below it, not {self.clip} and {self.decay}")


def build(groups: Groups, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer. Raises UsageError if it has momentum and no matrix whose momentum can be compressed."""
    options = Options(**(settings.options or {}))
    shapes = [tuple(p.shape) for group in groups for _, p in group["params"]]
    if settings.betas[0] > 0 and not any(compressible(shape, options.rank) for shape in shapes):
        sides = [min(shape) for shape in shapes if len(shape) == 2 and max(shape) <= ASPECT * min(shape)]
        raise UsageError(
            "optim.name: flora has nothing to compress",
            why=f"no trained matrix that is at most {ASPECT} times as long as wide has a short side of at least "
            f"optim.options.rank = {options.rank}; the longest is {max(sides, default=0)}",
            fix="lower optim.options.rank, or train weights in full: method.modules_to_save",
        )
    return (SummingFlora if options.compress else Flora)(groups, settings, options)


def planned_bytes(groups: Groups, settings: OptimSettings) -> int:
    """Give the bytes of the state that this optimizer will keep between steps."""
    rank = Options(**(settings.options or {})).rank

    def of(p: Tensor) -> int:
        square = p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
        mean = rank * max(p.shape) if compressible(p.shape, rank) else p.numel()
        return (square + (mean if settings.betas[0] > 0 else 0)) * max(p.element_size(), 4)

    return sum(of(p) for group in groups for _, p in group["params"])


def compressible(shape: Sequence[int], rank: int) -> bool:
    """Whether a tensor of this shape is compressed."""
    return len(shape) == 2 and min(shape) >= rank and max(shape) <= ASPECT * min(shape)


def projection(seed: int, index: int, number: int, shape: Sequence[int], rank: int, like: Tensor) -> Tensor:
    """Draw P (rank, short side of `shape`), normal with variance 1/rank: the `number`-th of parameter `index`."""
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + number * 0x94D049BB133111EB) % 2**63
    generator = torch.Generator(like.device).manual_seed(mixed)
    return torch.randn(rank, min(shape), generator=generator, device=like.device, dtype=like.dtype) / math.sqrt(rank)


def down(P: Tensor, X: Tensor) -> Tensor:
    """Compress the short side of X to `rank`."""
    return P @ X if X.shape[0] < X.shape[1] else X @ P.T


def up(P: Tensor, M: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring a compressed matrix back to `shape`."""
    return P.T @ M if shape[0] < shape[1] else M @ P


class Flora(Optimizer):
    """Adafactor with compressed momentum."""

    def __init__(self, groups: Groups, settings: OptimSettings, options: Options) -> None:
        super().__init__(groups, settings)
        self.options = options

    def update(self) -> None:
        """Take one step."""
        members = [(group, p) for group in self.param_groups for p in group["params"]]
        for index, (group, p) in enumerate(members):
            if p.grad is None:
                continue
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            wide = p.to(torch.promote_types(p.dtype, torch.float32))
            scale = max(LEAST_SCALE, _rms(wide)) if self.options.scale_parameter else 1.0
            rate = scale * group["lr"]
            update = _normalised(p.grad.to(wide.dtype), state, self.options.decay)
            if group["betas"][0] > 0:
                update = self._momentum(update, state, group["betas"][0], index)
            update.div_((_rms(update) / self.options.clip).clamp_(min=1.0)).mul_(rate)
            if group["weight_decay"]:
                wide.add_(wide, alpha=float(-group["weight_decay"] * rate))
            p.copy_(wide.add_(-update))

    def _momentum(self, update: Tensor, state: dict[str, Any], beta: float, index: int) -> Tensor:
        """Give the mean that is applied, and take `update` into the one that is kept."""
        rank, shape = self.options.rank, update.shape
        if not compressible(shape, rank):
            mean = state.setdefault("exp_avg", torch.zeros_like(update))
            return mean.copy_(update * (1 - beta) + mean * beta).clone()
        number, last = divmod(state["step"] - 1, self.options.refresh)
        P = projection(self.options.seed, index, number, shape, rank, update)
        mean = state.setdefault("exp_avg", torch.zeros_like(down(P, update)))
        self._check_device(state, update)
        applied = update * (1 - beta) + up(P, mean, shape) * beta
        if last == self.options.refresh - 1:
            old, P = P, projection(self.options.seed, index, number + 1, shape, rank, update)
            mean.copy_(down(P, up(old, mean, shape)))
        mean.copy_(mean * beta + down(P, update) * (1 - beta))
        return applied

    def _check_device(self, state: dict[str, Any], update: Tensor) -> None:
        """The same seed gives other numbers on another kind of device, and the mean would be read with the wrong P."""
        kind = KINDS.index(update.device.type)
        if state.setdefault("drawn_on", kind) != kind:
            before = KINDS[state["drawn_on"]]
            why = f"its momentum was compressed with random numbers that only {before} draws again"
            raise UsageError(
                "flora cannot go on with this state", why=why, fix=f"resume on {before}, or start a new run"
            )


class Accumulation:
    """The sum of gradients over the micro-batches of a step, compressed, for a training loop that calls it:

        loss.backward(); accumulation.take()      after each micro-batch: adds p.grad to the compressed sum and frees it
        accumulation.give(); optimizer.step()     puts the sum back into p.grad; the next step has another projection

    A matrix (n, m) keeps rank·max(n, m) numbers between micro-batches instead of n m; what is not compressible is
    summed as it is. The sum is unbiased: E[P^T P] = I, with a relative variance of (side + 1)/rank. Clipping sees the
    decompressed sum.
    """

    def __init__(self, parameters: Sequence[Tensor], rank: int, seed: int = 0, step: int = 0) -> None:
        """`step`: how many optimizer steps came before, after which the projections follow on."""
        self.parameters, self.rank, self.seed, self.step = list(parameters), rank, seed, step
        self.sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Add each gradient to its sum, and free it."""
        for index, p in enumerate(self.parameters):
            if p.grad is not None:
                fits = compressible(p.shape, self.rank)
                part = down(self._projection(index, p.grad), p.grad) if fits else p.grad
                self.sums[index] = self.sums[index].add_(part) if index in self.sums else part
                p.grad = None

    @torch.no_grad()
    def give(self) -> None:
        """Put the sums into the gradients and begin anew."""
        for index, total in self.sums.items():
            p = self.parameters[index]
            fits = compressible(p.shape, self.rank)
            p.grad = up(self._projection(index, total), total, p.shape) if fits else total
        self.sums = {}
        self.step += 1

    def _projection(self, index: int, like: Tensor) -> Tensor:
        return projection(self.seed, index, self.step, self.parameters[index].shape, self.rank, like)


@final
class SummingFlora(Flora):
    """Flora that also compresses the sum of a step's gradients (`_base.Accumulating`)."""

    def __init__(self, groups: Groups, settings: OptimSettings, options: Options) -> None:
        super().__init__(groups, settings, options)
        parameters = [p for group in self.param_groups for p in group["params"]]
        # Other projections than the momentum's: P compressed by itself again would not be the identity on average.
        self.accumulation = Accumulation(parameters, options.rank, options.seed ^ OTHER_SEED)

    def take(self) -> None:
        """Add the gradients to their compressed sums and free them; the number of the step is in the optimizer's state."""
        self.accumulation.step = max((state.get("step", 0) for state in self.state.values()), default=0)
        self.accumulation.take()

    def give(self) -> None:
        """Put the sums into the gradients."""
        self.accumulation.give()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and their sums."""
        self.accumulation.sums = {}
        super().zero_grad(set_to_none)


def _normalised(gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
    """Give G / sqrt(V), V the running mean of G^2, of matrices only its row and column means."""
    rate = 1.0 - math.pow(state["step"], decay)
    square = gradient**2 + TINY
    if gradient.dim() < 2:
        mean = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
        return mean.mul_(rate).add_(square, alpha=1.0 - rate).rsqrt().mul_(gradient)
    rows = state.setdefault("exp_avg_sq_row", torch.zeros_like(square.mean(dim=-1)))
    columns = state.setdefault("exp_avg_sq_col", torch.zeros_like(square.mean(dim=-2)))
    rows.mul_(rate).add_(square.mean(dim=-1), alpha=1.0 - rate)
    columns.mul_(rate).add_(square.mean(dim=-2), alpha=1.0 - rate)
    of_rows = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return torch.mul(of_rows, columns.unsqueeze(-2).rsqrt()).mul_(gradient)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm(2) / (tensor.numel() ** 0.5)
