"""RandLoRA against its closed forms and against PEFT's bases and layer."""

import copy
import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.core.errors import FileError, UsageError
from lorakit.methods.randlora import Scaled, scaled

from .oracle import Twins
from .problem import IN, OUT, Problem, close, perturb

RandLoRA = lk.METHODS["randlora"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5), nn.Linear(5, 9))


def layers(model: nn.Module) -> list[lk.AdditiveAdapter]:
    return [adapter for _, _, adapter in lk.adapters(model)]


@pytest.mark.parametrize("seed", [0, 12345])
@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}])
@pytest.mark.parametrize("r", [1, 6, 32])
def test_the_bases_are_pefts_bit_for_bit(seed: int, kind: dict[str, bool], r: int) -> None:
    config = peft.RandLoraConfig(r=r, projection_prng_key=seed, target_modules=["0", "1", "2"], **kind)
    theirs = peft.get_peft_model(network(), config).base_model
    pair = layers(lk.attach(network(), RandLoRA(r=r, projection_prng_key=seed, **kind)))[0].pair
    assert torch.equal(pair.randlora_A, theirs.randlora_A["default"])
    assert torch.equal(pair.randlora_B, theirs.randlora_B["default"])
    assert pair.randlora_A.shape == (r, 1, 20)
    assert pair.randlora_B.shape == (20, -(-20 // r), r)


def test_all_layers_share_one_pair_wherever_the_model_goes() -> None:
    def addresses(model: nn.Module) -> set[tuple[int, int]]:
        return {(a.pair.randlora_A.data_ptr(), a.pair.randlora_B.data_ptr()) for a in layers(model)}

    model = lk.attach(network(), RandLoRA(r=6))
    assert len(addresses(model)) == len(addresses(copy.deepcopy(model))) == len(addresses(model.double())) == 1
    assert addresses(lk.attach(network(), RandLoRA(r=6))) != addresses(model)


def test_start_and_number_of_parameters() -> None:
    model = lk.attach(network(), RandLoRA(r=4))
    for adapter, smaller in zip(layers(model), (12, 5, 5), strict=True):
        n = -(-smaller // 4)
        assert not adapter.randlora_lambda.any()
        assert torch.equal(adapter.randlora_gamma, torch.full((n, smaller), 1 / max(n, smaller)))
        assert sum(t.numel() for t in adapter.state_dict().values()) == n * (4 + smaller)


@pytest.mark.parametrize(("out", "inner"), [(OUT, IN), (IN, OUT), (9, 9)])
def test_the_change_is_a_sum_of_terms_of_rank_one(out: int, inner: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inner, out).double()
    model = lk.attach(nn.Sequential(layer), RandLoRA(r=3, randlora_alpha=6))
    (adapter,) = layers(model)
    perturb(adapter)
    small, large = min(out, inner), max(out, inner)
    n = -(-small // 3)
    A, B = adapter.pair.randlora_A, adapter.pair.randlora_B
    scales, gamma = adapter.randlora_lambda.detach(), adapter.randlora_gamma.detach()
    expected = torch.zeros(large, small).double()
    for q in range(3 * n):
        row = A[q // n, 0, :small] * gamma[q % n]
        expected += 2 * scales[q // n, q % n] * torch.outer(B[:large, q // 3, q % 3], row)
    delta = adapter.delta_weight().detach()
    close(delta, expected if small == inner else expected.T)
    assert torch.linalg.matrix_rank(delta) == small, "the change has full rank"
    x = torch.randn(5, inner).double()
    close(model(x) - layer.frozen(x), x @ delta.T)


def test_the_first_gradients() -> None:
    p = Problem(RandLoRA(r=3, randlora_alpha=6)).backward()
    (A, B), n, G = (p.adapter.pair.randlora_A[:, 0, :OUT], p.adapter.pair.randlora_B), 3, p.gradient()
    gamma = p.adapter.randlora_gamma.detach()
    assert not p.adapter.randlora_gamma.grad.any()
    for q in range(9):
        term = torch.outer(A[q // n] * gamma[q % n], B[:IN, q // 3, q % 3])  # B is on the side of the 11 inputs
        close(p.adapter.randlora_lambda.grad[q // n, q % n], 2 * (G * term).sum())


def test_the_product_that_keeps_little_has_autograds_gradients() -> None:
    torch.manual_seed(0)
    tensors = (torch.randn(4, 7).double(), *(torch.randn(s).double().requires_grad_() for s in ((4, 3), (3, 7))))
    assert torch.autograd.gradcheck(Scaled.apply, tensors)
    assert torch.equal(Scaled.apply(*tensors), scaled(*tensors))

    def kept(multiply: object) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            multiply(*tensors)
        return max(sizes)

    assert kept(Scaled.apply) < kept(scaled) == 4 * 3 * 7


@pytest.mark.parametrize(("inner", "out"), [(12, 20), (20, 12)])
def test_against_pefts_layer(inner: int, out: int) -> None:
    torch.manual_seed(0)
    twins = Twins(nn.Linear(inner, out), RandLoRA(r=5, randlora_alpha=10), peft.RandLoraConfig(r=5, randlora_alpha=10))
    twins.agree(torch.randn(3, 5, inner), 1e-6)


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_bases_are_saved_once_or_made_from_the_seed(save_projection: bool, tmp_path: Path) -> None:
    model = lk.attach(network(), RandLoRA(r=6, save_projection=save_projection, projection_prng_key=3))
    perturb(model)
    if save_projection:  # bases of another origin, as another version of torch might draw them
        layers(model)[0].pair.randlora_A.mul_(1.5)
    lk.save(model, tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    scales = {f"base_model.model.{i}.randlora_{v}" for i in range(3) for v in ("lambda", "gamma")}
    assert names == scales | ({"base_model.randlora_A", "base_model.randlora_B"} if save_projection else set())
    other = network()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    x = torch.randn(4, 12)
    assert torch.equal(lk.load(other, tmp_path)(x), model(x))


def directory_of_peft(path: Path) -> dict[str, Tensor]:
    config = peft.RandLoraConfig(r=6, target_modules=["0", "1"])
    peft.get_peft_model(network(), config).save_pretrained(path)
    return safetensors.torch.load_file(path / "adapter_model.safetensors")


def test_a_repeated_basis_must_be_the_common_one(tmp_path: Path) -> None:
    tensors = directory_of_peft(tmp_path)
    repeated = "base_model.model.1.randlora_B"
    assert torch.equal(tensors[repeated], tensors["base_model.randlora_B"])
    lk.load(network(), tmp_path)
    tensors[repeated] = tensors[repeated] + 1
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match="hold in common"):
        lk.load(network(), tmp_path)
    tensors["base_model.model.2.randlora_B"] = tensors["base_model.randlora_B"].clone()
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match="not used by this model"):
        lk.load(network(), tmp_path)


def test_a_file_that_asks_for_huge_bases_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    lk.save(lk.attach(network(), RandLoRA(r=6)), tmp_path)
    for file in ("adapter_config.json", "lorakit.json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace('"r": 6', '"r": 60000000000'))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 60000000000
    with pytest.raises(FileError):
        lk.load(network(), tmp_path)


@pytest.mark.parametrize("bad", [{"r": 0}, {"dropout": 1.0}, {"randlora_alpha": 0.0}, {"projection_prng_key": 2**70}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        RandLoRA(**bad)
