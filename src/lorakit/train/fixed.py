"""Micro-batches of a few fixed sizes, for blocks that are compiled and for passes recorded as a CUDA graph.

A GPU computes a small model faster than Python can ask it to: some 6,000 operations a step, 5 to 10 microseconds each. A recorded
pass asks once. It needs the same operations on the same memory every time, so a micro-batch is filled up to the next of a
few sizes (with a document of its own that no loss sees) and copied into that size's buffers; where its documents end
is data (`kernels/documents.py`). Forward, loss and backward pass are one recording for each size. The update is not in it: it is a dozen
operations (fused AdamW, one norm), and the loop promises to look at loss and gradient before anything is changed.

Every size is proved when it is first met: loss and gradient must be those of the ordinary way on the same rows.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import CheckError, UsageError
from ..data.collate import Size, collate_fixed, size_of
from ..data.dataset import Example
from ..kernels.documents import Documents
from ..models.blocks import draws
from ..models.compiled import compiled_blocks
from ..models.fast import Fast
from .controllers import Nothing
from .loop import Job
from .shares import Team, add_gradients
from .task import LanguageModelling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = tuple[Tensor, list[Tensor | None]]
"""A loss, and the gradient of each parameter."""
Recorder = Callable[[Callable[[], Result]], Callable[[], Result]]

TOKEN_SIZES, ROW_SIZES = (
    6,
    3,
)  # at most so many different ones, as long as no later batch is larger than the first epoch's
LOOKED_AT = 1000  # micro-batches from which the sizes are taken
# Relative. Two kernels for attention, each with 16 bits' own error, differ by some percent in the gradient.
_LOSS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Sizes:
    """Sizes that are whole multiples of `steps`."""

    steps: Size

    @classmethod
    def of(cls, batches: Iterable[Sequence[Example]]) -> "Sizes":
        """Choose the steps by the largest of these micro-batches."""
        found = list(map(size_of, batches))
        tokens, rows = max(size.tokens for size in found), max(size.rows for size in found)
        steps = Size(
            _up(math.ceil(tokens / TOKEN_SIZES), 16),
            _up(math.ceil(rows / ROW_SIZES), 16),
            max(size.documents for size in found),
        )
        return cls(steps)

    def fitting(self, size: Size) -> Size:
        """Give the smallest of the sizes that is as large."""
        return Size(*(_up(own, step) for own, step in zip(_parts(size), _parts(self.steps), strict=True)))


def _parts(size: Size) -> tuple[int, int, int]:
    return size.tokens, size.rows, size.documents


def _up(n: int, step: int) -> int:
    return max(step, -(-n // step) * step)


class FixedTeam(Team):
    """A team of one, whose backward pass runs at fixed sizes.

    record: makes of a pass what runs it again; `CudaGraphs` on a GPU, by default the pass itself.
    """

    def __init__(
        self, model: "PreTrainedModel", fast: Fast, sizes: Sizes, record: Recorder = lambda work: work
    ) -> None:
        super().__init__(1)
        self.model, self.fast, self.sizes, self.record = model, fast, sizes, record
        self._passes: dict[Size, _Pass] = {}
        self._memory: list[int] = []

    def backward(
        self,
        loss: Callable[[Sequence[Any]], Tensor],
        shares: Sequence[Sequence[Any]],
        weight: int,
        parameters: Sequence[nn.Parameter],
    ) -> float:
        """Add the gradient of the loss / weight to the parameters' own; give the loss. CheckError if it is not that of `loss`."""
        (rows,) = shares
        trained = [p for p in parameters if p.requires_grad]
        memory = [p.data_ptr() for p in trained]
        if memory != self._memory:  # a recording knows where its parameters lie
            self._passes.clear()
            self._memory = memory
        size = self.sizes.fitting(size_of(rows))
        if size not in self._passes:
            expected = _ordinary(loss(rows), weight, trained)  # first: what it took is free again for the recording
            one = _Pass(self.model, self.fast, size, trained)
            one.fill(rows, weight)
            one.again = self.record(one.run)
            own, gradients = one.again()
            _prove((own, gradients), expected, self.model.dtype)
            self._passes[size] = one
        else:
            self._passes[size].fill(rows, weight)
            own, gradients = self._passes[size].again()
        add_gradients(trained, [gradients])
        return float(own)


def _ordinary(loss: Tensor, weight: int, trained: Sequence[nn.Parameter]) -> Result:
    return loss.detach(), list(torch.autograd.grad(loss / weight, list(trained), allow_unused=True))


def _prove(found: Result, expected: Result, dtype: torch.dtype) -> None:
    """Raise CheckError if a pass did not come to the loss and the gradient that are expected."""
    off, size = 0.0, 0.0
    for one, other in zip(found[1], expected[1], strict=True):
        own, right = (torch.zeros(()) if g is None else g.detach().double().cpu() for g in (one, other))
        off, size = off + float((own - right).square().sum()), size + float(right.square().sum())
    relative = math.sqrt(off / size) if size else off
    away = abs(float(found[0]) - float(expected[0])) / max(abs(float(expected[0])), 1e-9)
    if not (away <= _LOSS[dtype] and relative <= _GRADIENT[dtype]):
        raise CheckError(
            f"a pass of fixed size differs from the ordinary one: loss by {away:.1e}, gradient by {relative:.1e}",
            why="compiled or recorded, the model computes something else on this machine; nothing was updated",
            fix="leave train.compile and train.cuda_graph out",
        )


class _Pass:
    """Forward, loss and backward pass of one size, on buffers of its own."""

    def __init__(self, model: "PreTrainedModel", fast: Fast, size: Size, trained: list[nn.Parameter]) -> None:
        self.model, self.fast, self.size, self.trained = model, fast, size, trained
        self.buffers: dict[str, Tensor] = {}
        self.again: Callable[[], Result] = self.run

    def fill(self, rows: Sequence[Example], weight: int) -> None:
        """Put rows, and what their loss is divided by, into the buffers."""
        new = {**collate_fixed(rows, self.size), "weight": torch.tensor(float(weight))}
        if not self.buffers:
            self.buffers = {name: values.to(self.model.device) for name, values in new.items()}
        for name, values in new.items():
            self.buffers[name].copy_(values)

    def run(self) -> Result:
        """Give the summed loss of what is in the buffers, and the gradient of loss / weight."""
        at = self.buffers
        inputs = {"input_ids": at["input_ids"], "position_ids": at["position_ids"]}
        how: dict[str, Any] = {"lengths": Documents(at["ends"])}
        losses = self.fast.row_losses(self.model, inputs, at["rows"], at["targets"], **how)
        loss = (losses * at["counted"]).sum()
        gradients = torch.autograd.grad(loss / at["weight"], self.trained, allow_unused=True)
        return loss.detach(), list(gradients)


class CudaGraphs:
    """Records passes; all share one pool of memory, since only one runs at a time and what it gives is copied at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Run `work` to warm it up, record it, and give what runs it again."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose their kernels and take their memory now
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                loss, gradients = work()
        except RuntimeError as error:
            raise UsageError(
                "the pass cannot be recorded as a CUDA graph", why=str(error), fix="leave train.cuda_graph out"
            ) from error

        def again() -> Result:
            graph.replay()
            return loss, _copied(gradients)  # the next run writes over them

        return again


def _copied(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    there = [tensor for tensor in tensors if tensor is not None]
    copies = iter(cast(Sequence[Tensor], torch._foreach_mul(there, 1.0)) if there else ())
    return [None if tensor is None else next(copies) for tensor in tensors]


@contextmanager
def fixed_sizes(job: Job, *, compile: bool, cuda_graph: bool) -> Generator[str]:
    """Let a job's micro-batches run at fixed sizes, inside the block of `with`; give what to say of it.

    compile: by compiled blocks; cuda_graph: as recorded passes. UsageError where a pass is not the same operations every time.
    """
    task, model = job.task, cast(Any, job.model)
    why = _why_not(job, cuda_graph)
    if why is not None:
        keys = " and ".join(f"train.{key}" for key, on in (("compile", compile), ("cuda_graph", cuda_graph)) if on)
        raise UsageError(f"{keys} cannot be used here", why=why, fix="leave it out; the run is the same without it")
    assert isinstance(task, LanguageModelling)
    with ExitStack() as opened:
        words = []
        if compile:
            words.append(f"{opened.enter_context(compiled_blocks(model))} blocks compiled")
        if cuda_graph:
            words.append("passes recorded as CUDA graphs")
        job.team = FixedTeam(model, task.fast, Sizes.of(_first_rows(job)), *([CudaGraphs()] if cuda_graph else []))
        step = job.team.sizes.steps.tokens
        yield f"{' and '.join(words)}, at sizes of {step}, {2 * step}, {3 * step} ... tokens"


def _first_rows(job: Job) -> list[list[Example]]:
    batches = (batch for step in range(job.steps.starts[1]) for batch in job.steps[step].batches)
    return [[job.examples[i] for i in batch] for batch in islice(batches, LOOKED_AT)]


def _why_not(job: Job, cuda_graph: bool) -> str | None:
    """Say why passes of a job cannot be the same operations every time."""
    model, task = cast(Any, job.model), job.task
    if not isinstance(task, LanguageModelling) or not task.fast.rows:
        return "only causal models of the Llama family with a frozen head can pack their rows into a fixed size"
    if draws(model):
        return "dropout draws new random numbers in every pass"
    if not isinstance(job.controller, Nothing):
        return "the run's controller changes the adapter on the way"
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        return "activations are recomputed (train.checkpointing)"
    if task.prefix is not None:
        return "the lowest blocks do not run in every epoch (train.cache_prefix)"
    if cuda_graph and model.device.type != "cuda":
        return f"the model is on {model.device.type}, and CUDA graphs run on NVIDIA GPUs"
    return None
