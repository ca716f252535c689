"""OFT against its closed forms and against PEFT's layers."""

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import FileError, UsageError

from .oracle import Twins
from .problem import Problem, close, perturb

OFT = lk.METHODS["oft"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT says so when it takes another block size


def linear(inner: int = 12, out: int = 20) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inner, out).double()


def adapted(layer: nn.Module, method: lk.Method) -> tuple[nn.Module, lk.AbstractAdapter]:
    model = lk.attach(nn.Sequential(layer), method, target_modules=["0"])
    perturb(model[0].adapters)
    ((_, _, adapter),) = lk.adapters(model)
    return model, adapter


def skew(entries: Tensor, size: int) -> Tensor:
    """Q of one block, entry by entry as the paper's: above the diagonal row by row, its negative below."""
    Q = torch.zeros(size, size, dtype=entries.dtype)
    places = [(i, j) for i in range(size) for j in range(i + 1, size)]
    for (i, j), value in zip(places, entries, strict=True):
        Q[i, j], Q[j, i] = value, -value
    return Q


@pytest.mark.parametrize("size", [2, 3, 6, 12])
def test_the_change_is_a_product_with_one_orthogonal_matrix(size: int) -> None:
    model, adapter = adapted(linear(), OFT(oft_block_size=size))
    one = torch.eye(size).double()
    blocks = [(one - Q) @ torch.linalg.inv(one + Q) for Q in (skew(v.detach(), size) for v in adapter.oft_R)]
    R = torch.block_diag(*blocks)
    close(R @ R.T, torch.eye(12).double(), 1e-13)
    assert torch.linalg.det(R) > 0
    W, x = model[0].weight.detach(), torch.randn(5, 12).double()
    close(adapter.merge(W), W @ R.T)
    close(model(x), x @ R @ W.T + model[0].bias)


def test_lengths_and_angles_of_the_neurons_stay() -> None:
    """The hyperspherical energy is a function of them. A change of W by another method of this size moves them."""
    W = linear().weight.detach()
    for method, kept in ((OFT(oft_block_size=4), True), (lk.LoRA(r=2), False)):
        _, adapter = adapted(linear(), method)
        merged = adapter.merge(W).detach()
        assert (merged - W).norm() > 0.1 * W.norm()
        gram, before = merged @ merged.T, W @ W.T
        assert torch.allclose(gram, before, atol=1e-13) is kept
        distances = [1 / torch.pdist(nn.functional.normalize(M)) for M in (merged, W)]
        assert torch.isclose(distances[0].sum(), distances[1].sum(), rtol=1e-12) == kept


@pytest.mark.parametrize("series", [False, True])
def test_it_starts_at_the_base_to_the_last_bit(series: bool) -> None:
    layer, x = linear(), torch.randn(5, 12).double()
    before = layer(x)
    model = lk.attach(nn.Sequential(layer), OFT(oft_block_size=4, use_cayley_neumann=series), target_modules=["0"])
    assert torch.equal(model(x), before)
    ((_, _, adapter),) = lk.adapters(model)
    assert torch.equal(adapter.merge(layer.weight), layer.weight)


def test_the_first_gradient() -> None:
    """R' = I - 2 Q + O(Q²), so that dL/dQ is what is skew-symmetric of 2 W^T G within each block, for W' = W R'^T."""
    p = Problem(OFT(oft_block_size=11)).backward()
    D = 2 * p.W.T @ p.gradient()  # d/dQ of <G, W (I - 2 Q)^T> = <G, W + 2 W Q>
    upper = torch.triu_indices(11, 11, 1)
    close(p.adapter.oft_R.grad[0], (D - D.T)[upper[0], upper[1]])


@pytest.mark.parametrize("terms", [2, 3, 5, 8, 30])
def test_the_series_is_pefts_and_becomes_the_inverse_of_the_exact_map(terms: int) -> None:
    """I + 2Q + 2Q² ... is (I + Q)(I - Q)^-1; cut off, it is orthogonal up to the first term left out."""
    config = OFT(oft_block_size=4, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    _, adapter = adapted(linear(), config)
    with torch.no_grad():
        adapter.oft_R.mul_(0.2)
    R = adapter.blocks().detach()
    one = torch.eye(4).double()
    for block, entries in zip(R, adapter.oft_R.detach(), strict=True):
        Q = skew(entries, 4)
        powers = [torch.linalg.matrix_power(Q, k) for k in range(max(terms, 4))]
        expected = sum((2 * power for power in powers[1:-1]), one) + powers[-1] if terms > 2 else one + 2 * Q
        close(block, expected)
        norm = float(torch.linalg.matrix_norm(Q, 2))
        last = max(terms, 4) if terms > 2 else 2
        exact = (one + Q) @ torch.linalg.inv(one - Q)
        assert float((block - exact).norm()) <= 4 * 2 * norm ** (last - 1) + 1e-14
    if terms == 30:
        close(R @ R.mT, one.expand(3, 4, 4), 1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"oft_block_size": 4},
        {"oft_block_size": 5},
        {"r": 2, "oft_block_size": 0},
        {"oft_block_size": 6, "block_share": True},
        {"oft_block_size": 4, "use_cayley_neumann": True},
        {"oft_block_size": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
    ],
)
def test_against_pefts_layer(settings: dict[str, int]) -> None:
    theirs = peft.OFTConfig(**{"use_cayley_neumann": False, **settings})
    Twins(linear(), OFT(**settings), theirs, 0.2).agree(torch.randn(3, 5, 12).double(), 1e-12)
    Twins(linear().float(), OFT(**settings), theirs, 0.2).agree(torch.randn(3, 5, 12), 1e-5)


def test_against_pefts_embedding() -> None:
    torch.manual_seed(0)
    theirs = peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["0"])
    peft_model = peft.get_peft_model(nn.Sequential(nn.Embedding(30, 16)), theirs)
    torch.manual_seed(0)
    model, adapter = adapted(nn.Embedding(30, 16), OFT(oft_block_size=8))
    with torch.no_grad():
        peft_model.base_model.model[0].oft_embedding_R["default"].weight.copy_(adapter.oft_R)
    ids = torch.randint(30, (3, 5))
    torch.testing.assert_close(model(ids), peft_model(ids))
    close(model(ids), nn.functional.embedding(ids, adapter.merge(model[0].weight.T).T), 1e-6)


def test_a_convolution_is_what_peft_merges() -> None:
    """Unmerged, PEFT folds overlapping patches back into a picture, which is another function, also at the start."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    theirs = peft.OFTConfig(oft_block_size=9, use_cayley_neumann=False, target_modules=["0"])
    x = torch.randn(2, 4, 7, 7)
    before = layer(x)
    peft_model = peft.get_peft_model(nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1)), theirs)
    peft_layer = peft_model.base_model.model[0]
    peft_layer.base_layer.load_state_dict(layer.state_dict())
    assert not torch.allclose(peft_model(x), before, atol=0.1)
    model, adapter = adapted(layer, OFT(oft_block_size=9))
    with torch.no_grad():
        peft_layer.oft_R["default"].weight.copy_(adapter.oft_R)
        peft_layer.merge()
    torch.testing.assert_close(model(x), peft_model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("wanted", "n", "nearest"), [(32, 12, 12), (5, 12, 4), (9, 24, 8), (7, 30, 6), (32, 576, 32)])
def test_block_sizes_are_the_divisors_that_peft_takes(wanted: int, n: int, nearest: int) -> None:
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(n, 4)), peft.OFTConfig(oft_block_size=wanted, target_modules=["0"])
    )
    assert theirs.base_model.model[0].oft_block_size["default"] == OFT(oft_block_size=wanted).block_size(n) == nearest


@pytest.mark.parametrize(
    "bad",
    [{"r": 2}, {"oft_block_size": 0}, {"oft_block_size": -4}, {"oft_block_size": 1}, {"num_cayley_neumann_terms": 1}],
)
def test_impossible_settings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        OFT(**bad)


def test_a_constrained_rotation_of_peft_is_refused(tmp_path: Path) -> None:
    """COFT puts Q back into a ball in each forward pass."""
    config = peft.OFTConfig(oft_block_size=4, coft=True, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(12, 8)), config).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="coft=True"):
        lk.load(nn.Sequential(nn.Linear(12, 8)), tmp_path)


def test_features_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(UsageError, match="11 features"):
        lk.attach(nn.Sequential(nn.Linear(11, 4)), OFT(oft_block_size=2))
