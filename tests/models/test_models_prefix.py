"""A pass that begins at the lowest adapted block is the whole pass: every family, every depth, by any number of threads."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from test_models_fast import MODELS, adapt, build
from torch import Tensor

import lorakit as lk
from lorakit.core.errors import ResourceError, UsageError
from lorakit.models import prefix as module
from lorakit.models.blocks import FastBlock
from lorakit.models.fast import Fast, accelerate
from lorakit.models.modes import checkpoint_activations
from lorakit.models.packing import enable_packing
from lorakit.models.prefix import Given, Prefix, Taken, frozen_blocks

torch.manual_seed(5)
ROWS: list[list[int]] = [torch.randint(64, (n,)).tolist() for n in (7, 3, 9, 1, 5)]
LAYERS = 4


def prepared(layer: str = "LlamaDecoderLayer", depth: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Any, Fast]:
    """A model of four blocks whose blocks from `depth` on are adapted."""
    model: Any = build(layer, dtype, num_hidden_layers=LAYERS)
    adapt(model, lk.LoRA(r=3, alpha=5), layers=list(range(depth, LAYERS)))
    assert enable_packing(model)
    return model, accelerate(model)


def step(model: Any, fast: Fast, rows: Sequence[list[int]], prefix: Prefix | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the loss of packed rows, and all gradients."""
    ids, lengths = torch.tensor([token for row in rows for token in row]), [len(row) for row in rows]
    inputs = {"input_ids": ids[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    kept = torch.arange(0, len(ids) - 1, 2)
    how = {"prefix": prefix.of(model, rows)} if prefix else {}
    model.zero_grad()
    loss = fast.loss(model, inputs, kept, ids[kept + 1], lengths=lengths, **how)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert abs(one[0] - two[0]) <= tolerance * abs(two[0])
    assert one[1].keys() == two[1].keys() and one[1]
    for name, gradient in two[1].items():
        assert (one[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.fixture
def prefix(tmp_path: Path) -> Iterator[Callable[..., Prefix]]:
    """Make a prefix that expects all rows: in these groups (each row by itself if absent)."""
    opened: list[Prefix] = []

    def make(model: Any, groups: Sequence[Sequence[int]] | None = None, threads: int = 1) -> Prefix:
        made = Prefix(model, frozen_blocks(model), tmp_path)
        for group in groups or [[i] for i in range(len(ROWS))]:
            made.expect([ROWS[i] for i in group], threads)
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()


@pytest.mark.parametrize("depth", range(1, LAYERS))
@pytest.mark.parametrize("layer", MODELS)
def test_the_step_from_kept_states_is_the_whole_step(prefix: Callable[..., Prefix], layer: str, depth: int) -> None:
    capped = layer == "Gemma2DecoderLayer"  # transformers' way of it makes NaN of fp64
    model, fast = prepared(layer, depth, torch.float32 if capped else torch.float64)
    kept = prefix(model)
    assert kept.depth == depth
    for rows in (ROWS, ROWS[::-1], ROWS[1:3], ROWS[:1] * 2):
        # what is not exact in fp64 is the norms: transformers' ones work in fp32
        same(step(model, fast, rows, kept), step(model, fast, rows, None), 2e-5 if capped else 1e-6)


def test_in_fp64_they_agree_to_rounding(prefix: Callable[..., Prefix]) -> None:
    model, fast = prepared()
    same(step(model, fast, ROWS, prefix(model)), step(model, fast, ROWS, None), 1e-12)


def test_in_fp32_they_agree_to_1e_6(prefix: Callable[..., Prefix]) -> None:
    model, fast = prepared(dtype=torch.float32)
    same(step(model, fast, ROWS, prefix(model)), step(model, fast, ROWS, None), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_run_in_their_pass_come_out_the_same_bit_for_bit(
    prefix: Callable[..., Prefix], dtype: torch.dtype
) -> None:
    model, fast = prepared(dtype=dtype)
    same(step(model, fast, ROWS, prefix(model, [range(5)])), step(model, fast, ROWS, None), 0.0)


@pytest.mark.parametrize("depth", range(1, LAYERS))
def test_what_is_kept_is_what_enters_that_block(prefix: Callable[..., Prefix], depth: int) -> None:
    model, fast = prepared(depth=depth)
    kept, seen = prefix(model).of(model, ROWS), list[Tensor]()
    hook = model.model.layers[depth].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
    step(model, fast, ROWS, None)
    hook.remove()
    assert isinstance(kept, Given) and kept.depth == depth and not kept.hidden.requires_grad
    torch.testing.assert_close(kept.hidden, seen[0], rtol=1e-12, atol=1e-12)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Count how often the blocks of each number run."""
    runs, real = Counter[int](), FastBlock.fused

    def fused(block: FastBlock, *args: Any, **kwargs: Any) -> Tensor:
        runs[block.self_attn.layer_idx] += 1
        return real(block, *args, **kwargs)

    monkeypatch.setattr(FastBlock, "fused", fused)
    return runs


@pytest.mark.parametrize("depth", range(1, LAYERS))
def test_no_block_runs_twice_and_none_is_left_out(
    prefix: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    model, fast = prepared(depth=depth)
    kept, runs = prefix(model, [[0, 1], [2, 3, 4]]), counted(monkeypatch)
    below, above = range(depth), range(depth, LAYERS)
    step(model, fast, ROWS, kept)
    assert runs == {**dict.fromkeys(below, 2), **dict.fromkeys(above, 1)}, "each group once"
    for _ in range(3):
        step(model, fast, ROWS[::-1], kept)
    assert runs == {**dict.fromkeys(below, 2), **dict.fromkeys(above, 4)}


def test_the_states_do_not_depend_on_when_they_are_needed_or_by_whom(prefix: Callable[..., Prefix]) -> None:
    model, _ = prepared(dtype=torch.float32)
    one, other = (prefix(model, [[0, 1], [2, 3, 4]]) for _ in range(2))
    with torch.no_grad():
        other.of(model, [ROWS[4]])
    expected = one.of(model, ROWS).hidden
    assert torch.equal(other.of(model, ROWS).hidden, expected)
    torch.set_num_threads(2)
    try:
        assert torch.equal(prefix(model, [[0, 1], [2, 3, 4]]).of(model, ROWS).hidden, expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_any_number_of_threads_may_ask_at_once(prefix: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = prepared(dtype=torch.float32)
    groups = [[0, 1], [2, 3, 4]]
    expected = prefix(model, groups).of(model, ROWS).hidden
    runs, real = list[int](), module._states
    monkeypatch.setattr(module, "_states", lambda *args: runs.append(1) or real(*args))
    kept, together = prefix(model, groups), Barrier(4)

    def ask(turn: int) -> Tensor:
        order = [(i + turn) % 5 for i in range(5)]
        together.wait()
        parts = kept.of(model, [ROWS[i] for i in order]).hidden.split([len(ROWS[i]) for i in order], dim=1)
        return torch.cat([parts[order.index(i)] for i in range(5)], dim=1)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert all(torch.equal(one, expected) for one in found)
    assert len(runs) == 2, "each group was run by one of them"


def test_equal_rows_are_kept_once(prefix: Callable[..., Prefix]) -> None:
    model, _ = prepared()
    kept = prefix(model)
    size = kept.size
    kept.expect([ROWS[1], ROWS[0], ROWS[1]], 1)
    assert kept.size == size == sum(map(len, ROWS)) * 32 * 8
    assert f"blocks 0 to 1 will run once for each of {len(ROWS)} distinct rows" in kept.words


@pytest.mark.parametrize("checkpointing", [True, 3])
def test_recomputed_blocks_begin_there_too(
    prefix: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch, checkpointing: int
) -> None:
    model, fast = prepared()
    expected = step(model, fast, ROWS, None)
    checkpoint_activations(model, checkpointing if checkpointing is True else 1)
    kept, runs = prefix(model, [range(5)]), counted(monkeypatch)
    same(step(model, fast, ROWS, kept), expected, 1e-12)
    assert (runs[0], runs[1], runs[2]) == (1, 1, 2)


def test_dropout_above_draws_what_it_draws_anyway(prefix: Callable[..., Prefix]) -> None:
    model: Any = build(num_hidden_layers=LAYERS)
    adapt(model, lk.LoRA(r=3, dropout=0.3), last_n_layers=2)
    enable_packing(model)
    fast, kept = accelerate(model), prefix(model)
    found = []
    for own in (None, kept, kept):
        torch.manual_seed(7)
        found.append(step(model, fast, ROWS, own))
    same(found[0], found[1], 1e-12)
    same(found[1], found[2], 0.0)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_base_in_4_or_8_bits(prefix: Callable[..., Prefix], quantize: str) -> None:
    pytest.importorskip("bitsandbytes")
    from lorakit.models.quantize import quantize as stored

    model: Any = build(dtype=torch.float32, num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=64)
    stored(model, quantize)
    adapt(model, lk.LoRA(r=3, alpha=5), last_n_layers=2)
    enable_packing(model)
    fast = accelerate(model)
    same(step(model, fast, ROWS, prefix(model)), step(model, fast, ROWS, None), 1e-5)


def test_an_evaluation_may_run_between(prefix: Callable[..., Prefix]) -> None:
    model, fast = prepared()
    kept, ids = prefix(model), torch.arange(10)[None]
    before = step(model, fast, ROWS, kept)
    logits = model.eval()(ids).logits
    model.train()
    same(step(model, fast, ROWS, kept), before, 0.0)
    assert torch.equal(model.eval()(ids).logits, logits)


# --- where it is exact ---

DEPTHS: dict[str, tuple[dict[str, Any], int]] = {
    "the last two": ({"last_n_layers": 2}, 2),
    "one in the middle": ({"layers": [1]}, 1),
    "only some layers of it": ({"target_modules": ["layers.3.mlp.up_proj", "layers.2.self_attn.v_proj"]}, 2),
    "the last block runs in any case": ({"target_modules": ["lm_head"]}, 3),
    "a head in full": ({"last_n_layers": 1, "modules_to_save": ["lm_head"]}, 3),
    "the last norm in full": ({"last_n_layers": 1, "modules_to_save": ["model.norm"]}, 3),
    "a layer in full": ({"last_n_layers": 1, "modules_to_save": ["layers.2.mlp.up_proj"]}, 2),
}


@pytest.mark.parametrize("case", DEPTHS)
def test_the_frozen_blocks_are_those_below_all_that_is_trained(case: str, prefix: Callable[..., Prefix]) -> None:
    where, depth = DEPTHS[case]
    model: Any = build(num_hidden_layers=LAYERS, tie_word_embeddings=False)
    adapt(model, lk.LoRA(r=2), **where)
    enable_packing(model)
    fast = accelerate(model)
    assert frozen_blocks(model) == depth
    same(step(model, fast, ROWS, prefix(model)), step(model, fast, ROWS, None), 1e-6)


@pytest.mark.parametrize("name", ["full", "bitfit", "dora", "vera", "ia3", "hira", "oft", "houlsby"])
def test_methods_of_other_forms_count_as_well(name: str, prefix: Callable[..., Prefix]) -> None:
    model: Any = build("Qwen2DecoderLayer", num_hidden_layers=LAYERS)  # whose q, k and v have biases
    own = {"target_modules": ["q_proj", "k_proj"]} if name in ("bitfit", "hira", "oft") else {}
    lk.attach(model, lk.METHODS[name](), last_n_layers=2, **own)
    model.train()
    enable_packing(model)
    fast = accelerate(model)
    assert frozen_blocks(model) == 2
    same(step(model, fast, ROWS, prefix(model)), step(model, fast, ROWS, None), 1e-6)


def test_an_adapter_that_is_not_trained_now_counts_as_well() -> None:
    """Another run's, whose turn may come."""
    model: Any = build(num_hidden_layers=LAYERS)
    lk.attach(model, lk.LoRA(r=2), name="other", layers=[1])
    lk.attach(model, lk.LoRA(r=2), name="own", layers=[3])
    lk.use(model, "own")
    enable_packing(model)
    accelerate(model)
    assert not any(p.requires_grad for p in model.model.layers[1].parameters())
    assert frozen_blocks(model) == 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "every block": ({}, {}, "lowest block"),
    "the first": ({}, {"layers": [0]}, "lowest block"),
    "embeddings": ({}, {"target_modules": ["embed_tokens", "layers.3.self_attn.q_proj"]}, "before it"),
    "embeddings in full": ({}, {"last_n_layers": 1, "modules_to_save": ["embed_tokens"]}, "before it"),
    "dropout of its own": ({"attention_dropout": 0.1}, {"last_n_layers": 1}, "dropout of their own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_is_refused(case: str) -> None:
    settings, where, why = REFUSED[case]
    model: Any = build(num_hidden_layers=LAYERS, tie_word_embeddings=False, **settings)
    adapt(model, lk.LoRA(r=2), **where)
    accelerate(model)
    with pytest.raises(UsageError, match=r"train\.cache_prefix") as refusal:
        frozen_blocks(model)
    assert why in str(refusal.value.why) and "leave train.cache_prefix out" in str(refusal.value.fix)


def test_trained_tied_embeddings_are_below_everything() -> None:
    model, _ = prepared()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"train\.cache_prefix"):
        frozen_blocks(model)


def test_blocks_that_are_not_fast_ones_are_refused() -> None:
    model: Any = build(num_hidden_layers=LAYERS)
    adapt(model, lk.LoRA(r=2), last_n_layers=1)
    with pytest.raises(UsageError, match=r"train\.cache_prefix") as refusal:
        frozen_blocks(model)
    assert "fused" in str(refusal.value.why)


def test_a_model_that_goes_through_its_blocks_twice_is_refused(tmp_path: Path) -> None:
    model, _ = prepared()
    real = model.model.norm.forward

    def again(x: Tensor) -> Tensor:
        model.model.norm.forward = real
        x = model.model(inputs_embeds=x, use_cache=False, **seen).last_hidden_state
        model.model.norm.forward = again
        return x

    seen: dict[str, Any] = {}
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update({k: kwargs[k] for k in ("prefix",) if k in kwargs}), with_kwargs=True
    )
    model.model.norm.forward = again
    with pytest.raises(UsageError, match=r"train\.cache_prefix") as refusal:
        Prefix(model, 2, tmp_path)
    assert "one after the other" in str(refusal.value.why)
    assert model.training


# --- the disk ---


def test_nothing_is_left_on_the_disk(prefix: Callable[..., Prefix], tmp_path: Path) -> None:
    model, _ = prepared()
    prefix(model).of(model, ROWS)
    assert not list(tmp_path.iterdir()), "not even while it is used"


def test_the_system_may_write_and_read_in_parts(prefix: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = prepared()
    expected = prefix(model).of(model, ROWS).hidden
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, part, at: write(file, part[:100], at))
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: read(file, [parts[0][:70]], at))
    assert torch.equal(prefix(model).of(model, ROWS).hidden, expected)


def test_a_full_disk_is_an_error_that_says_so(prefix: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = prepared()
    kept = prefix(model)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="frozen prefix") as raised:
        kept.of(model, ROWS)
    assert raised.value.exit_code == 5 and raised.value.fix
    monkeypatch.undo()
    assert kept.of(model, ROWS).hidden.shape == (1, sum(map(len, ROWS)), 32), "what failed is not taken for done"


def test_a_disk_without_room_is_found_before_training(
    prefix: Callable[..., Prefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = prepared()
    kept = prefix(model)
    kept.check_room()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": kept.size - 1}))
    with pytest.raises(ResourceError, match="no room") as raised:
        kept.check_room()
    assert "leave train.cache_prefix out" in str(raised.value.fix)


def test_taking_lets_nothing_run_above() -> None:
    taken, x = Taken(2), torch.ones(1, 3, 4)
    assert taken.instead(1, x) is None and taken.hidden is None
    assert taken.instead(2, x) is x and taken.instead(3, 2 * x) is not None
    assert taken.hidden is not None and torch.equal(taken.hidden, x)
