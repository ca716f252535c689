"""Triton's operations on a machine that may have no GPU: agreement in the interpreter, compilation by the bundled assembler.

`test_choice.py` has the choice between them and torch's.
"""

import os
import subprocess
import sys
from pathlib import Path

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
        trials.rotation(place, 9, hidden // 18 * 2),
        trials.softmax(place, 49152),
    ]


def test_every_kernel_agrees_with_its_twin_in_the_interpreter() -> None:
    """In a process of its own: triton looks at TRITON_INTERPRET when it is imported."""
    file = Path(__file__).with_name("interpreted_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


class NoGPU:
    """What triton asks of a driver in order to compile a launch. A device is its compute capability."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.get_current_device = lambda: capability
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, torch.bfloat16), (80, torch.float16), (90, torch.bfloat16), (90, torch.float32)]
)
def test_every_kernel_compiles_for_a_gpu(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The operations run as in training, and triton does all that it does of a launch but the launch itself."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    offered, run, made = choice.triton_kernels(), JITFunction.run, []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGPU(capability))
    monkeypatch.setattr(JITFunction, "run", lambda *a, warmup, **how: made.append(run(*a, warmup=True, **how)))
    for trial in trials_of(trials.Place(torch.device("cpu"), dtype, rows=3)):
        trial.run(getattr(offered, trial.name), trial.make())
    both = ["_norm_forward", "_norm_backward"] * 2 + ["_gate_forward", "_gate_backward"] * 2
    assert [kernel.name for kernel in made] == [*both, "_rotate", "_rotate", "_softmax"]
    for kernel in made:
        assert f".target sm_{capability}" in kernel.asm["ptx"] and kernel.asm["cubin"][:4] == b"\x7fELF"


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
