"""VeRA against its closed forms and against PEFT's random pair."""

import copy
import json
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit as lk
from lorakit.core.errors import FileError, UsageError

from .problem import IN, OUT, Problem, close, perturb

VeRA = lk.METHODS["vera"]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5), nn.Linear(5, 9))


def layers(model: nn.Module) -> list[lk.AdditiveAdapter]:
    return [adapter for _, _, adapter in lk.adapters(model)]


@pytest.mark.parametrize("seed", [0, 12345])
def test_the_pair_is_pefts_bit_for_bit(seed: int) -> None:
    config = peft.VeraConfig(r=6, projection_prng_key=seed, target_modules=["0", "1", "2"])
    theirs = peft.get_peft_model(network(), config).base_model
    model = lk.attach(network(), VeRA(r=6, projection_prng_key=seed))
    pair = layers(model)[0].pair
    assert torch.equal(pair.vera_A, theirs.vera_A["default"])
    assert torch.equal(pair.vera_B, theirs.vera_B["default"])
    assert pair.vera_A.shape == (6, 20)
    assert pair.vera_B.shape == (20, 6)


def test_all_layers_share_one_pair_wherever_the_model_goes() -> None:
    model = lk.attach(network(), VeRA(r=6))

    def addresses(model: nn.Module) -> set[tuple[int, ...]]:
        return {tuple(t.data_ptr() for t in adapter.projections()) for adapter in layers(model)}

    assert len(addresses(model)) == 1
    twin = copy.deepcopy(model)
    assert len(addresses(twin)) == 1
    assert addresses(twin) != addresses(model)
    assert len(addresses(model.double())) == 1
    assert layers(model)[2].projections()[0].dtype == torch.float64
    wide = lk.attach(network().double(), VeRA(r=6))
    assert len(addresses(wide)) == 1
    assert [tuple(t.shape for t in a.projections()) for a in layers(wide)] == [
        ((6, 12), (20, 6)),
        ((6, 20), (5, 6)),
        ((6, 5), (9, 6)),
    ]


def test_two_attachments_do_not_share() -> None:
    one, two = (lk.attach(network(), VeRA(r=6)) for _ in range(2))
    assert layers(one)[0].pair.vera_A.data_ptr() != layers(two)[0].pair.vera_A.data_ptr()
    assert torch.equal(layers(one)[0].pair.vera_A, layers(two)[0].pair.vera_A)


def test_start_and_number_of_parameters() -> None:
    model = lk.attach(network(), VeRA(r=6, d_initial=0.07))
    for adapter, out in zip(layers(model), (20, 5, 9), strict=True):
        assert not adapter.vera_lambda_b.any()
        assert torch.equal(adapter.vera_lambda_d, torch.full((6,), 0.07))
        assert sum(p.numel() for p in adapter.parameters()) == out + 6
        assert sum(t.numel() for t in adapter.state_dict().values()) == out + 6, "checkpoints hold no projection"


def test_c10_the_first_gradients() -> None:
    p = Problem(VeRA(r=5))
    A, B = p.adapter.projections()
    d, G = p.adapter.vera_lambda_d.detach(), p.gradient()
    p.backward()
    assert not p.adapter.vera_lambda_d.grad.any()
    close(p.adapter.vera_lambda_b.grad, (G * (B @ torch.diag(d) @ A)).sum(1))


def test_the_change_is_the_scaled_pair() -> None:
    p = Problem(VeRA(r=5))
    perturb(p.adapter)
    A, B = p.adapter.projections()
    b, d = p.adapter.vera_lambda_b.detach(), p.adapter.vera_lambda_d.detach()
    assert (A.shape, B.shape) == ((5, IN), (OUT, 5))
    close(p.delta, torch.diag(b) @ B @ torch.diag(d) @ A)
    close(p.model(p.x).detach() - p.base(p.x), p.x @ p.delta.T)


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_pair_is_saved_once_or_made_from_the_seed(save_projection: bool, tmp_path: Path) -> None:
    model = lk.attach(network(), VeRA(r=6, save_projection=save_projection, projection_prng_key=3))
    perturb(model)
    if save_projection:  # a pair of another origin, as another version of torch might draw it
        layers(model)[0].pair.vera_A.mul_(1.5)
    lk.save(model, tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    vectors = {f"base_model.model.{i}.vera_lambda_{v}" for i in range(3) for v in "bd"}
    assert names == vectors | ({"base_model.vera_A", "base_model.vera_B"} if save_projection else set())
    bases = {k: v for k, v in model.state_dict().items() if "adapters" not in k}
    other = network()
    other.load_state_dict(bases)
    x = torch.randn(4, 12)
    assert torch.equal(lk.load(other, tmp_path)(x), model(x))
    assert len({a.pair.vera_A.data_ptr() for a in layers(other)}) == 1


def test_a_file_that_asks_for_a_huge_pair_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    lk.save(lk.attach(network(), VeRA(r=6)), tmp_path)
    for file in ("adapter_config.json", "lorakit.json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace('"r": 6', '"r": 60000000000'))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 60000000000
    with pytest.raises(FileError):
        lk.load(network(), tmp_path)


@pytest.mark.parametrize("bad", [{"r": 0}, {"dropout": 1.0}, {"d_initial": 0.0}, {"projection_prng_key": 2**70}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        VeRA(**bad)


def test_ranks_cannot_differ_between_layers() -> None:
    with pytest.raises(UsageError, match="rank_pattern"):
        lk.attach(network(), VeRA(), rank_pattern={"0": 3})
