"""What is planted in a fully tuned model comes back, with the exact error, and nothing that changed is lost unsaid."""

import json
from pathlib import Path

import pytest
import torch
from planted import basis, llama, opened, peft_logits

import lorakit as lk
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.extract import Extraction, Wanted, as_lora, extract
from lorakit.analysis.lora_files import write_lora
from lorakit.core.errors import CheckError, FileError, UsageError
from lorakit.models.skeleton import skeleton

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")
LINEAR = 14


def tuned(base: Path, directory: Path, *, noise: float = 0.0, change=None, sigma=(0.3, 0.2, 0.1)) -> Path:
    """Write the model with a change of rank 3 in every linear layer, noise on top, and whatever `change` does to it."""
    model = opened(base)
    torch.manual_seed(9)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and path != "lm_head":
                U, V = basis(layer.out_features, 3, len(path)), basis(layer.in_features, 3, len(path) + 50)
                W = layer.weight.double() + U * torch.tensor(sigma) @ V.T
                layer.weight.copy_(W + noise * torch.randn(W.shape))
        if change is not None:
            change(model)
    model.save_pretrained(directory)
    return directory


def extracted(base: Path, other: Path, wanted: Wanted, out: Path | None = None, full: bool = False) -> Extraction:
    before, after = BaseWeights(base), BaseWeights(other)
    model = skeleton(other, dtype="float32")
    found = extract(before, after, model, wanted, full=full)
    if out is not None:
        out.mkdir()
        write_lora(out, as_lora(found, model, before, "base", None))
    return found


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


IDS = torch.arange(40)[None] % 128


@pytest.mark.parametrize("wanted", [Wanted(rank=3), Wanted(energy=0.999999)])
def test_a_planted_update_of_rank_3_comes_back(tmp_path: Path, wanted: Wanted) -> None:
    base = llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned")
    found = extracted(base, other, wanted, tmp_path / "a")
    assert (len(found.modules), found.rest, found.same) == (LINEAR, (), 7)
    model, target = opened(base), opened(other)
    lk.load(model, tmp_path / "a")
    for own in found.modules:
        assert len(own.A) == 3
        assert own.numbers["error"].value < 1e-6
        assert own.numbers["gavish_donoho_rank"].value == 3, "the rest is the rounding of float32"
    for path, layer, adapter in lk.adapters(model):
        apart = layer.weight + adapter.delta_weight() - target.get_submodule(path).weight
        assert float(apart.detach().norm()) < 1e-6 * float(layer.weight.detach().norm())
    torch.testing.assert_close(peft_logits(base, tmp_path / "a", IDS), logits(target, IDS), atol=1e-5, rtol=1e-5)


def test_the_error_is_that_of_the_best_approximation(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    other = tuned(base, tmp_path / "tuned", noise=0.002)
    found = extracted(base, other, Wanted(rank=2))
    before, after = opened(base), opened(other)
    lost = total = 0.0
    for own in found.modules:
        D = (after.get_submodule(own.path).weight - before.get_submodule(own.path).weight).detach().double()
        S = torch.linalg.svdvals(D)
        reached = float((D - own.B.double() @ own.A.double()).norm() / D.norm())
        assert own.numbers["error"].value == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-6)
        assert own.numbers["error"].value == pytest.approx(reached, rel=1e-5)
        assert own.numbers["spectral_error"].value == pytest.approx(float(S[2] / S[0]), rel=1e-6)
        assert own.numbers["gavish_donoho_rank"].value == 3, (
            "0.1 stands above the noise, 0.002 (sqrt d + sqrt k) does not"
        )
        lost, total = lost + float(S[2:].square().sum()), total + float(S.square().sum())
    assert found.numbers["error"].value == pytest.approx((lost / total) ** 0.5, rel=1e-6)


def scale_norms(model) -> None:
    model.model.norm.weight.mul_(1.5)
    model.model.embed_tokens.weight.mul_(1.1)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_no_matrix_is_kept_in_full(tmp_path: Path, tied: bool) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    other = tuned(base, tmp_path / "tuned", change=scale_norms)
    plain = extracted(base, other, Wanted(rank=3), tmp_path / "plain")
    assert {f"{r.path}.{r.name}" for r in plain.rest} == {"model.norm.weight", "model.embed_tokens.weight"}
    assert {round(r.relative, 4) for r in plain.rest} == {0.5, 0.1}
    found = extracted(base, other, Wanted(rank=3), tmp_path / "full", full=True)
    assert set(found.kept) == {"model.norm", "model.embed_tokens", *(["lm_head"] if tied else [])}
    wanted = logits(opened(other), IDS)
    model = opened(base)
    lk.load(model, tmp_path / "full")
    torch.testing.assert_close(logits(model, IDS), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peft_logits(base, tmp_path / "full", IDS), wanted, atol=1e-5, rtol=1e-5)
    assert (peft_logits(base, tmp_path / "plain", IDS) - wanted).abs().max() > 1e-2


def test_a_layer_whose_bias_changed_is_kept_whole(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", attention_bias=True)
    other = tuned(base, tmp_path / "tuned", change=lambda m: m.model.layers[1].self_attn.q_proj.bias.add_(0.5))
    found = extracted(base, other, Wanted(rank=3), tmp_path / "a", full=True)
    assert list(found.kept) == ["model.layers.1.self_attn.q_proj"]
    assert len(found.modules) == LINEAR - 1
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"], "q_proj alone would name the kept layer too"
    wanted = logits(opened(other), IDS)
    torch.testing.assert_close(peft_logits(base, tmp_path / "a", IDS), wanted, atol=1e-5, rtol=1e-5)


def test_conv1d_layers_and_an_embedding_as_targets(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("c_attn.weight", "wpe.weight")):
                p.add_(torch.randn(len(p), 2) @ torch.randn(2, p.shape[1]) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    wanted = Wanted(rank=2, target_modules=["c_attn", "wpe"])
    found = extracted(tmp_path / "base", tmp_path / "tuned", wanted, tmp_path / "a")
    assert {own.path for own in found.modules} == {"transformer.h.0.attn.c_attn", "transformer.wpe"}
    assert found.rest == ()
    torch.testing.assert_close(
        peft_logits(tmp_path / "base", tmp_path / "a", IDS), logits(model, IDS), atol=1e-5, rtol=1e-5
    )


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(CheckError, match="same weights"):
        extracted(base, base, Wanted(rank=1))
    other = llama(tmp_path / "wider", intermediate_size=128, tie_word_embeddings=True)
    with pytest.raises(FileError, match="other shapes"):
        extracted(base, other, Wanted(rank=1))
    with pytest.raises(UsageError, match="tied"):
        extracted(base, tuned(base, tmp_path / "t"), Wanted(rank=1, target_modules=["embed_tokens"]))
    for wrong in ({"rank": 0}, {"energy": 1.5}, {}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(UsageError):
            Wanted(**wrong)
