"""Lower rank: the errors that are reported are those of the files, the best ones there are, and PEFT reads the files."""

import json
from pathlib import Path

import pytest
import torch
from planted import adapter, basis, llama, normal, opened, peft_logits
from safetensors.torch import load_file
from torch import Tensor

import lorakit as lk
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.compress import Compressed, Cut, as_lora, compress
from lorakit.analysis.input_moments import InputMoments
from lorakit.analysis.loaded import LoadedAdapter, load_adapter
from lorakit.analysis.lora_files import write_lora
from lorakit.analysis.rowwise import Rows
from lorakit.core.errors import UsageError
from lorakit.data import Example

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft.*"
)  # PEFT about its own defaults


def of_spectrum(*sigma: float):
    """Factors of a change with these singular values (scale 2 included) in every layer."""

    def fill(path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        q = len(sigma)
        U, V = basis(len(B), q, seed=len(path)), basis(A.shape[1], q, seed=len(path) + 99)
        mix = torch.randn(q, q, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return torch.linalg.inv(mix) @ V.T, U * (torch.tensor(sigma) / 2) @ mix

    return fill


def written(
    found: Compressed, source: LoadedAdapter, directory: Path, base: BaseWeights | None = None
) -> LoadedAdapter:
    directory.mkdir()
    write_lora(directory, as_lora(source, found, base))
    return load_adapter(directory)


def test_the_truncation_of_a_known_spectrum(tmp_path: Path) -> None:
    """F3: of (5, 3, 1, 1/2) rank 2 leaves sqrt(1.25) in Frobenius norm and 1 in spectral norm."""
    base = llama(tmp_path / "base")
    source = load_adapter(adapter(base, tmp_path / "a", of_spectrum(5, 3, 1, 0.5)))
    found = compress(source, Cut(rank=2))
    whole = (25 + 9 + 1 + 0.25) ** 0.5
    for m in found.modules:
        assert m.numbers["weight_error"].value == pytest.approx(1.25**0.5 / whole, rel=1e-5)
        assert m.numbers["weight_error"].inputs["least"] == pytest.approx(1.25**0.5 / whole, rel=1e-6)
        assert m.numbers["spectral_error"].value == pytest.approx(1 / 5, rel=1e-5)
    assert found.numbers["predicted_lost_gain"].value == pytest.approx(1.25 / whole**2, rel=1e-4)
    assert found.parameters == (2 * sum(4 * sum(m.module.shape) // 2 for m in found.modules), found.parameters[0] // 2)
    again = written(found, source, tmp_path / "b")
    for m, old in zip(again, source, strict=True):
        assert (m.path, m.rank, m.scale) == (old.path, 2, 2.0)
        assert float((m.delta() - old.delta()).norm()) == pytest.approx(1.25**0.5, rel=1e-5)


@pytest.mark.parametrize(("tol", "rank"), [(0.0, 4), (0.0069, 4), (0.0072, 3), (0.0354, 3), (0.0356, 2), (0.5, 1)])
def test_the_tolerance_is_a_share_of_the_energy(tmp_path: Path, tol: float, rank: int) -> None:
    """Of (5, 3, 1, 1/2) the last has 0.00709 of the energy, the last two 0.03546."""
    base = llama(tmp_path / "base")
    source = load_adapter(adapter(base, tmp_path / "a", of_spectrum(5, 3, 1, 0.5), target_modules=["q_proj"]))
    assert [len(m.A) for m in compress(source, Cut(tol=tol)).modules] == [rank, rank]


def test_peft_reads_other_ranks_for_other_layers(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    draw = normal(size=0.3)

    def fill(path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A, B = draw(path, A, B)
        return A, B * torch.logspace(0, -2 if "layers.1" in path else -1, len(A))

    method = lk.LoRA(r=6, alpha=9, rank_stabilized=True)
    made = adapter(base, tmp_path / "a", fill, method, modules_to_save=["norm"], alpha_pattern={"v_proj": 3.0})
    source = load_adapter(made)
    again = written(compress(source, Cut(tol=0.02)), source, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values()) | {config["r"]}) > 1
    assert config["use_rslora"] is False
    for path, r in config["rank_pattern"].items():
        assert config["alpha_pattern"][path] / r == pytest.approx(config["lora_alpha"] / config["r"], rel=1e-15)
    ids = torch.arange(40)[None] % 128
    model = opened(base)
    lk.load(model, tmp_path / "b")
    with torch.no_grad():
        ours = model(input_ids=ids).logits.double()
    torch.testing.assert_close(peft_logits(base, tmp_path / "b", ids), ours, atol=1e-5, rtol=1e-5)
    exact = written(compress(source, Cut(rank=6)), source, tmp_path / "c")
    full = peft_logits(base, made, ids)
    torch.testing.assert_close(peft_logits(base, tmp_path / "c", ids), full, atol=2e-4, rtol=0)
    assert (ours - full).abs().max() > 2e-2, "what was cut shows"
    assert list(again.saved) == list(exact.saved) == ["model.norm"]


def rows_for(base: Path, count: int = 12) -> Rows:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 8, (20,), generator=generator).tolist() for _ in range(count)]  # 8 of 128 tokens
    return Rows(opened(base), [Example(i, i, None, "x") for i in ids], pad_id=0)  # ty: ignore[invalid-argument-type]


def test_activation_aware_is_best_for_the_outputs_and_svd_for_the_weights(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    made = adapter(base, tmp_path / "a", normal(size=0.05), lk.LoRA(r=8, alpha=8))
    source, rows = load_adapter(made), rows_for(base)
    lk.load(rows.model, made)
    moments = InputMoments(rows.model, [m.layer for m in source], rows, at_once=200_000)  # several passes
    aware, plain = compress(source, Cut(rank=3), moments=moments), compress(source, Cut(rank=3))
    assert set(aware.numbers) == {"weight_error", "output_error", "predicted_lost_gain"}
    by_path = {m.module.path: m for m in plain.modules}
    inputs: dict[str, list[Tensor]] = {}
    layers = [(m.layer, rows.model.get_submodule(m.layer)) for m in source]
    hooks = [
        layer.register_forward_hook(lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0][0]))
        for name, layer in layers
    ]
    with torch.no_grad():
        for i in range(len(rows)):
            rows.predict([i])
    for hook in hooks:
        hook.remove()
    for m in aware.modules:
        X, D = torch.cat(inputs[m.module.layer]).double(), m.module.delta()
        ours, svd = (D - aware.scale * own.B.double() @ own.A.double() for own in (m, by_path[m.module.path]))
        wanted = float((X @ ours.T).norm() / (X @ D.T).norm())
        assert m.numbers["output_error"].value == pytest.approx(wanted, rel=1e-3)
        assert wanted <= float((X @ svd.T).norm() / (X @ D.T).norm()) * (1 + 1e-6)
        assert m.numbers["weight_error"].value >= by_path[m.module.path].numbers["weight_error"].value * (1 - 1e-6)
    apart = [
        m.numbers["weight_error"].value - by_path[m.module.path].numbers["weight_error"].value for m in aware.modules
    ]
    assert max(apart) > 0.01, "the inputs made a difference"


def test_what_the_source_stores_in_bfloat16_is_measured_in_bfloat16(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    made = adapter(base, tmp_path / "a", of_spectrum(5, 3, 1, 0.5), target_modules=["q_proj"])
    file = made / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    source = load_adapter(made)
    found = compress(source, Cut(rank=4))
    again = written(found, source, tmp_path / "b")
    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    for m, new, old in zip(found.modules, again, source, strict=True):
        error = float((new.delta() - old.delta()).norm() / old.delta().norm())
        assert m.numbers["weight_error"].value == pytest.approx(error, rel=1e-6)
        assert 1e-4 < error < 1e-2, "rounding alone: no direction was cut"


def test_embeddings_convolutions_and_fused_parts(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(base)
    model = opened(base)
    lk.attach(model, lk.LoRA(r=4), target_modules=["c_attn.q", "c_attn.v", "wte", "c_fc"])
    draw = normal(3)
    with torch.no_grad():
        for _, _, own in lk.adapters(model):
            for key, p in own.named_parameters():
                p.copy_(draw("", p, p)[0] * 0.05 if key.endswith("A") else draw("", p, p)[1])
    lk.save(model, tmp_path / "a", base="gpt2")
    source = load_adapter(tmp_path / "a", BaseWeights(base).layer)
    written(compress(source, Cut(rank=4)), source, tmp_path / "same")
    ids = torch.arange(40)[None] % 128
    torch.testing.assert_close(
        peft_logits(base, tmp_path / "same", ids), peft_logits(base, tmp_path / "a", ids), atol=1e-5, rtol=1e-5
    )
    again = written(compress(source, Cut(rank=2)), source, tmp_path / "b")
    assert {m.path: m.rank for m in again}["transformer.h.0.attn.c_attn"] == 4, "two parts of rank 2"
    assert {m.kind for m in again} == {"linear", "embedding"}


def test_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 2))
    lk.attach(model, lk.LoRA(r=4, alpha=4), target_modules=["0", "2"])
    with torch.no_grad():
        for _, _, own in lk.adapters(model):
            own.lora_B.normal_()
    lk.save(model, tmp_path / "a", base="conv")
    x = torch.randn(2, 3, 9, 9)
    wanted = model(x)
    source = load_adapter(tmp_path / "a")
    written(compress(source, Cut(rank=4)), source, tmp_path / "b")
    lk.load(lk.detach(model), tmp_path / "b")
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


def test_methods_that_are_no_product_of_factors(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    model = opened(base)
    lk.attach(model, lk.LoHa(r=2), target_modules=["q_proj"])
    for _, _, own in lk.adapters(model):
        for p in own.parameters():
            p.data.normal_()
    lk.save(model, tmp_path / "loha", base="x")
    source = load_adapter(tmp_path / "loha")
    found = compress(source, Cut(rank=4))  # a product of two rank-2 matrices, entry by entry, has rank 4
    assert found.numbers["weight_error"].value < 1e-5
    for new, old in zip(written(found, source, tmp_path / "b"), source, strict=True):
        torch.testing.assert_close(new.delta(), old.delta(), atol=1e-4, rtol=1e-5)
    dora = load_adapter(adapter(base, tmp_path / "dora", normal(), lk.DoRA(r=2), target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="not low-rank"):
        compress(dora, Cut(rank=2))
    weights = BaseWeights(base)
    near = compress(dora, Cut(rank=64), weights)
    assert near.numbers["weight_error"].value < 1e-5, "at full rank it is the DoRA itself"
    model = opened(base)
    lk.attach(model, lk.Houlsby(bottleneck=4), target_modules=["down_proj"])
    lk.save(model, tmp_path / "h")
    with pytest.raises(UsageError, match="cannot be written as a LoRA"):
        compress(load_adapter(tmp_path / "h", weights.layer), Cut(rank=2), weights)
