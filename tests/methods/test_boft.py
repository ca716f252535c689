"""BOFT against its closed forms, against OFT, and against PEFT's layers with a stand-in for its CUDA extension."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import UsageError

from .oracle import Twins
from .problem import close, perturb

BOFT = lk.METHODS["boft"]


class BlockDiagonal:
    """What PEFT's CUDA extension computes: (m, n, b, b) to (m, n b, n b), and back for the gradient."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        _, n, b, _ = blocks.shape
        cut = gradient.unflatten(1, (n, b)).unflatten(3, (n, b))
        return [cut.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)


def linear(inner: int = 16, out: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inner, out).double()


def adapted(layer: nn.Module, method: lk.Method) -> tuple[nn.Module, lk.AbstractAdapter]:
    model = lk.attach(nn.Sequential(layer), method, target_modules=["0"])
    perturb(model[0].adapters)
    ((_, _, adapter),) = lk.adapters(model)
    return model, adapter


def rotation(adapter: lk.AbstractAdapter, n: int) -> Tensor:
    """R = F_m .. F_1 for y = x R with dense matrices; the permutation of a factor is written out index by index."""
    R = torch.eye(n).double()
    for i, blocks in enumerate(adapter.blocks().detach()):
        half, group = blocks.shape[-1] // 2, blocks.shape[-1] * 2**i
        order = []
        for first in range(0, n, group):
            chunks = [list(range(c, c + half)) for c in range(first, first + group, half)]
            order += [index for chunk in chunks[0::2] + chunks[1::2] for index in chunk]
        P = torch.eye(n).double()[order]
        R = P @ torch.block_diag(*blocks) @ P.T @ R
    return R


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_the_change_is_a_product_of_permuted_block_rotations(factors: int) -> None:
    model, adapter = adapted(linear(), BOFT(boft_block_size=4, boft_n_butterfly_factor=factors))
    R = rotation(adapter, 16)
    close(R @ R.T, torch.eye(16).double(), 1e-13)
    W, x, s = model[0].weight.detach(), torch.randn(5, 16).double(), adapter.boft_s.detach()
    close(adapter.merge(W), s * (W @ R.T))
    close(model(x), (x @ R @ W.T) * s.T + model[0].bias)


@pytest.mark.parametrize(("factors", "met"), [(1, 4), (2, 8), (3, 16)])
def test_each_factor_doubles_the_inputs_that_meet(factors: int, met: int) -> None:
    _, adapter = adapted(linear(), BOFT(boft_block_size=4, boft_n_butterfly_factor=factors))
    assert ((rotation(adapter, 16).abs() > 1e-9).sum(0) == met).all()
    assert adapter.boft_R.numel() == factors * 4 * 16


def test_one_factor_is_oft() -> None:
    oft = lk.METHODS["oft"](oft_block_size=4)
    W = linear().weight.detach()
    _, other = adapted(linear(), oft)
    _, adapter = adapted(linear(), BOFT(boft_block_size=4))
    with torch.no_grad():
        Q = torch.zeros(4, 4, 4).double()
        upper = torch.triu_indices(4, 4, 1)
        Q[:, upper[0], upper[1]] = 2 * other.oft_R  # BOFT halves T - T^T
        adapter.boft_R.copy_(Q[None] + 0.3 * torch.eye(4))  # what is symmetric in T does nothing
        adapter.boft_s.fill_(1)
    close(adapter.merge(W), other.merge(W), 1e-14)


def test_lengths_are_s_and_angles_stay() -> None:
    _, adapter = adapted(linear(), BOFT(boft_block_size=4, boft_n_butterfly_factor=2))
    W, s = linear().weight.detach(), adapter.boft_s.detach()
    merged = adapter.merge(W).detach()
    close(merged @ merged.T, s * (W @ W.T) * s.T, 1e-13)


@pytest.mark.parametrize("factors", [1, 3])
def test_it_starts_at_the_base_to_the_last_bit(factors: int) -> None:
    layer, x = linear(), torch.randn(5, 16).double()
    before = layer(x)
    model = lk.attach(nn.Sequential(layer), BOFT(boft_n_butterfly_factor=factors), target_modules=["0"])
    assert torch.equal(model(x), before)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("settings", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 8}])
def test_against_pefts_layer(factors: int, settings: dict[str, int]) -> None:
    settings = {**settings, "boft_n_butterfly_factor": factors}
    config = peft.BOFTConfig(**settings)
    Twins(linear(), BOFT(**settings), config).agree(torch.randn(3, 5, 16).double(), 1e-12)
    Twins(linear().float(), BOFT(**settings), config).agree(torch.randn(3, 5, 16), 2e-5)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("factors", [1, 2])
def test_against_pefts_convolution(factors: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
    settings = {"boft_block_size": 6, "boft_n_butterfly_factor": factors}
    Twins(layer, BOFT(**settings), peft.BOFTConfig(**settings)).agree(torch.randn(2, 4, 7, 7).double(), 1e-12)


@pytest.mark.usefixtures("extension")
def test_a_directory_with_several_factors_goes_both_ways(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 6))

    model = lk.attach(network(), BOFT(boft_n_butterfly_factor=2))
    perturb(model[0].adapters)
    lk.save(model, tmp_path / "a")
    x = torch.randn(5, 16)
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path / "a"))
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)
    theirs.save_pretrained(tmp_path / "b")
    assert torch.equal(lk.load(network(), tmp_path / "b")(x), model(x))


def test_dropout_makes_blocks_of_one_factor_the_identity() -> None:
    settings = {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "boft_dropout": 0.5}
    model, adapter = adapted(linear(), BOFT(**settings))
    model.eval()
    whole, one = adapter.blocks(), torch.eye(2).double()
    assert torch.equal(adapter.dropout(whole), whole)
    model.train()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        dropped = adapter.dropout(whole)
        off = (dropped == one).flatten(2).all(-1)
        assert torch.equal(dropped[~off], whole[~off])
        seen.add(tuple(off.sum(1).tolist()))
    assert seen == {(4, 0), (0, 4)}
    W = model[0].weight
    assert torch.equal(adapter.merge(W), adapter.eval().merge(W))


@pytest.mark.parametrize(
    "bad",
    [
        {"boft_block_num": 2},
        {"boft_block_size": 0},
        {"boft_block_size": 1},
        {"boft_n_butterfly_factor": 0},
        {"boft_dropout": 1.0},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        BOFT(**bad)


@pytest.mark.parametrize(
    "settings",
    [
        {"boft_block_size": 3, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 5},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 4},
        {"boft_block_size": 0, "boft_block_num": 16},
    ],
)
def test_layers_that_cannot_be_cut_are_refused_as_in_peft(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="features"):
        lk.attach(nn.Sequential(linear()), BOFT(**settings))
