"""The probe is the exact computation done with thin matrices; the rank it advises is the one that was planted."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.analysis.advice import advise, first_steps, half_curve, method_block, targets
from lorakit.analysis.probe import Probe, places, probe
from lorakit.analysis.rowwise import Rows
from lorakit.core.errors import UsageError
from lorakit.core.kinds import is_linear
from lorakit.core.target import Target
from lorakit.data.dataset import Example
from lorakit.theory import gradients
from lorakit.theory import probe as exact
from lorakit.train.config_file import loads

VOCABULARY, WIDTH = 64, 48


class NextToken(nn.Module):
    """Logits of the next token from the present one: a table of random vectors and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            self.layer.weight.mul_(0.1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.layer(self.table(input_ids)))


def planted(rank: int, seed: int, n: int = 64, length: int = 64) -> Rows:
    """Rows drawn from the model with a change of this rank, all its singular values the same."""
    torch.manual_seed(seed)
    model = NextToken().requires_grad_(False)
    U, V = (torch.linalg.qr(torch.randn(side, rank))[0] for side in (VOCABULARY, WIDTH))
    teacher = model.layer.weight + 8.0 / rank**0.5 * (U @ V.T)
    chain = (model.table.weight @ teacher.T).softmax(-1)
    rows = torch.randint(VOCABULARY, (n, 1))
    for _ in range(length - 1):
        rows = torch.cat([rows, torch.multinomial(chain[rows[:, -1]], 1)], 1)
    return Rows(model, [Example(row, [-100, *row[1:]], None, "row") for row in rows.tolist()], 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_advised_rank_is_the_planted_one_within_one_doubling(rank: int, seed: int) -> None:
    rows = planted(rank, seed)
    found = advise(probe(rows.model, places(rows.model, Target()), rows))
    assert found.rank is not None
    assert rank / 2 <= found.rank <= 2 * rank
    low, high = found.band
    assert low is not None
    assert high is not None
    assert low <= found.rank <= high


def test_rows_without_anything_to_learn_give_no_rank() -> None:
    """Rows that the base model wrote itself: its gradient on them is noise, of full rank by the usual measure."""
    torch.manual_seed(4)
    model = NextToken().requires_grad_(False)
    chain = (model.table.weight @ model.layer.weight.T).softmax(-1)
    rows = torch.randint(VOCABULARY, (32, 1))
    for _ in range(31):
        rows = torch.cat([rows, torch.multinomial(chain[rows[:, -1]], 1)], 1)
    given = Rows(model, [Example(row, [-100, *row[1:]], None, "row") for row in rows.tolist()], 0)
    found = advise(probe(model, places(model, Target()), given))
    assert found.rank is None
    assert found.silent == ["layer"]
    assert "confidence: none" in method_block(found)


def dense(rows: Rows, weight: Tensor, indices: list[int]) -> Tensor:
    """The mean gradient of some rows by a weight, the ordinary way."""
    weight.requires_grad_(True)
    scale = float(rows.weights().mean())
    sums = [torch.autograd.grad(rows.predict([i]).losses().sum() / scale, weight)[0] for i in indices]
    weight.requires_grad_(False)
    return torch.stack(sums).mean(0)


@pytest.mark.parametrize(("top", "tolerance"), [(64, 1e-3), (24, 0.03)])
def test_the_curve_is_that_of_the_dense_gradients(top: int, tolerance: float) -> None:
    """With as many directions as the matrix has they are the same; with half of them the sketch still follows."""
    rows = planted(4, 0, n=32)
    model: Any = rows.model
    found = probe(model, places(model, Target()), rows, top=top)
    halves = [[i for i in range(32) if int(found.half[i]) == h] for h in (0, 1)]
    G = [dense(rows, model.layer.weight, own) for own in halves]
    wanted = exact.cross_validated(G[0], G[1], 16)
    measured = half_curve(found, found.modules[0])
    assert measured.signal == pytest.approx(wanted.signal, rel=10 * tolerance)
    assert measured.captured[:16] == pytest.approx(wanted.captured, abs=tolerance)
    noise = torch.stack([dense(rows, model.layer.weight, [i]).square().sum() for i in range(32)]).mean()
    assert float(found.modules[0].squares.mean()) == pytest.approx(float(noise), rel=0.15)


def test_the_signal_is_unbiased_whatever_the_sketch_misses() -> None:
    """The estimate from one direction and 16 fresh ones, over many draws, has the mean of the exact product."""
    rows = planted(4, 0, n=8, length=24)
    model: Any = rows.model
    chosen = places(model, Target())
    estimates, wanted = [], []
    for seed in range(40):
        found = probe(model, chosen, rows, top=1, seed=seed)
        halves = [[i for i in range(8) if int(found.half[i]) == h] for h in (0, 1)]
        G = [dense(rows, model.layer.weight, own) for own in halves]
        estimates.append(half_curve(found, found.modules[0]).signal)
        wanted.append(float((G[0] * G[1]).sum()))
    error = torch.tensor(estimates) - torch.tensor(wanted)
    assert abs(float(error.mean())) < 3 * float(error.std()) / 40**0.5
    assert float(error.std()) > 0  # one direction does miss something


def test_a_model_is_left_as_it_was_and_weights_get_no_gradient() -> None:
    rows = planted(2, 0, n=4, length=8)
    model: Any = rows.model
    model.train()
    model.layer.weight.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probe(model, places(model, Target()), rows)
    assert model.training
    assert model.layer.weight.requires_grad
    assert model.layer.weight.grad is None
    assert not model.layer._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --- models with names ---------------------------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def probed(request: pytest.FixtureRequest) -> tuple[Any, Probe]:
    model = tiny(request.param)
    rows = [Example(e.input_ids, e.labels, None, "row") for e in planted(2, 0, n=12, length=24).examples]
    return model, probe(model, places(model, Target()), Rows(model, rows, 0))


def test_every_choice_is_measured_at_the_same_budget(probed: tuple[Any, Probe]) -> None:
    _, found = probed
    budget = 4000
    advice = advise(found, budget)
    assert [c.name for c in advice.choices] == ["q", "v", "q + v", "q, k, v, o", "all layers"]
    for choice in advice.choices:
        each = sum(m.parameters for m in choice.modules)
        most = max(min(m.place.shape) for m in choice.modules)
        assert choice.parameters <= budget
        assert choice.rank == min(budget // each, most)
        if choice.rank:
            assert choice.share is not None
            captured = sum(m.at(choice.rank) for m in choice.modules)
            signal = sum(m.signal for m in found.modules)
            halves = [(captured[found.half == h].mean(), signal[found.half == h].mean()) for h in (0, 1)]
            assert choice.share.value == pytest.approx(float(sum(c for c, _ in halves) / sum(s for _, s in halves)))
    assert advise(found, 10).choices[0].rank == 0
    shares = sum(number.value for number in advice.shares.values())
    assert shares == pytest.approx(1.0)


def test_the_targets_name_the_modules_and_no_others(probed: tuple[Any, Probe]) -> None:
    import lorakit as lk
    from lorakit.core.attach import places as places_of

    model, found = probed
    for choice in advise(found).choices:
        names = targets(choice.modules, found.modules)
        chosen = {
            site.name for spot in places_of(model, lk.LoRA(r=2), Target(target_modules=names)) for site in spot.sites
        }
        assert chosen == {m.place.name for m in choice.modules}, choice.name


def test_the_method_section_is_one_that_train_takes(probed: tuple[Any, Probe]) -> None:
    found = advise(probed[1])
    config, notices = loads(method_block(found), ["model=m", "data=d.jsonl", "output=o"])
    own: Any = config.method.config
    assert (config.method.name, own.r, own.alpha) == ("lora", found.used, 2 * found.used)
    assert not notices
    named = config.method.target.target_modules
    everything = [p for p, layer in probed[0].named_modules() if is_linear(layer) and "head" not in p]
    whole = {m.place.path for m in found.probe.modules}
    fused = any(m.place.rows is not None for m in found.probe.modules)
    assert named == (["c_fc", "c_proj", "k", "q", "v"] if fused else "all-linear")
    assert whole == set(everything)


def test_the_first_steps_are_those_of_the_formula(probed: tuple[Any, Probe]) -> None:
    modules = probed[1].modules[:1]
    out = modules[0].place.shape[0]
    for step in first_steps(modules, 8):
        wanted = gradients.adam_first_update(out, step.r, step.alpha / step.r, step.lr) / modules[0].weight_norm
        assert step.rho == pytest.approx(wanted)
        assert step.remark == ("too hot" if wanted > 1e-2 else "inert" if wanted < 1e-6 else "")


def test_too_few_rows_and_modules_that_never_run_are_refused() -> None:
    rows = planted(1, 0, n=3, length=8)
    with pytest.raises(UsageError, match="halves"):
        probe(rows.model, places(rows.model, Target()), rows)
    more = planted(1, 0, n=4, length=8)
    more.model.idle = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="idle"):
        probe(more.model, places(more.model, Target()), more)


def test_a_quantized_base_is_probed_like_the_weights_it_holds() -> None:
    pytest.importorskip("bitsandbytes")
    from lorakit.models.quantize import dequantize, quantize

    rows = planted(2, 0, n=6, length=16)
    model = tiny("llama")
    quantize(model, "nf4")
    given = Rows(model, rows.examples, 0)
    stored = probe(model, places(model, Target()), given)
    dequantize(model)
    plain = probe(model, places(model, Target()), given)
    for a, b in zip(stored.modules, plain.modules, strict=True):
        assert a.signal == pytest.approx(b.signal, rel=0.05, abs=0.05 * float(b.signal.abs().max()))


def test_the_command_prints_a_section_that_trains(
    tiny_model: Path, rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli.main import run

    data = rows(10)
    arguments = ["advise", "--base", tiny_model, "--data", data, "--rows", 8, "--dtype", "float32", "--budget", 3000]
    assert run([str(a) for a in [*arguments, "--json"]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 8
    assert {c["name"] for c in found["choices"]} == {"q", "v", "q + v", "q, k, v, o", "all layers"}
    config = tmp_path / "config.yaml"
    head = f"model: {tiny_model}\ndata: {data}\noutput: {tmp_path / 'run'}\n"
    config.write_text(head + found["method"])
    assert run(["train", "-q", str(config), "--max-steps", "1", "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == 0
    out = capsys.readouterr().out
    assert found["method"] in out
    assert "3,000 parameters on" in out
