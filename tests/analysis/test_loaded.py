"""The loader against PEFT's own merging, for every variant; base weights as checkpoints store them; what is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit as lk
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.loaded import block_of, load_adapter
from lorakit.core.adapter import AdditiveAdapter
from lorakit.core.errors import FileError, UsageError

peft = pytest.importorskip("peft")


class Toy(nn.Module):
    """Every layer kind in two blocks, a head that is trained in full, and a fused projection."""

    def __init__(self, conv1d: bool = False) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        def linear(inner: int, out: int) -> nn.Module:
            return Conv1D(out, inner) if conv1d else nn.Linear(inner, out)

        self.embed_tokens = nn.Embedding(20, 12)
        blocks = [{"q_proj": linear(12, 12), "up_proj": linear(12, 24), "c_attn": linear(12, 36)} for _ in range(2)]
        self.layers = nn.ModuleList([nn.ModuleDict(b) for b in blocks])
        self.conv = nn.Conv2d(3, 8, 2)
        self.score = nn.Linear(12, 3)


def write_base(model: nn.Module, directory: Path, **config: Any) -> BaseWeights:
    directory.mkdir(parents=True)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    return BaseWeights(directory)


def shake(model: nn.Module, amount: float = 0.1) -> None:
    """Give every trainable tensor values that are not its start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += amount * torch.randn(parameter.shape, generator=generator)


def merged_change(peft_model: Any, original: dict[str, Tensor], path: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft_model.merge_and_unload()
    return merged.get_submodule(path).weight.detach() - original[f"{path}.weight"]


EVERYWHERE = ["q_proj", "up_proj"]
VARIANTS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=EVERYWHERE),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=EVERYWHERE),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=EVERYWHERE,
        rank_pattern={"layers.0.q_proj": 2, "up_proj": 3},
        alpha_pattern={"up_proj": 11},
    ),
    "rslora with patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=EVERYWHERE, rank_pattern={"up_proj": 3}
    ),
    "one block": lambda: peft.LoraConfig(
        r=4, target_modules=EVERYWHERE, layers_to_transform=[1], layers_pattern="layers"
    ),
    "regex": lambda: peft.LoraConfig(r=4, target_modules=r".*layers\.\d\.(q|up)_proj"),
    "embedding": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
    "conv": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["conv"]),
    "modules to save": lambda: peft.LoraConfig(r=4, target_modules=EVERYWHERE, modules_to_save=["score"]),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=EVERYWHERE),
    "adalora": lambda: peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=6, total_step=10, target_modules=EVERYWHERE),
    "vera": lambda: peft.VeraConfig(r=6, target_modules=["q_proj"]),
    "vera by its seed": lambda: peft.VeraConfig(r=6, target_modules=["q_proj"], save_projection=False),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=EVERYWHERE),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=EVERYWHERE),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=EVERYWHERE),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_peft_adapter_is_the_change_that_peft_merges(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    base = write_base(model, tmp_path / "base")
    original = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, VARIANTS[name]())
    shake(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    layers = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules()}
    adapter = load_adapter(tmp_path / "adapter", base.layer)

    tuned = {n for n, m in layers.items() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}
    assert {m.path for m in adapter} == tuned and len(tuned) > 0
    for module, weight in base.stream(adapter):
        stored = layers[module.path].get_base_layer().weight.detach()
        assert torch.equal(weight, stored.T if module.kind == "embedding" else stored.flatten(1))
        if name not in ("dora", "ia3", "oft"):
            theirs = layers[module.path].get_delta_weight("default").detach()
            theirs = theirs.T if module.kind == "embedding" else theirs.flatten(1)
            assert torch.allclose(module.delta().float(), theirs, atol=1e-6, rtol=1e-6)
            if module.A is not None and module.B is not None:
                assert torch.allclose(module.scale * (module.B @ module.A), theirs, atol=1e-6, rtol=1e-6)
                U, S, V = module.factored()
                assert torch.allclose(((U * S) @ V.T).float(), theirs, atol=1e-6, rtol=1e-5)
    merged = wrapped.merge_and_unload()
    for module, weight in base.stream(adapter):
        after = merged.get_submodule(module.path).weight.detach()
        after = after.T if module.kind == "embedding" else after.flatten(1)
        assert torch.allclose(module.delta(weight).float(), after - weight, atol=2e-6, rtol=1e-5), module.path
    assert list(adapter.saved) == (["score"] if name == "modules to save" else [])
    if adapter.saved:
        assert torch.equal(adapter.saved["score"]["weight"], layers["score"].modules_to_save["default"].weight)
    assert all(torch.equal(original[k], v) for k, v in load_file(tmp_path / "base" / "model.safetensors").items())


def test_conv1d_layers_are_read_as_they_apply(tmp_path: Path) -> None:
    """GPT-2 stores (in, out); also a square one, whose shape does not tell."""
    torch.manual_seed(0)
    model = Toy(conv1d=True)
    base = write_base(model, tmp_path / "base", model_type="gpt2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=EVERYWHERE, fan_in_fan_out=True))
    shake(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    adapter = load_adapter(tmp_path / "adapter")
    shapes = {m.path: m.shape for m in adapter}
    assert shapes["layers.0.up_proj"] == (24, 12)
    for module, weight in base.stream(adapter):
        layer = wrapped.base_model.model.get_submodule(module.path)
        assert torch.equal(weight, layer.get_base_layer().weight.T)
        assert torch.allclose(module.delta().T.float(), layer.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_relative_to_a_moved_base_is_refused_until_it_is_converted(init: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    base = write_base(model, tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj"]))
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's conversion wants the start saved
    wrapped.save_pretrained(str(tmp_path / "start"))
    wrapped.peft_config["default"].init_lora_weights = init
    shake(wrapped)
    layer = wrapped.base_model.model.layers[0]["q_proj"]
    after = layer.get_base_layer().weight.detach() + layer.get_delta_weight("default").detach()
    wrapped.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(FileError, match="unconverted") as error:
        load_adapter(tmp_path / "raw", base.layer)  # the base as it was does not help
    assert "in no file" in str(error.value) and "path_initial_model_for_weight_conversion" in str(error.value)
    wrapped.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    module = load_adapter(tmp_path / "converted").modules[0]
    assert module.rank == 8  # the change s (B A - B0 A0) on the base as it was
    assert torch.allclose(module.delta().float(), after - base.matrix(module), atol=2e-6)


def test_parts_of_a_fused_layer_are_modules_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    base = write_base(model, tmp_path / "base")
    fused = {"c_attn": {"q": [[0, 12]], "k": [[12, 24]], "v": [[24, 36]]}}
    lk.attach(
        model, lk.LoRA(r=3, alpha=5), target_modules=["c_attn.q", "c_attn.v"], fused=fused, rank_pattern={"c_attn.v": 2}
    )
    shake(model)
    lk.save(model, tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    assert [(m.path, m.layer, m.shape, m.rank) for m in adapter][:2] == [
        ("layers.0.c_attn.q", "layers.0.c_attn", (12, 12), 3),
        ("layers.0.c_attn.v", "layers.0.c_attn", (12, 12), 2),
    ]
    _, layer, adapted = next(lk.adapters(model))
    change = adapted.merge(layer.weight.detach()) - layer.weight.detach()
    assert torch.allclose(adapter.modules[1].delta().float(), change[24:], atol=1e-6)
    assert torch.equal(base.matrix(adapter.modules[1]), layer.weight.detach()[24:])


def test_what_cannot_be_read_right_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    base = write_base(model, tmp_path / "base")
    lk.attach(model, lk.LoRA(r=3), target_modules=EVERYWHERE)
    shake(model)
    lk.save(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    config = tmp_path / "adapter" / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    key = next(iter(tensors))

    save_file({**tensors, key: torch.full_like(tensors[key], torch.nan)}, file)
    with pytest.raises(FileError, match="NaN"):
        load_adapter(tmp_path / "adapter")
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(FileError):
        load_adapter(tmp_path / "adapter")
    save_file({**tensors, "base_model.model.layers.0.extra.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(FileError, match="not used"):
        load_adapter(tmp_path / "adapter")
    save_file(tensors, file)
    for change, why in (
        ({"r": 5}, "wrong shape"),
        ({"use_qalora": True}, "cannot honour"),
        ({"peft_type": "NEW"}, "not a method"),
    ):
        config.write_text(json.dumps({**settings, **change}))
        with pytest.raises(FileError, match=why):
            load_adapter(tmp_path / "adapter")
    config.write_text(json.dumps(settings))

    other = write_base(
        nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(10, 12)})])}), tmp_path / "other"
    )
    adapter = load_adapter(tmp_path / "adapter")
    with pytest.raises(FileError, match="no weight"):
        list(other.stream(adapter))
    with pytest.raises(FileError, match=r"changes a matrix \[12, 12\]"):
        other.matrix(next(m for m in adapter if m.path == "layers.0.q_proj"))
    assert len(list(base.stream(adapter))) == 4


def test_a_method_whose_file_does_not_say_the_shapes_wants_the_base(tmp_path: Path) -> None:
    model = Toy()
    base = write_base(model, tmp_path / "base")
    lk.attach(model, lk.METHODS["bitfit"](), target_modules=EVERYWHERE)
    lk.save(model, tmp_path / "adapter")
    with pytest.raises(FileError, match="does not say the shapes"):
        load_adapter(tmp_path / "adapter")
    module = load_adapter(tmp_path / "adapter", base.layer).modules[0]
    assert not module.changes_matrix and not module.delta().any()


def test_dora_says_that_it_needs_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Toy()
    lk.attach(model, lk.METHODS["dora"](r=3), target_modules=EVERYWHERE)
    lk.save(model, tmp_path / "adapter")
    module = load_adapter(tmp_path / "adapter").modules[0]
    assert module.needs_base and module.magnitude is not None and module.A is not None
    with pytest.raises(UsageError, match="depends on the base weight"):
        module.delta()


class Experts(nn.Module):
    """Two stacks of three matrices, as (E, out, in), or as (E, in, out) where `is_transposed`."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        shapes = [(3, 12, 20), (3, 10, 12)] if transposed else [(3, 20, 12), (3, 12, 10)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.is_transposed = transposed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("named", [("gate_up_proj",), ("gate_up_proj", "down_proj")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_stacked_experts_are_read_one_by_one(transposed: bool, named: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(12, 12), "experts": Experts(transposed)})])}
    )
    base = write_base(model, tmp_path / "base")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj"],
        target_parameters=[f"experts.{n}" for n in named],
        rank_pattern={"experts.down_proj": 3} if len(named) == 2 else {},
    )
    wrapped = peft.get_peft_model(model, config)
    shake(wrapped)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    theirs = {m.parameter_name: m for m in wrapped.modules() if isinstance(m, peft.tuners.lora.layer.ParamWrapper)}
    adapter = load_adapter(tmp_path / "adapter", base.layer)
    assert [m.path for m in adapter if m.kind == "linear"] == ["layers.0.q_proj"]
    found = {m.path: (m, weight) for m, weight in base.stream(adapter) if m.kind == "expert"}
    assert set(found) == {f"layers.0.experts.{n}.{e}" for n in named for e in range(3)}
    for path, (module, weight) in found.items():
        name, e = path.split(".")[-2:]
        stack, delta = (
            t[int(e)].detach() for t in (theirs[name].get_param(), theirs[name].get_delta_weight("default"))
        )
        assert torch.equal(weight, stack.T if transposed else stack)
        assert torch.allclose(module.delta().float(), delta.T if transposed else delta, atol=1e-6)
        assert module.rank == (3 if name == "down_proj" else 2)
    if len(named) == 2:  # the file alone does not say which factors belong to which parameter
        with pytest.raises(FileError, match="does not say which factors"):
            load_adapter(tmp_path / "adapter")
    else:
        assert len(load_adapter(tmp_path / "adapter")) == 4


# --- base weights -------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, paths: dict[str, nn.Module]) -> Path:
    """Save a LoRA on layers of these paths."""
    root = nn.Module()
    for path, layer in paths.items():
        module = root
        *owners, leaf = path.split(".")
        for owner in owners:
            if owner not in module._modules:
                module.add_module(owner, nn.Module())
            module = module.get_submodule(owner)
        module.add_module(leaf, layer)
    lk.attach(root, lk.LoRA(r=2), target_modules=list(paths))
    return lk.save(root, tmp_path / "adapter")


def test_names_with_other_prefixes_and_tied_heads_are_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {
        "language_model.model.layers.0.q_proj.weight": torch.randn(6, 6),
        "language_model.model.layers.1.q_proj.weight": torch.randn(6, 6),
        "vision_tower.encoder.layers.0.q_proj.weight": torch.randn(6, 6),
        "language_model.model.embed_tokens.weight": torch.randn(9, 6),
    }
    directory = tmp_path / "base"
    directory.mkdir()
    names = list(weights)
    for i, name in enumerate(names):
        save_file({name: weights[name]}, directory / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text("{}")
    base = BaseWeights(directory)
    layers = {"model.language_model.layers.1.q_proj": nn.Linear(6, 6), "lm_head": nn.Linear(6, 9)}
    adapter = load_adapter(saved(tmp_path, layers))
    found = {m.path: weight for m, weight in base.stream(adapter)}
    assert torch.equal(found["model.language_model.layers.1.q_proj"], weights[names[1]])
    assert torch.equal(found["lm_head"], weights[names[3]])
    assert base.key("model.language_model.layers.0.q_proj") == names[0]
    with pytest.raises(FileError, match="it could be"):
        base.key("other.layers.0.q_proj")


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_checkpoints_are_read_back(kind: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    W = torch.randn(64, 128)
    for double in (False, True):
        made = bnb.nn.Params4bit(W, quant_type=kind, compress_statistics=double, blocksize=64).to("cpu")
        parts = {f"layers.0.x.weight.{k}": v for k, v in made.quant_state.as_dict(packed=True).items()}
        directory = tmp_path / f"base{double}"
        directory.mkdir()
        save_file({"layers.0.x.weight": made.data, **parts}, directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
        base = BaseWeights(directory)
        assert base.layer("layers.0.x").shape[:2] == (64, 128)
        (module,) = load_adapter(saved(tmp_path / str(double), {"layers.0.x": nn.Linear(128, 64)}))
        assert torch.equal(base.matrix(module), bnb.functional.dequantize_4bit(made.data, made.quant_state))


def test_eight_bit_checkpoints_are_read_back_and_others_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (module,) = load_adapter(saved(tmp_path, {"layers.0.x": nn.Linear(160, 192)}))
    W = torch.randn(192, 160)

    def read(weight: Tensor, config: dict[str, Any] | None = None, **others: Tensor) -> Tensor:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        directory.mkdir()
        save_file(
            {"layers.0.x.weight": weight} | {f"layers.0.x.{k}": v for k, v in others.items()},
            directory / "model.safetensors",
        )
        (directory / "config.json").write_text(json.dumps(config or {}))
        return BaseWeights(directory).matrix(module)

    rows = W.abs().amax(1)
    whole = (W * (127 / rows[:, None])).round().to(torch.int8)
    assert torch.allclose(read(whole, SCB=rows), W, atol=float(rows.max()) / 250)
    eight = torch.float8_e4m3fn
    blocks = torch.stack([torch.stack([b.abs().max() / 448 for b in row.split(128, 1)]) for row in W.split(128, 0)])
    spread = blocks.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :160]
    assert torch.allclose(read((W / spread).to(eight), weight_scale_inv=blocks), W, atol=0.15, rtol=0.07)
    by_row = rows[:, None] / 448
    assert torch.allclose(read((W / by_row).to(eight), weight_scale=by_row), W, atol=0.15, rtol=0.07)
    one = (rows.max() / 448).reshape(1)
    assert torch.allclose(read((W / one).to(eight), weight_scale=one), W, atol=0.15, rtol=0.07)
    with pytest.raises(FileError, match="without a scale"):
        read(W.to(eight))
    with pytest.raises(FileError, match="gptq"):
        read(torch.zeros(192, 160, dtype=torch.int32), {"quantization_config": {"quant_method": "gptq"}})


def test_the_block_of_a_path() -> None:
    assert block_of("model.layers.12.mlp.up_proj") == (12, "mlp.up_proj")
    assert block_of("h.3.attn.c_attn.q") == (3, "attn.c_attn.q")
    assert block_of("lm_head") == (None, "lm_head")


def test_an_additive_method_has_factors_that_give_its_change(tmp_path: Path) -> None:
    """A start that is taken off again is one pair of factors in the file."""
    torch.manual_seed(0)
    model = Toy()
    lk.attach(model, lk.LoRA(r=3, init="pissa"), target_modules=["q_proj"])
    shake(model)
    lk.save(model, tmp_path / "adapter")
    _, _, adapted = next(lk.adapters(model))
    assert isinstance(adapted, AdditiveAdapter)
    module = load_adapter(tmp_path / "adapter").modules[0]
    assert module.rank == 6 and torch.allclose(module.delta().float(), adapted.delta_weight(), atol=1e-6)


def test_copies_of_base_weights_in_the_file_are_no_part_of_the_change(tmp_path: Path) -> None:
    """PEFT writes the embedding itself beside its factors if the vocabulary may have grown."""
    torch.manual_seed(0)
    model = Toy()
    lk.attach(model, lk.LoRA(r=3), target_modules=["embed_tokens"])
    shake(model)
    lk.save(model, tmp_path / "adapter")
    expected = load_adapter(tmp_path / "adapter").modules[0].delta()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    copy = {"base_model.model.embed_tokens.base_layer.weight": model.embed_tokens.weight.detach().clone()}
    save_file({**load_file(file), **copy}, file)
    adapter = load_adapter(tmp_path / "adapter")
    assert torch.equal(adapter.modules[0].delta(), expected) and adapter.notes == (
        "copies of base weights in the file: 1",
    )
