"""aLoRA: where it is active, against a search written out token by token, against LoRA, the base model and PEFT."""

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.core.errors import UsageError
from lorakit.core.tokens import NONE, Tokens
from lorakit.methods.alora import active
from lorakit.models import enable_packing
from lorakit.models.modes import checkpoint_activations

ALoRA = lk.METHODS["alora"]
CALL = (7, 8, 9)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's and transformers'


def llama(blocks: int = 2) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": blocks, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def trained(model: nn.Module, by: float = 0.1) -> nn.Module:
    torch.manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(by * torch.randn_like(p))
    return model


def adapted(**settings: Any) -> nn.Module:
    return trained(lk.attach(llama(), ALoRA(**{"invocation_tokens": CALL, "r": 4, **settings})))


def row(text: str) -> list[int]:
    """'..a.' to tokens: a letter for one of the invocation tokens, a dot for any other token."""
    return [{"a": 7, "b": 8, "c": 9}.get(letter, 20 + i % 30) for i, letter in enumerate(text)]


def logits(model: nn.Module, ids: list[list[int]], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), **kwargs).logits


def written_out(ids: list[int], sequence: tuple[int, ...]) -> list[bool]:
    starts = [i for i in range(len(ids)) if tuple(ids[i : i + len(sequence)]) == sequence]
    return [bool(starts) and i >= starts[-1] for i in range(len(ids))]


@pytest.mark.parametrize("sequence", [(1,), (1, 2), (1, 1), (1, 2, 1)])
def test_it_is_active_from_the_last_occurrence_on(sequence: tuple[int, ...]) -> None:
    """Every row of six tokens out of two, each a row of one batch, and all of them as documents of one packed row."""
    rows = [list(r) for r in itertools.product((1, 2), repeat=6)]
    expected = [written_out(r, sequence) for r in rows]
    ids = torch.tensor(rows)
    numbers = torch.arange(len(rows))[:, None].expand_as(ids)
    none = ids[:, :0]
    assert active(Tokens(ids, numbers, len(rows), none), sequence).tolist() == expected
    packed = active(Tokens(ids.reshape(1, -1), numbers.reshape(1, -1), len(rows), none[:1]), sequence)
    assert packed.reshape(ids.shape).tolist() == expected


def test_what_the_cache_holds_is_searched_and_what_was_activated_stays() -> None:
    rows = [list(r) for r in itertools.product((1, 2), repeat=6)]
    ids, numbers = torch.tensor(rows), torch.arange(64)[:, None]
    for cut in range(6):
        now = active(Tokens(ids[:, cut:], numbers.expand(-1, 6 - cut), 64, ids[:, :cut]), (1, 2)).tolist()
        for r, found in zip(rows, now, strict=True):
            earlier = any(written_out(r[:cut], (1, 2)))
            assert found == ([True] * (6 - cut) if earlier else written_out(r, (1, 2))[cut:])


def test_hidden_tokens_match_nothing() -> None:
    ids = torch.tensor([[1, 2, NONE, NONE], [NONE, NONE, 1, 2]])
    tokens = Tokens(ids, torch.tensor([[0] * 4, [1] * 4]), 2, ids[:, :0])
    assert active(tokens, (1, 2)).tolist() == [[True] * 4, [False] * 2 + [True] * 2]
    assert not active(tokens, (1, 2, 3, 4, 5)).any(), "longer than the row"


def test_in_front_the_logits_are_the_base_models_to_the_last_bit() -> None:
    model, ids = adapted(), [row("...abc..abc...")]
    with lk.disabled(model):
        base = logits(model, ids)
    ours = logits(model, ids)
    assert torch.equal(ours[:, :8], base[:, :8])
    assert ((ours - base)[:, 8:].abs().amax(-1) > 1e-4).all()
    without = [row("...ab.bc..cba.")]
    with lk.disabled(model):
        base = logits(model, without)
    assert torch.equal(logits(model, without), base)


def test_without_invocation_tokens_it_is_lora() -> None:
    ids = [row("...abc....")]
    lora = trained(lk.attach(llama(), lk.LoRA(r=4)))
    assert torch.equal(logits(adapted(invocation_tokens=()), ids), logits(lora, ids))
    assert torch.equal(logits(adapted(), [row("abc.......")]), logits(lora, [row("abc.......")]))


def test_padded_rows_are_the_rows_alone() -> None:
    """Also where the padding token is one of the invocation tokens, on either side."""
    model = adapted(invocation_tokens=(7,))
    short, long = row(".a.."), row("...a....")
    alone = [logits(model, [r])[0] for r in (short, long)]
    for left in (True, False):
        hidden = [7] * 4
        padded = hidden + short if left else short + hidden
        mask = torch.tensor([[0] * 4 + [1] * 4 if left else [1] * 4 + [0] * 4, [1] * 8])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = logits(model, [padded, long], attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(out[0][4:] if left else out[0][:4], alone[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[1], alone[1], rtol=1e-5, atol=1e-5)


def test_packed_rows_are_the_rows_alone() -> None:
    model = adapted()
    rows = [row(".abc.."), row("...a"), row("bc..."), row("abc.abc.")]
    alone = torch.cat([logits(model, [r])[0] for r in rows])
    assert enable_packing(model)
    lengths = [len(r) for r in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    out = logits(model, [list(itertools.chain(*rows))], position_ids=positions, lengths=lengths, use_cache=False)[0]
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [[9, 1, 1, 1], [1] * 12, [4, 3, 5], [5, 7], [12]])
@pytest.mark.parametrize("given", [True, False], ids=["cache given", "cache made by the model"])
def test_with_a_cache_every_split_of_a_row_gives_the_same(steps: list[int], given: bool) -> None:
    """As long as the invocation tokens lie in one piece; else those before the cut were for the base model."""
    model, ids = adapted(), torch.tensor([row("..abc......."), row("............")])
    expected = logits(model, ids.tolist())
    cache, found = DynamicCache(config=model.config) if given else None, []
    for piece in ids.split(steps, dim=1):
        with torch.no_grad():
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    out = torch.cat(found, 1)
    torch.testing.assert_close(out[1], expected[1], rtol=1e-5, atol=1e-5)
    if steps in ([9, 1, 1, 1], [5, 7], [12]):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    with lk.disabled(model):
        base = logits(model, ids.tolist())
    assert ((out - base)[0, 5:].abs().amax(-1) > 1e-4).all(), "once it has been activated it stays so"


def test_the_bases_cache_is_used_again() -> None:
    """The point of the method: the context is computed once, by the base model, and the adapter goes on from there."""
    model, ids = adapted(), torch.tensor([row("......abc...")])
    expected = logits(model, ids.tolist())
    with lk.disabled(model), torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    elsewhere = copy.deepcopy(cache)
    with torch.no_grad():
        rest = model(input_ids=ids[:, 6:], past_key_values=cache).logits
        torch.testing.assert_close(rest, expected[:, 6:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(input_ids=ids[:, 6:], past_key_values=elsewhere).logits, rest)


def test_two_conversations_in_turn_do_not_mix() -> None:
    model = adapted()
    rows = {"on": row("..abc......."), "off": row("............")}
    expected = {name: logits(model, [r])[0] for name, r in rows.items()}
    caches = {name: DynamicCache(config=model.config) for name in rows}
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        for name, r in rows.items():
            out = logits(model, [r[start:stop]], past_key_values=caches[name])[0]
            torch.testing.assert_close(out, expected[name][start:stop], rtol=1e-5, atol=1e-5)


def test_generation_with_and_without_a_cache_is_peft_generation() -> None:
    ids = torch.tensor([row("....abc.."), row(".........")])
    model = trained(adapted(), 0.2)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), ours)
    theirs = peft_twin(model)
    assert torch.equal(theirs.generate(input_ids=ids, **settings), ours)
    with lk.disabled(model):
        base = model.generate(ids, **settings)
    assert not torch.equal(ours[0], base[0])
    assert torch.equal(ours[1], base[1])


def peft_twin(model: nn.Module) -> nn.Module:
    """PEFT's model with the tensors of ours."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", alora_invocation_tokens=list(CALL), task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    layers = dict(theirs.base_model.model.named_modules())
    for path, _, adapter in lk.adapters(model):
        with torch.no_grad():
            layers[path].lora_A["default"].weight.copy_(adapter.lora_A)
            layers[path].lora_B["default"].weight.copy_(adapter.lora_B)
    return theirs


def test_logits_and_gradients_are_pefts() -> None:
    model = adapted()
    theirs = peft_twin(model)
    ids = torch.tensor([row("...abc..abc."), row(".........abc"), row("............"), row("abc.........")])
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    layers = dict(theirs.base_model.model.named_modules())
    for path, _, adapter in lk.adapters(model):
        torch.testing.assert_close(
            adapter.lora_A.grad, layers[path].lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(
            adapter.lora_B.grad, layers[path].lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6
        )


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_fc"]), (gpt2, ["c_attn.q", "c_attn.v"])],
)
def test_directories_go_both_ways(make: Any, targets: list[str], tmp_path: Path) -> None:
    method = ALoRA(invocation_tokens=CALL, r=4, alpha=8)
    model = trained(lk.attach(make(), method, target_modules=targets))
    lk.save(model, tmp_path / "a", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a")).eval()
    theirs.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    back = lk.load(make(), tmp_path / "b")
    for ids in ([row("...abc....")], [row("...ab.c...")]):
        expected = logits(model, ids)
        torch.testing.assert_close(logits(theirs, ids), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits(back, ids), expected, rtol=1e-5, atol=1e-6)
    first = next(a for _, _, a in lk.adapters(back))
    assert isinstance(first.config, ALoRA)
    assert first.config.invocation_tokens == CALL


def test_a_lora_directory_stays_lora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert {type(a.config) for _, _, a in lk.adapters(lk.load(llama(), tmp_path))} == {lk.LoRA}


def test_the_model_is_watched_as_long_as_the_adapter_is_on_it() -> None:
    model = llama()
    assert not model._forward_pre_hooks
    lk.attach(model, ALoRA(invocation_tokens=CALL), name="one")
    lk.attach(model, ALoRA(invocation_tokens=(1,)), name="two")
    lk.attach(model, ALoRA(), name="lora")
    assert len(model._forward_pre_hooks) == 2
    lk.detach(model, "one")
    assert len(model._forward_pre_hooks) == 1
    lk.detach(model)
    assert not model._forward_pre_hooks


def test_a_copy_of_the_model_watches_itself() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    on, off = [row(".abc......")], [row("..........")]
    expected = logits(model, on)
    logits(model, off)
    assert torch.equal(logits(twin, on), expected)
    lk.detach(twin)
    assert not twin._forward_pre_hooks
    assert torch.equal(logits(model, on), expected)


def test_recomputed_activations_have_the_same_gradients() -> None:
    ids = torch.tensor([row("...abc......"), row("............")])
    gradients = []
    for recompute in (False, True):
        model = adapted().train()
        if recompute:
            checkpoint_activations(model)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_compiles_to_one_graph() -> None:
    model = trained(lk.attach(llama(1), ALoRA(invocation_tokens=CALL, r=4), target_modules=["q_proj", "down_proj"]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ids in ([row("...abc....")], [row("..........")]):
        with torch.no_grad():
            out = compiled(input_ids=torch.tensor(ids), use_cache=False).logits
        torch.testing.assert_close(out, logits(model, ids))


def test_vectors_instead_of_tokens_are_refused() -> None:
    model = adapted()
    with pytest.raises(UsageError, match="no token ids"):
        model(inputs_embeds=torch.randn(1, 5, 32))
    with lk.disabled(model):
        model(inputs_embeds=torch.randn(1, 5, 32))


def test_a_layer_that_sees_other_positions_is_refused() -> None:
    model = lk.attach(llama(), ALoRA(invocation_tokens=CALL), target_modules=["lm_head"])
    with pytest.raises(UsageError, match="which tokens") as caught:
        model(input_ids=torch.tensor([row("...abc...")]), logits_to_keep=2)
    assert "(1, 9) tokens" in caught.value.why
    assert "(1, 2) vectors" in caught.value.why


def test_patterns_keep_the_gate() -> None:
    model = llama()
    lk.attach(model, ALoRA(invocation_tokens=CALL, r=4), rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3.0})
    gates = {id(a.gate) for _, _, a in lk.adapters(model)}
    ranks = {path.rpartition(".")[2]: a.config.r for path, _, a in lk.adapters(model)}
    assert len(gates) == 1
    assert (ranks["q_proj"], ranks["k_proj"]) == (2, 4)


@pytest.mark.parametrize("bad", [{"invocation_tokens": (3, -1)}, {"r": 0}, {"init": "pissa"}, {"dropout": 1.0}])
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ALoRA(**bad)
