"""Micro-batches of a few fixed sizes, for blocks that are compiled and for passes recorded as a CUDA graph.

A GPU computes a small model faster than Python can ask it to: some 6,000 operations a step, 5 to 10 microseconds each. A recorded
pass asks once. It needs the same operations on the same memory every time, so a micro-batch is filled up to the next of a
few sizes (with a document of its own that no loss sees) and copied into that size's buffers; where its documents end
is data (`kernels/documents.py`). Forward, loss and backward pass are one recording for each size. The update is not in it: it is a dozen
operations (fused AdamW, one norm), and the loop promises to look at loss and gradient before anything is changed.

All sizes of the first epoch are made at the first step, the largest first, so that the others fit into the memory that it took. Each
is proved: recorded on one row, it must come to the loss and the gradient of the ordinary way on a whole micro-batch.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import CheckError, ResourceError, UsageError
from ..data.collate import Size, collate_fixed, size_of
from ..data.dataset import Example
from ..kernels.documents import Documents, varlen_kernel
from ..models.blocks import draws
from ..models.compiled import compiled_blocks
from ..models.fast import Fast
from .controllers import Nothing
from .diagnostics import Nothing as NotWatching
from .loop import Job
from .shares import Team, add_gradients
from .task import LanguageModelling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = tuple[Tensor, list[Tensor | None]]
"""A loss, and the gradient of each parameter."""
Recorder = Callable[[Callable[[], Result]], Callable[[], Result]]

TOKEN_SIZES, ROW_STEPS = 6, 8  # as long as no later micro-batch is larger than those of the first epoch
LOOKED_AT = 1000  # micro-batches from which the sizes are taken
# Relative. Two kernels for attention, each with 16 bits' own error, differ by some percent in the gradient.
_LOSS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_GRADIENT = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.15}


class Sizes:
    """A few numbers of tokens; for each the most predicted positions and documents that a micro-batch of so many tokens has.

    examples: a micro-batch of each size, the largest first
    """

    def __init__(self, batches: Iterable[Sequence[Example]]) -> None:
        found = [(size_of(rows), rows) for rows in batches]
        self.tokens = _up(math.ceil(max(size.tokens for size, _ in found) / TOKEN_SIZES), 16)
        self._rows = _up(math.ceil(max(size.rows for size, _ in found) / ROW_STEPS), 16)
        self._largest: dict[int, Size] = {}
        for size, _ in found:
            own = self.fitting(size)
            self._largest[own.tokens] = own
        by_size = {self.fitting(size): rows for size, rows in found}
        self.examples = dict(sorted(by_size.items(), reverse=True))

    def fitting(self, size: Size) -> Size:
        """Give a size that is as large, with room for a document that is empty: what follows the last one is always tried."""
        tokens, rows, documents = _up(size.tokens, self.tokens), _up(size.rows, self._rows), _up(size.documents + 1, 8)
        known = self._largest.get(tokens, Size(tokens, 0, 0))
        return Size(tokens, max(rows, known.rows), max(documents, known.documents))


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
        self._require_same(trained)
        size = self.sizes.fitting(size_of(rows))
        for own, example in () if self._passes else self.sizes.examples.items():
            self._make(own, example, loss, trained)
        if size not in self._passes and not self._make(size, rows, loss, trained):
            return super().backward(loss, shares, weight, parameters)  # not finite: the loop says so
        one = self._passes[size]
        one.fill(rows, weight)
        total, gradients = one.again()
        add_gradients(trained, [gradients])
        return float(total)

    def _require_same(self, trained: Sequence[nn.Parameter]) -> None:
        """Raise CheckError if what is trained lies elsewhere than before: a recording would train what is there no more."""
        memory = [p.data_ptr() for p in trained]
        if self._passes and memory != self._memory:
            raise CheckError(
                "what is trained has been replaced during the run",
                why="passes of fixed size were made for the parameters as they were",
                fix="leave train.compile and train.cuda_graph out",
            )
        self._memory = memory

    def _make(
        self,
        size: Size,
        rows: Sequence[Example],
        loss: Callable[[Sequence[Any]], Tensor],
        trained: Sequence[nn.Parameter],
    ) -> bool:
        """Make the pass of a size and prove it on rows; False, and nothing, if their loss is not finite."""
        weight = max(1, size_of(rows).rows)
        expected = _ordinary(loss(rows), weight, trained)  # first: what it took is free again for the recording
        if not math.isfinite(float(expected[0])):
            return False
        one = _Pass(self.model, self.fast, size, list(trained))
        one.fill(rows[-1:], 1)  # not what it is proved on: what a recording took from its rows would be right by chance
        one.again = self.record(one.run)
        one.fill(rows, weight)
        _prove(one.again(), expected, self.model.dtype)
        self._passes[size] = one
        return True


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
        self._kernel = varlen_kernel()

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
        how: dict[str, Any] = {"lengths": Documents(at["ends"], self._kernel)}
        losses = self.fast.row_losses(self.model, inputs, at["rows"], at["targets"], **how)
        loss = (losses * at["counted"]).sum()
        gradients = torch.autograd.grad(loss / at["weight"], self.trained, allow_unused=True)
        return loss.detach(), list(gradients)


class CudaGraphs:
    """Records passes. One stream, one pool of memory, one place for the gradient: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._gradients: list[Tensor | None] = []

    def __call__(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Run `work` to warm it up, record it, and give what runs it again."""
        try:
            self._warm_up(work)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss, gradients = work()
                torch._foreach_copy_(_there(self._gradients), _there(gradients))
                del gradients
        except torch.OutOfMemoryError as error:
            fix = "leave train.cuda_graph out, or use a smaller train.batch_size or train.batch_tokens"
            raise ResourceError("the GPU has no room for a recorded pass", why=str(error), fix=fix) from error
        except RuntimeError as error:
            fix = "leave train.cuda_graph out"
            raise UsageError("the pass cannot be recorded as a CUDA graph", why=str(error), fix=fix) from error

        def again() -> Result:
            graph.replay()
            copies = iter(cast(Sequence[Tensor], torch._foreach_mul(_there(self._gradients), 1.0)))
            return loss, [None if g is None else next(copies) for g in self._gradients]  # the next run writes over them

        return again

    def _warm_up(self, work: Callable[[], Result]) -> None:
        """Let libraries choose their kernels and take their memory."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                gradients = work()[1]
        torch.cuda.current_stream().wait_stream(self._stream)
        if not self._gradients:
            self._gradients = [None if g is None else torch.empty_like(g) for g in gradients]


def _there(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


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
        job.team = FixedTeam(model, task.fast, Sizes(_first_rows(job)), *([CudaGraphs()] if cuda_graph else []))
        step = job.team.sizes.tokens
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
    if not isinstance(job.diagnostics, NotWatching):
        return "train.diagnose compares losses of the ordinary way with those of the run, which differ by rounding"
    if task.prefix is not None:
        return "the lowest blocks do not run in every epoch (train.cache_prefix)"
    if cuda_graph and model.device.type != "cuda":
        return f"the model is on {model.device.type}, and CUDA graphs run on NVIDIA GPUs"
    return None
