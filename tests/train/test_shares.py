"""Several threads that share a micro-batch come to the gradient of one, the same bit for bit every time."""

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.models.fast import presumed
from lorakit.train.config_file import loads
from lorakit.train.run import run
from lorakit.train.shares import LARGEST, Team, share_out


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=40), st.integers(1, 8))
def test_every_row_is_in_one_share_and_none_is_much_larger(lengths: list[int], count: int) -> None:
    shares = share_out(lengths, count)
    assert sorted(place for share in shares for place in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares) and 1 <= len(shares) <= count
    totals = [sum(lengths[i] for i in share) for share in shares]
    assert max(totals) * len(shares) <= LARGEST * sum(totals) or len(shares) == 1


@pytest.mark.parametrize(
    ("lengths", "count", "shares"),
    [
        ([5, 5, 5, 5], 2, [[0, 2], [1, 3]]),
        ([9, 1, 1, 1], 2, [[0, 1, 2, 3]]),
        ([8, 4, 4, 1], 2, [[0, 3], [1, 2]]),
        ([6, 6, 6], 4, [[0], [1], [2]]),
        ([7], 3, [[0]]),
        ([10, 10, 1], 3, [[0, 2], [1]]),  # three would not be equal, two are
    ],
)
def test_known_shares(lengths: list[int], count: int, shares: list[list[int]]) -> None:
    assert share_out(lengths, count) == shares


class Network(nn.Module):
    """Two layers, and a parameter that no row reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(2, 2)
        self.b.bias.requires_grad_(False)
        self.threads: set[int] = set()

    def loss(self, rows: Sequence[Tensor]) -> Tensor:
        self.threads.add(threading.get_ident())
        assert torch.get_num_threads() == 1
        return self.b(self.a(torch.stack(list(rows))).tanh()).square().sum()


@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_is_that_of_one_thread(again: bool) -> None:
    torch.manual_seed(0)
    rows, shares = torch.randn(7, 6).double(), [[0, 3], [1, 2, 6], [4, 5]]
    losses, gradients = [], []
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.manual_seed(1)
            model, own = Network().double(), shares if count > 1 else [list(range(7))]
            torch.set_num_threads(count)
            for _ in range(1 + again):  # onto what is there
                losses.append(
                    Team(count).backward(model.loss, [[rows[i] for i in s] for s in own], 5, list(model.parameters()))
                )
            assert torch.get_num_threads() == count
            assert threading.get_ident() in model.threads and (len(model.threads) > 1) == (count > 1)
            gradients.append([p.grad for p in model.parameters()])
    finally:
        torch.set_num_threads(before)
    assert len({round(loss, 10) for loss in losses}) == 1
    for one, several in zip(*gradients, strict=True):
        assert (one is None) == (several is None)
        assert one is None or torch.allclose(one, several, rtol=1e-12, atol=1e-14)
    assert sum(gradient is None for gradient in gradients[1]) == 3  # the frozen bias, and what no row reaches


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_in_any_share_ends_all(bad: int) -> None:
    layer = nn.Linear(3, 1)

    def loss(rows: Sequence[int]) -> Tensor:
        if bad in rows:
            raise ValueError("a bad row")
        return layer(torch.ones(3)).sum()

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="a bad row"):
        Team(2).backward(loss, [[0], [1]], 1, list(layer.parameters()))
    assert layer.weight.grad is None and torch.get_num_threads() == before


def test_a_shared_run_is_the_run(still_model: Path, rows: Callable[..., Path], tmp_path: Path) -> None:
    """But for the rounding of sums; the same bytes whenever it is run again, and when it is interrupted and resumed."""
    data = str(rows(12))

    def trained(name: str, count: int, save_steps: int = 0) -> tuple[list[float], dict[str, Tensor]]:
        settings = {
            "output": str(tmp_path / name),
            "model.name": str(still_model),
            "model.dtype": "float32",
            "data.path": data,
            "data.valid": data,
            "train.batch_size": 4,
            "train.accumulate": 2,
            "train.max_steps": 4,
            "train.save_steps": save_steps,
            "optim.lr": 1e-2,
        }
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            run(loads("", [f"{key}={json.dumps(value)}" for key, value in settings.items()])[0])
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(before)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        file = tmp_path / name / "adapter" / "adapter_model.safetensors"
        return [line.get("loss", line.get("eval_loss")) for line in lines], load_file(file)

    alone, shared, again, saved = trained("one", 1), trained("two", 2), trained("again", 2), trained("saved", 2, 2)
    assert alone[0] == pytest.approx(shared[0], rel=1e-5) and alone[0] != [alone[0][0]] * len(alone[0])
    for key, tensor in alone[1].items():
        torch.testing.assert_close(tensor, shared[1][key], rtol=1e-4, atol=1e-4)
    shutil.rmtree(tmp_path / "saved" / "adapter")
    (newest,) = (tmp_path / "saved" / "checkpoints").glob("*4")
    shutil.rmtree(newest)
    resumed = trained("saved", 2, 2)
    for other in (again, saved, resumed):
        assert other[0][-2:] == shared[0][-2:]
        assert all(torch.equal(tensor, shared[1][key]) for key, tensor in other[1].items())
    assert "shared by up to 2 threads" in (tmp_path / "two" / "log.txt").read_text()


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes, **settings))


def test_what_draws_or_remembers_is_not_shared() -> None:
    assert presumed(lk.attach(llama(), lk.LoRA(r=2))).separable
    assert not presumed(lk.attach(llama(attention_dropout=0.1), lk.LoRA(r=2))).separable
    for name in lk.METHODS:
        if "dropout" in lk.METHODS[name].__dataclass_fields__:
            config = lk.METHODS[name](dropout=0.5)
            model = lk.attach(llama(), config, target_modules=["q_proj", "up_proj"])
            assert not presumed(model).separable, name
    for name in ("vera", "alora", "molora"):
        own = {"invocation_tokens": [3]} if name == "alora" else {}
        model = lk.attach(llama(), lk.METHODS[name](**own), target_modules=["q_proj"])
        assert not presumed(model).separable, name
