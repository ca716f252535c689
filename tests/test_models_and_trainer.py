"""Whole transformers models of several families: an adapter's life on them, export, the Trainer, torch.compile."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
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
    Trainer,
    TrainingArguments,
)

import lorakit as lk

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

VOCABULARY = 64


def llama() -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    special = {"tie_word_embeddings": True, "pad_token_id": 0, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, vocab_size=VOCABULARY))


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special, vocab_size=VOCABULARY))


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=VOCABULARY, num_labels=3))


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0)
    )


FAMILIES: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "t5": "embed_tokens"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def inputs() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output(model: Any) -> Tensor:
    decoder = {"decoder_input_ids": inputs()} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=inputs(), **decoder).logits


@torch.no_grad()
def perturb(model: nn.Module, size: float = 0.2) -> None:
    torch.manual_seed(2)
    for _, _, adapter in lk.adapters(model):
        for p in adapter.parameters():
            p.add_(size * torch.randn_like(p))


def write(model: Any) -> Tensor:
    """Generate, greedily."""
    return model.generate(inputs(), max_new_tokens=8, do_sample=False)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_life_of_an_adapter(family: str, tmp_path: Path) -> None:
    model = build(family)
    keys, base = set(model.state_dict()), output(model)
    head = {"modules_to_save": ["classifier"]} if family == "bert" else {}
    lk.attach(model, lk.LoRA(r=4), **head)
    assert torch.equal(output(model), base), "attaching changes no bit"
    assert keys <= set(model.state_dict())
    perturb(model)
    adapted = output(model)
    assert (adapted - base).abs().max() > 0.1
    with lk.disabled(model):
        assert torch.equal(output(model), base)

    weights = {name: (p, p.clone()) for name, p in model.named_parameters()}
    close(output(lk.merge(model)), adapted)
    assert torch.equal(output(lk.unmerge(model)), adapted)
    assert all(p is weights[name][0] and torch.equal(p, weights[name][1]) for name, p in model.named_parameters())

    lk.save(model, tmp_path / "a")
    assert torch.equal(output(lk.load(build(family), tmp_path / "a")), adapted)
    lk.detach(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(output(model), base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generating_with_a_cache(family: str) -> None:
    """Step by step with a cache, merged or not, the same tokens come out; the base writes its own."""
    model = build(family)
    plain = write(model)
    perturb(lk.attach(model, lk.LoRA(r=4)), 0.5)
    adapted = write(model)
    assert not torch.equal(adapted, plain)
    with lk.disabled(model):
        assert torch.equal(write(model), plain)
    assert torch.equal(write(lk.merge(model)), adapted)
    assert torch.equal(write(lk.unmerge(model)), adapted)
    if family != "t5":  # one pass over what was written gives the same choices
        logits = model(input_ids=adapted[:, :-1]).logits
        assert torch.equal(logits[:, -8:].argmax(-1), adapted[:, -8:])


# Export: a merged model is an ordinary model


@pytest.mark.parametrize("what", ["linear", "embedding", "both"])
def test_a_merged_model_saved_and_loaded_is_the_same(family: str, what: str, tmp_path: Path) -> None:
    model, reference = build(family), build(family)
    targets: dict[str, Any] = {"linear": "all-linear", "embedding": [EMBEDDING[family]]}
    perturb(lk.attach(model, lk.LoRA(r=4), target_modules=targets["embedding" if what == "embedding" else "linear"]))
    if what == "both":
        lk.merge(model, keep=False)
        lk.detach(model)
        perturb(lk.attach(model, lk.LoRA(r=4), target_modules=targets["embedding"]))
    adapted = output(model)
    assert (adapted - output(reference)).abs().max() > 1e-2
    lk.detach(lk.merge(model, keep=False))
    close(output(model), adapted)
    model.save_pretrained(tmp_path / "merged")
    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), "no key is missing, unexpected or of the wrong shape"
    close(output(again), adapted)
    reference.save_pretrained(tmp_path / "base")
    size, before = (sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("merged", "base"))
    if what == "linear":
        assert size <= 1.01 * before, "what was tied is still stored once"


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_one_side_of_a_tied_pair(side: str) -> None:
    """An adapter on the embedding changes what goes in and not what comes out, or the reverse: merging unties them."""
    model, other = build("llama"), "lm_head" if side == "embed_tokens" else "model.embed_tokens"
    path = f"model.{side}" if side == "embed_tokens" else side
    shared = model.lm_head.weight
    assert model.model.embed_tokens.weight is shared
    before = shared.clone()
    perturb(lk.attach(model, lk.LoRA(r=4), target_modules=[side]))
    adapted = output(model)
    lk.merge(model)
    assert model.get_submodule(other).weight is shared
    assert torch.equal(shared, before)
    assert model.get_submodule(path).weight is not shared
    close(output(model), adapted)
    lk.unmerge(model)
    assert model.get_submodule(path).weight is shared, "tied again: the same object"
    assert torch.equal(output(model), adapted)


def test_both_sides_of_a_tied_pair_are_two_adapters(tmp_path: Path) -> None:
    model = build("llama")
    perturb(lk.attach(model, lk.LoRA(r=4), target_modules=["embed_tokens", "lm_head"]))
    adapted = output(model)
    lk.save(model, tmp_path / "a")
    assert torch.equal(output(lk.load(build("llama"), tmp_path / "a")), adapted)
    close(output(lk.merge(model)), adapted)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


# Inside the transformers Trainer

PATTERN = [5, 9, 3, 7, 11, 13, 8, 4]


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    """Rows that a model can learn: each token follows from the one before it."""
    turned = [PATTERN[i % 8 :] + PATTERN[: i % 8] for i in range(count)]
    return [{"input_ids": row, "labels": row} for row in turned]


def trainer(model: Any, directory: Path, data: list[dict[str, Any]] | None = None, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return Trainer(model, TrainingArguments(**{**defaults, **settings}), train_dataset=data or rows())


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{n}": p.detach().clone() for path, _, a in lk.adapters(model) for n, p in a.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_training_moves_the_adapter_and_nothing_else(family: str, tmp_path: Path) -> None:
    model = build(family)
    data, head = (None, {})
    if family == "bert":
        data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(rows(3) * 5)]
        head = {"modules_to_save": ["classifier"]}
    lk.attach(model, lk.LoRA(r=4), **head)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path, data, max_steps=30)
    run.train()
    assert sum(losses(run)[-3:]) < 0.7 * sum(losses(run)[:3])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert (
        moved
        == {name for name in before if ".adapters.default." in name}
        == {n for n, p in model.named_parameters() if p.requires_grad}
    )
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} <= {
        id(p) for p in model.parameters() if p.requires_grad
    }
    lk.detach(model)
    assert torch.equal(output(model), output(build(family)))


def test_what_the_trainer_saves(tmp_path: Path) -> None:
    """`save_model` writes the base as it was with the adapter beside it; the base is read from it unchanged."""
    model = lk.attach(build("llama"), lk.LoRA(r=4))
    run = trainer(model, tmp_path / "run")
    run.train()
    adapted, held = output(model), learned(model)
    run.save_model(str(tmp_path / "saved"))
    assert torch.equal(output(model), adapted), "saving changes nothing in memory"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    base, report = LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert torch.equal(output(base), output(build("llama")))
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == {name for name in model.state_dict() if ".adapters." in name}
    with pytest.raises(lk.LorakitError, match="something else"):
        lk.save(model, tmp_path / "saved")  # would replace the model that lies there
    lk.save(model, tmp_path / "adapter")
    assert torch.equal(output(lk.load(base, tmp_path / "adapter")), adapted)
    assert all(torch.equal(p, held[name]) for name, p in learned(base).items())


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = lk.attach(build("llama"), lk.LoRA(r=4))
    trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=6).train()
    torch.manual_seed(5)
    resumed = lk.attach(build("llama"), lk.LoRA(r=4))
    run = trainer(resumed, tmp_path / "resumed")
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert run.state.global_step == 12
    expected = learned(whole)
    assert all(torch.equal(p, expected[name]) for name, p in learned(resumed).items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_result(reentrant: bool, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = lk.attach(build("llama"), lk.LoRA(r=4))
        calls = []
        model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        trainer(model, tmp_path, gradient_checkpointing=checkpointing, max_steps=4, **settings).train()
        results.append((learned(model), len(calls)))
    (plain, once), (recomputed, twice) = results
    assert twice == 2 * once, "the blocks were run again in the backward pass"
    for name, p in plain.items():
        torch.testing.assert_close(recomputed[name], p, rtol=1e-5, atol=1e-6)


# torch.compile


def test_a_whole_adapted_model_compiles_into_one_graph() -> None:
    """The same logits and gradients as without; switching off is noticed; a step of training compiles nothing anew."""
    model = build("llama")
    base = output(model)
    perturb(lk.attach(model, lk.LoRA(r=4)))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def gradients(run: Any) -> dict[str, Tensor]:
        model.zero_grad()
        logits = run(input_ids=inputs(), use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs()[:, 1:].flatten()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients(model), gradients(compiled)
    assert expected.keys() == got.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
    perturb(model)
    gradients(compiled)
    assert counter.frame_count == 1, "new values of the adapter need no new graph"
    with torch.no_grad():
        close(compiled(input_ids=inputs(), use_cache=False).logits, model(input_ids=inputs(), use_cache=False).logits)
        lk.use(model, None)
        close(compiled(input_ids=inputs(), use_cache=False).logits, base)
