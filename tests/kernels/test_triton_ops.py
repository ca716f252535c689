"""Triton's operations on a machine that may have no GPU: agreement in the interpreter, compilation by the bundled assembler.

`test_choice.py` has the choice between them and torch's.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.kernels import choice, cross_entropy, trials
from lorakit.kernels.choice import PLAIN, Trial
from lorakit.kernels.gated import GELU_TANH, SILU

triton = pytest.importorskip("triton", exc_type=ImportError)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trials_of(place: trials.Place, hidden: int = 576) -> list[Trial]:
    """A model's four operations, and the forms of other families."""
    return [
        trials.norm(place, hidden, wide=False),
        trials.norm(place, hidden, wide=True),
        trials.gate(place, 3 * hidden, SILU),
        trials.gate(place, 3 * hidden, GELU_TANH),
        trials.rotation(place, 9, hidden // 9),
        trials.softmax(place, 49152),
    ]


def test_every_kernel_agrees_with_its_twin_in_the_interpreter() -> None:
    """In a process of its own: triton looks at TRITON_INTERPRET when it is imported."""
    file = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> list[Launch]:
    """Give what the operations launch, without running it: so the signatures are those of training."""
    from triton.runtime.jit import JITFunction

    seen: list[Launch] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *a, grid, warmup, **how: seen.append((kernel, a, how)))
    offered = choice.triton_kernels()
    for trial in trials_of(trials.Place(torch.device("cpu"), dtype, rows=3)):
        trial.run(getattr(offered, trial.name), trial.make())
    return seen


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def kind(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i64" if abs(argument) >= 2**31 else "i32"


def compiled(launch: Launch, target: Any) -> Any:
    """Compile as a launch would: pointers and numbers that 16 divides are known to be so, a number that is 1 is a constant."""
    from triton.compiler import ASTSource

    kernel, arguments, how = launch
    options = {name: value for name, value in how.items() if name not in kernel.arg_names}
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    constants = {name: value for name, value in how.items() if name not in options}
    ones = {name: 1 for name, value in given.items() if isinstance(value, int) and value == 1}
    signature = {name: kind(value) for name, value in given.items()} | dict.fromkeys({**constants, **ones}, "constexpr")
    even = [
        name
        for name, value in given.items()
        if isinstance(value, Tensor) or (isinstance(value, int) and not value % 16)
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, {**constants, **ones}, attributes)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.bfloat16), (80, torch.float16), (90, torch.bfloat16), (90, torch.float32)]
)
def test_every_kernel_compiles_for_a_gpu(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = launches(monkeypatch, dtype)
    assert {launch[0].__name__ for launch in seen} == {
        "_norm_forward", "_norm_backward", "_gate_forward", "_gate_backward", "_rotate", "_softmax",
    }  # fmt: skip
    assert len(seen) == 11  # two forms of norm and gate, forward and back; the rotation both ways; the softmax
    for launch in seen:
        made = compiled(launch, GPUTarget("cuda", capability, 32))
        assert f".target sm_{capability}" in made.asm["ptx"] and made.asm["cubin"][:4] == b"\x7fELF"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [576, 4096, 1161])
def test_on_a_gpu_every_kernel_is_right(hidden: int, dtype: torch.dtype) -> None:
    offered = choice.triton_kernels()
    for trial in trials_of(trials.Place(torch.device("cuda"), dtype), hidden):
        assert choice.agrees(trial, getattr(offered, trial.name), getattr(PLAIN, trial.name)), trial.name


@pytest.mark.gpu
def test_on_a_gpu_one_is_chosen_by_its_time() -> None:
    chosen = choice.choose(trials_of(trials.Place(torch.device("cuda"), torch.bfloat16), 4096))
    print(chosen.words)
    assert "Error" not in chosen.words and "agree" not in chosen.words


@pytest.mark.gpu
@pytest.mark.parametrize("own", [False, True], ids=["torch", "triton"])
def test_on_a_gpu_the_loss_can_be_recorded_in_a_graph(own: bool) -> None:
    """Recording refuses whatever waits for the device."""
    h, weight = (torch.randn(n, 64, device="cuda") for n in (300, 1000))
    targets = torch.arange(300, device="cuda")
    softmax = choice.triton_kernels().softmax if own else cross_entropy.WHOLE
    h.requires_grad_()

    def step() -> list[Tensor]:
        losses = cross_entropy.row_losses(h, weight, targets, softmax)
        return [losses, *torch.autograd.grad(losses.sum(), h)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, and lets the libraries find their memory
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for a, b in zip(found, step(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
