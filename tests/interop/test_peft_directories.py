"""PEFT directories both ways: what either writes the other reads, with the same logits to the last bit in fp32."""

import filecmp
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lorakit as lk

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Vision(nn.Module):
    """Convolutions of each dimension, as in a small image and sound model."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Conv1d(3, 8, 3, padding=1)
        self.image = nn.Conv2d(3, 8, (3, 2), stride=2)
        self.film = nn.Conv3d(3, 8, 2)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        views = [self.sound(x[:, :, 0, 0]), self.image(x[:, :, 0]), self.film(x)]
        return self.out(torch.cat([v.flatten(2).mean(-1) for v in views], 1))


def llama(**kwargs: Any) -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **kwargs))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 9))}


def pictures() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 4, 6, 7)}


def both_sides() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, 64, (2, 5))}


# name -> model, inputs, arguments of attach, arguments of PEFT's LoraConfig that mean the same
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any], dict[str, Any]]] = {
    "linear": (llama, tokens, {}, {"target_modules": "all-linear"}),
    "some": (llama, tokens, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "last_layers": (
        llama,
        tokens,
        {"target_modules": ["q_proj", "up_proj"], "last_n_layers": 2},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]},
    ),
    "patterns": (
        llama,
        tokens,
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6}, "alpha_pattern": {"v_proj": 3.0}},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
            "alpha_pattern": {"v_proj": 3.0},
        },
    ),
    "regex": (
        llama,
        tokens,
        {"target_modules": r"model\.layers\.[02]\..*(q|o)_proj"},
        {"target_modules": r"model\.layers\.[02]\..*(q|o)_proj"},
    ),
    "tied_embedding": (
        lambda: llama(tie_word_embeddings=True),
        tokens,
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": ["embed_tokens", "k_proj"]},
    ),
    "conv1d_gpt2": (gpt2, tokens, {}, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "convolutions": (
        Vision,
        pictures,
        {"target_modules": ["sound", "image", "film", "out"]},
        {"target_modules": ["sound", "image", "film", "out"]},
    ),
    "head_in_full": (
        bert,
        tokens,
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "encoder_decoder": (t5, both_sides, {}, {"target_modules": "all-linear"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def perturb(parameters: Any) -> None:
    torch.manual_seed(7)
    for p in parameters:
        p.add_(0.05 * torch.randn_like(p))


def ours(make: Callable[[], nn.Module], arguments: dict[str, Any], **method: Any) -> nn.Module:
    model = lk.attach(build(make), lk.LoRA(**{"r": 4, "alpha": 8, **method}), **arguments)
    perturb(p for p in model.parameters() if p.requires_grad)
    return model


def from_peft(make: Callable[[], nn.Module], directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(build(make), str(directory)).eval()


@pytest.mark.parametrize("stabilized", [False, True])
def test_ours_in_peft(case: Any, stabilized: bool, tmp_path: Path) -> None:
    make, inputs, arguments, _ = case
    model, batch = ours(make, arguments, rank_stabilized=stabilized), inputs()
    lk.save(model, tmp_path / "a")
    expected = output(model, batch)
    assert not torch.equal(expected, output(build(make), batch))
    assert torch.equal(output(from_peft(make, tmp_path / "a"), batch), expected)


@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_in_ours_and_back(case: Any, stabilized: bool, tmp_path: Path) -> None:
    make, inputs, _, arguments = case
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=stabilized, **arguments)
    theirs = peft.get_peft_model(build(make), config).eval()
    perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    batch = inputs()
    expected = output(theirs, batch)
    model = lk.load(build(make), tmp_path / "a")
    assert torch.equal(output(model, batch), expected)
    lk.save(model, tmp_path / "b")
    assert filecmp.cmp(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "b" / "adapter_model.safetensors", shallow=False)
    assert torch.equal(output(from_peft(make, tmp_path / "b"), batch), expected)


def test_a_second_save_has_the_same_bytes(case: Any, tmp_path: Path) -> None:
    make, inputs, arguments, _ = case
    model, batch = ours(make, arguments), inputs()
    lk.save(model, tmp_path / "a", base="some/model")
    again = lk.load(build(make), tmp_path / "a", trainable=True)
    assert torch.equal(output(again, batch), output(model, batch))
    lk.save(again, tmp_path / "b", base="some/model")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("targets", [["c_attn.q", "c_attn.v"], ["c_attn.v", "mlp.c_fc"], ["c_attn.q", "c_attn.k", "c_attn.v"]])
def test_parts_of_a_fused_projection(targets: list[str], tmp_path: Path) -> None:
    """PEFT gets one block-wise pair for the whole layer; here the parts come back as parts, bit for bit."""
    arguments = {"target_modules": targets, "rank_pattern": {"h.0.attn.c_attn.v": 2}, "alpha_pattern": {"h.1.attn.c_attn.v": 4.0}}
    model, batch = ours(gpt2, arguments), tokens()
    expected = output(model, batch)
    lk.save(model, tmp_path / "a")
    torch.testing.assert_close(output(from_peft(gpt2, tmp_path / "a"), batch), expected, rtol=0, atol=2e-6)
    again = lk.load(build(gpt2), tmp_path / "a")
    assert torch.equal(output(again, batch), expected)
    lk.save(again, tmp_path / "b")
    assert filecmp.cmp(tmp_path / "a" / "lorakit.json", tmp_path / "b" / "lorakit.json", shallow=False)
    untouched = {"q", "k", "v"} - {t.rpartition(".")[2] for t in targets}
    base = build(gpt2).transformer.h[0].attn.c_attn.weight
    lk.merge(model)
    for name in untouched:
        columns = slice(*{"q": (0, 32), "k": (32, 64), "v": (64, 96)}[name])
        assert torch.equal(model.transformer.h[0].attn.c_attn.weight[:, columns], base[:, columns])


def test_embeddings_that_peft_saves_beside_the_adapter(tmp_path: Path) -> None:
    """PEFT writes the base weight of adapted embeddings too; it is accepted if it is this base's, and only then."""
    theirs = peft.get_peft_model(build(llama), peft.LoraConfig(r=4, target_modules=["embed_tokens"])).eval()
    perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    batch = tokens()
    assert torch.equal(output(lk.load(build(llama), tmp_path), batch), output(theirs, batch))
    other = build(llama)
    with torch.no_grad():
        other.model.embed_tokens.weight[5] += 1
    with pytest.raises(lk.LorakitError, match="base weight that differs"):
        lk.load(other, tmp_path)


def test_two_adapters_are_saved_apart(tmp_path: Path) -> None:
    model = ours(llama, {"target_modules": ["q_proj"]})
    lk.attach(model, lk.LoRA(r=2), target_modules=["v_proj"], name="second")
    lk.save(model, tmp_path / "first")
    lk.save(model, tmp_path / "second", name="second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["v_proj"])
    assert json.loads((tmp_path / "first" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    base = tmp_path / "models" / "my-base"
    base.mkdir(parents=True)
    lk.save(ours(llama, {}), tmp_path / "a", base=str(base))
    for file in (tmp_path / "a").glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "my-base"


def test_loading_warns_of_nothing(tmp_path: Path) -> None:
    lk.save(ours(llama, {}), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.load(build(llama), tmp_path / "a")
