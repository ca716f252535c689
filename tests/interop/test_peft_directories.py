"""PEFT directories both ways: what either writes the other reads, with the same logits, nearly all to the last bit."""

import filecmp
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file
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
from lorakit.core.errors import FileError, UsageError
from lorakit.core.start import needs

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


class Square(nn.Module):
    """A convolution as PEFT's rotations want it: a square kernel, the same stride and padding in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.out = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.image(x[:, 0].transpose(1, 2)[:, :4]).flatten(2).mean(-1))


def llama(**kwargs: Any) -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **kwargs))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64))


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 9))}


def pictures() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 4, 6, 7)}


def both_sides() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, 64, (2, 5))}


# name -> model, inputs, arguments of attach, arguments of PEFT's configuration that mean the same
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
    "ranks": (
        llama,
        tokens,
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6}},
        {"target_modules": "all-linear", "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6}},
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
    "conv2d": (Vision, pictures, {"target_modules": ["image", "out"]}, {"target_modules": ["image", "out"]}),
    "square": (Square, pictures, {"target_modules": ["image", "out"]}, {"target_modules": ["image", "out"]}),
    "head_in_full": (
        bert,
        tokens,
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "encoder_decoder": (t5, both_sides, {}, {"target_modules": "all-linear"}),
}


class Spelling(NamedTuple):
    """A method here and the configuration in PEFT that means the same."""

    ours: Callable[[], lk.Method]
    theirs: Callable[..., peft.PeftConfig]
    cases: set[str]
    """What PEFT supports."""
    tolerance: float = 0.0
    """Difference of the logits, over the largest of them; 0: not a bit."""


LINEAR = {"linear", "some", "last_layers", "regex", "conv1d_gpt2", "head_in_full", "encoder_decoder"}
PROJECTIONS = LINEAR - {"conv1d_gpt2"}
LAYERS = set(CASES)


def spelled(name: str, theirs: type, ours: dict[str, Any], same: dict[str, Any], *rest: Any) -> Spelling:
    return Spelling(lambda: lk.METHODS[name](**ours), lambda **targets: theirs(**same, **targets), *rest)


def same(name: str, theirs: type, settings: dict[str, Any], *rest: Any) -> Spelling:
    """Where PEFT has the same names for the settings."""
    return spelled(name, theirs, settings, settings, *rest)


def adalora(**targets: Any) -> peft.PeftConfig:
    return peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=10, **targets)


LORA = {"r": 4, "alpha": 8}
THEIR_LORA = {"r": 4, "lora_alpha": 8}
SPELLINGS = {
    "lora": spelled("lora", peft.LoraConfig, LORA, THEIR_LORA, LAYERS),
    "rslora": spelled(
        "lora", peft.LoraConfig, {**LORA, "rank_stabilized": True}, {**THEIR_LORA, "use_rslora": True}, LAYERS
    ),
    # PEFT takes the norm of the whole matrix, here it is made of its parts.
    "dora": spelled("dora", peft.LoraConfig, LORA, {**THEIR_LORA, "use_dora": True}, LAYERS, 1e-6),
    "vera": spelled("vera", peft.VeraConfig, {"r": 8}, {"r": 8}, LINEAR),
    "vera_from_seed": spelled(
        "vera",
        peft.VeraConfig,
        {"r": 8, "projection_prng_key": 5, "save_projection": False},
        {"r": 8, "projection_prng_key": 5, "save_projection": False},
        LINEAR,
    ),
    "adalora": Spelling(lambda: lk.METHODS["adalora"](init_r=4, target_r=2, alpha=8), adalora, LINEAR),
    # PEFT convolves once with the whole change, here it is two thin convolutions.
    "adalora_conv2d": Spelling(lambda: lk.METHODS["adalora"](init_r=4, target_r=2, alpha=8), adalora, {"conv2d"}, 1e-6),
    "loha": same("loha", peft.LoHaConfig, LORA, {*PROJECTIONS, "patterns", "ranks", "conv2d"}),
    # PEFT applies the Kronecker product, here its two matrices are applied.
    "lokr": same("lokr", peft.LoKrConfig, LORA, {*PROJECTIONS, "patterns", "ranks", "conv2d"}, 1e-6),
    "lokr_both": same(
        "lokr", peft.LoKrConfig, {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 8}, {"linear"}, 1e-6
    ),
    "hira": same("hira", peft.HiraConfig, {"r": 4}, {*LINEAR, "conv2d"}),
    # PEFT multiplies the whole table, here the rows that are looked up; it makes B A by a convolution.
    "hira_others": same("hira", peft.HiraConfig, {"r": 4}, {"tied_embedding", "convolutions"}, 1e-6),
    "ia3": same("ia3", peft.IA3Config, {"feedforward_modules": ["down_proj"]}, {"linear"}),
    "ia3_outputs": same(
        "ia3", peft.IA3Config, {"feedforward_modules": []}, {"some", "regex", "conv1d_gpt2", "conv2d", "head_in_full"}
    ),
    "ia3_t5": same("ia3", peft.IA3Config, {"feedforward_modules": ["wo"]}, {"encoder_decoder"}),
    "ia3_conv2d": same("ia3", peft.IA3Config, {"feedforward_modules": ["image"]}, {"conv2d"}),
    "oft": same("oft", peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}, PROJECTIONS),
    "oft_series": same("oft", peft.OFTConfig, {"oft_block_size": 16, "use_cayley_neumann": True}, {"linear"}),
    "oft_number": same(
        "oft",
        peft.OFTConfig,
        {"r": 4, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
        {"some"},
    ),
    "oft_embedding": same("oft", peft.OFTConfig, {"use_cayley_neumann": False}, {"tied_embedding"}),
    # PEFT multiplies by the whole rotation, here it is block by block.
    "boft": same("boft", peft.BOFTConfig, {"boft_block_size": 8}, PROJECTIONS, 2e-6),
    "boft_number": same("boft", peft.BOFTConfig, {"boft_block_num": 4, "boft_block_size": 0}, {"some"}, 2e-6),
    "boft_conv2d": same("boft", peft.BOFTConfig, {"boft_block_size": 2}, {"square"}, 2e-6),
    "miss": same("miss", peft.MissConfig, {"r": 5}, PROJECTIONS),
    "miss_mini": spelled(
        "miss",
        peft.MissConfig,
        {"r": 4, "variant": "mini", "mini_r": 8},
        {"r": 4, "init_weights": "mini", "mini_r": 8},
        {"linear", "some"},
    ),
    "miss_bat": spelled(
        "miss", peft.MissConfig, {"r": 8, "variant": "bat"}, {"r": 8, "init_weights": "bat"}, {"linear", "some"}
    ),
    "randlora": same("randlora", peft.RandLoraConfig, {"r": 6, "randlora_alpha": 12}, LINEAR),
    "randlora_from_seed": same(
        "randlora",
        peft.RandLoraConfig,
        {"r": 6, "randlora_alpha": 12, "projection_prng_key": 5, "save_projection": False},
        {"linear", "conv1d_gpt2"},
    ),
    "randlora_sparse": same("randlora", peft.RandLoraConfig, {"r": 6, "randlora_alpha": 12, "sparse": True}, {"some"}),
    # PEFT transforms the whole change to a matrix, here the vectors are transformed.
    "fourierft": same("fourierft", peft.FourierFTConfig, {"n_frequency": 200, "scaling": 3.0}, LINEAR, 1e-6),
}


@pytest.fixture(
    params=[(m, c) for m, spelling in SPELLINGS.items() for c in CASES if c in spelling.cases], ids="-".join
)
def pair(request: pytest.FixtureRequest) -> Any:
    method, case = request.param
    return SPELLINGS[method], CASES[case]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def agree(a: Tensor, b: Tensor, tolerance: float) -> None:
    off = float((a - b).abs().max() / b.abs().max())
    assert torch.equal(a, b) if tolerance == 0 else off <= tolerance, f"off by {off:.1e}"


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


def ours(make: Callable[[], nn.Module], arguments: dict[str, Any], method: lk.Method | None = None) -> nn.Module:
    model = lk.attach(build(make), method or lk.LoRA(**LORA), **arguments)
    perturb(p for p in model.parameters() if p.requires_grad)
    return model


def from_peft(make: Callable[[], nn.Module], directory: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(build(make), str(directory)).eval()


def test_ours_in_peft(pair: Any, tmp_path: Path) -> None:
    spelling, (make, inputs, arguments, _) = pair
    model, batch = ours(make, arguments, spelling.ours()), inputs()
    lk.save(model, tmp_path / "a")
    expected = output(model, batch)
    assert not torch.allclose(expected, output(build(make), batch), atol=1e-4)
    agree(output(from_peft(make, tmp_path / "a"), batch), expected, spelling.tolerance)


def test_peft_in_ours_and_back(pair: Any, tmp_path: Path) -> None:
    spelling, (make, inputs, _, arguments) = pair
    theirs = peft.get_peft_model(build(make), spelling.theirs(**arguments)).eval()
    perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    batch = inputs()
    expected = output(theirs, batch)
    model = lk.load(build(make), tmp_path / "a")
    agree(output(model, batch), expected, spelling.tolerance)
    lk.save(model, tmp_path / "b")
    before, after = (tmp_path / part / "adapter_model.safetensors" for part in "ab")
    once = without_repetition(load_file(before))
    assert filecmp.cmp(before, after, shallow=False) or same_tensors(once, load_file(after))
    assert torch.equal(output(from_peft(make, tmp_path / "b"), batch), expected)


def without_repetition(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what PEFT writes once and then again for every layer (RandLoRA's bases); nothing must be left out else."""
    common = {key.removeprefix("base_model."): key for key in tensors if not key.startswith("base_model.model.")}
    repeated = {key: common[leaf] for key in tensors if (leaf := key.rpartition(".")[2]) in common}
    repeated = {key: own for key, own in repeated.items() if key != own and torch.equal(tensors[key], tensors[own])}
    return {key: tensor for key, tensor in tensors.items() if key not in repeated}


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_a_second_save_has_the_same_bytes(pair: Any, tmp_path: Path) -> None:
    spelling, (make, inputs, arguments, _) = pair
    saved_twice(make, inputs(), arguments, spelling.ours(), tmp_path)


def saved_twice(
    make: Callable[[], nn.Module],
    batch: dict[str, Tensor],
    arguments: dict[str, Any],
    method: lk.Method,
    tmp_path: Path,
) -> None:
    model = ours(make, arguments, method)
    lk.save(model, tmp_path / "a", base="some/model")
    again = lk.load(build(make), tmp_path / "a", trainable=True)
    assert torch.equal(output(again, batch), output(model, batch))
    lk.save(again, tmp_path / "b", base="some/model")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("name", sorted(lk.METHODS))
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"]}),
        (gpt2, {"target_modules": ["c_attn.q", "c_attn.v", "c_fc"]}),
        (bert, {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"]}),
    ],
    ids=["linear", "fused", "head"],
)
def test_every_method_comes_back_as_it_was(
    name: str, make: Callable[[], nn.Module], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Also those that PEFT does not know, or not on these layers; then the directory says so in its `peft_type`."""
    try:
        saved_twice(make, tokens(), arguments, lk.METHODS[name](), tmp_path)
    except UsageError as refusal:
        pytest.skip(str(refusal))
    kind = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"]
    assert kind == f"LORAKIT_{name.upper()}" or kind in vars(peft.PeftType)["_member_names_"]


@pytest.mark.parametrize("name", sorted(name for name in lk.METHODS if not needs(lk.METHODS[name]())))
def test_peft_refuses_what_it_cannot_read(name: str, tmp_path: Path) -> None:
    lk.save(ours(bert, {"target_modules": ["query"]}, lk.METHODS[name]()), tmp_path)
    kind = json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]
    if kind.startswith("LORAKIT"):
        with pytest.raises((KeyError, ValueError), match=kind):
            from_peft(bert, tmp_path)
    else:
        batch = tokens()
        torch.testing.assert_close(
            output(from_peft(bert, tmp_path), batch), output(lk.load(build(bert), tmp_path), batch)
        )


def test_lora_fa_is_lora_to_all_others(case: Any, tmp_path: Path) -> None:
    """PEFT reads its directory as LoRA, and without `lorakit.json` so does lorakit."""
    make, inputs, arguments, _ = case
    model, batch = ours(make, arguments, lk.METHODS["lora_fa"](r=4, alpha=8)), inputs()
    lk.save(model, tmp_path)
    expected = output(model, batch)
    assert torch.equal(output(from_peft(make, tmp_path), batch), expected)
    assert methods_in(lk.load(build(make), tmp_path)) == {"lora_fa"}
    (tmp_path / "lorakit.json").unlink()
    without = lk.load(build(make), tmp_path)
    assert methods_in(without) == {"lora"}
    assert torch.equal(output(without, batch), expected)


def methods_in(model: nn.Module) -> set[str]:
    adapters = [a for _, _, a in lk.adapters(model) if isinstance(a, lk.AbstractAdapter)]
    return {lk.METHODS.name_of(type(adapter.config)) for adapter in adapters}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT says so of its own directories too
@pytest.mark.parametrize("make", [llama, gpt2])
def test_pruned_ranks_go_both_ways(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """PEFT prunes, down to no rank at all in one layer; what is left is read here, written, and read by PEFT again."""
    theirs = peft.get_peft_model(
        build(make), adalora(target_modules=["q_proj", "k_proj"] if make is llama else ["c_attn"])
    )
    perturb(p for p in theirs.parameters() if p.requires_grad)
    layers = {n: p for n, p in theirs.base_model.model.named_parameters() if "lora_E" in n}
    masks = {n: [False] * 4 if i == 0 else [i > j for j in (0, 3, 1, 2)] for i, n in enumerate(layers)}
    with torch.no_grad():
        for name, E in layers.items():
            E.masked_fill_(~torch.tensor(masks[name])[:, None], 0.0)
    theirs.peft_config["default"].rank_pattern = masks
    theirs.eval().save_pretrained(tmp_path / "a")
    batch = tokens()
    expected = output(theirs, batch)
    model = lk.load(build(make), tmp_path / "a")
    torch.testing.assert_close(output(model, batch), expected, rtol=0, atol=1e-6)
    assert [len(a.lora_E) for _, _, a in lk.adapters(model)] == [sum(mask) for mask in masks.values()]
    lk.save(model, tmp_path / "b")
    assert filecmp.cmp(
        tmp_path / "a" / "adapter_model.safetensors", tmp_path / "b" / "adapter_model.safetensors", shallow=False
    )
    assert torch.equal(output(from_peft(make, tmp_path / "b"), batch), output(model, batch))


@pytest.mark.parametrize("pattern", [{"q_proj.lora_E": 3}, {"q_proj": [True]}, {"q_proj.lora_E": [1, 0]}, [True]])
def test_masks_that_are_none_are_refused(pattern: Any, tmp_path: Path) -> None:
    lk.save(ours(llama, {"target_modules": ["q_proj"]}, lk.METHODS["adalora"]()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}))
    with pytest.raises(FileError, match="rank_pattern"):
        lk.load(build(llama), tmp_path)


@pytest.mark.parametrize(
    "targets", [["c_attn.q", "c_attn.v"], ["c_attn.v", "mlp.c_fc"], ["c_attn.q", "c_attn.k", "c_attn.v"]]
)
def test_parts_of_a_fused_projection(targets: list[str], tmp_path: Path) -> None:
    """PEFT gets one block-wise pair for the whole layer; here the parts come back as parts, bit for bit."""
    arguments = {
        "target_modules": targets,
        "rank_pattern": {"h.0.attn.c_attn.v": 2},
        "alpha_pattern": {"h.1.attn.c_attn.v": 4.0},
    }
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
