"""Micro-batches of fixed sizes come to the loss and the gradient of the ordinary way, compiled, recorded or neither."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit as lk
from lorakit.core.errors import CheckError, UsageError
from lorakit.data.collate import Size, collate_fixed, size_of
from lorakit.data.dataset import IGNORED, Example
from lorakit.kernels import documents
from lorakit.methods.lora import LoRAAdapter
from lorakit.models.blocks import FastBlock
from lorakit.models.compiled import compiled_blocks
from lorakit.models.fast import accelerate, presumed
from lorakit.models.packing import NAME, enable_packing
from lorakit.train import fixed
from lorakit.train.config_file import loads
from lorakit.train.fixed import FixedTeam, Sizes, _Pass
from lorakit.train.run import run
from lorakit.train.task import LanguageModelling

# torch.compile looks at the .grad of a block's input, which is no leaf; it means to hide the warning and, as an error, cannot.
compiling = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*torch.jit:DeprecationWarning"
)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": None},
    "Gemma3": {"sliding_window": 4, "query_pre_attn_scalar": 8},
}


def model_of(family: str = "Llama", dtype: torch.dtype = torch.float64, method: Any = None, **where: Any) -> Any:
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES, **FAMILIES[family])
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # tensors without data cannot be converted in place
    try:
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    lk.attach(model, method or lk.LoRA(r=3), **where)
    for _, _, adapter in lk.adapters(model):
        for p in adapter.parameters():
            p.data += torch.randn_like(p) * 0.1
    return model.train()


def examples(*lengths: int, prompt: int = 2) -> list[Example]:
    generator = torch.Generator().manual_seed(sum(lengths))
    found = []
    for i, n in enumerate(lengths):
        ids = torch.randint(64, (n,), generator=generator).tolist()
        found.append(Example(input_ids=ids, labels=[IGNORED] * prompt + ids[prompt:], label=None, where=f"row {i}"))
    return found


def task_of(model: Any) -> LanguageModelling:
    assert enable_packing(model)
    return LanguageModelling(64, 0, packed=True, fast=accelerate(model))


def ordinary(model: Any, task: LanguageModelling, rows: Sequence[Example], weight: int) -> tuple[float, list[Tensor]]:
    loss = task.loss(model, rows)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    return float(loss.detach()), list(torch.autograd.grad(loss / weight, trained))


def through(team: FixedTeam, model: Any, task: LanguageModelling, rows: Sequence[Example], weight: int) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = None
    loss = team.backward(lambda own: task.loss(model, own)[0], [rows], weight, list(model.parameters()))
    return loss, [p.grad for p in trained]


def assert_same(found: Any, expected: Any, rtol: float = 1e-6) -> None:
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol * 100, atol=rtol)


# --------------------------------------------------------------------------------------------------------------- sizes


def test_a_filled_up_micro_batch() -> None:
    rows = examples(4, 3)
    assert size_of(rows) == Size(7, 3, 3)
    found = collate_fixed(rows, Size(10, 5, 4))
    ids = rows[0].input_ids + rows[1].input_ids
    assert found["input_ids"].tolist() == [[*ids, 0, 0, 0]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert found["ends"].tolist() == [0, 4, 7, 10, 10] and found["ends"].dtype == torch.int32
    assert found["rows"].tolist() == [1, 2, 5, 0, 1] and found["counted"].tolist() == [1, 1, 1, 0, 0]
    assert found["targets"].tolist()[:3] == [ids[2], ids[3], ids[6]]
    exact = collate_fixed(rows, Size(7, 3, 3))
    assert exact["ends"].tolist() == [0, 4, 7, 7] and exact["rows"].tolist() == [1, 2, 5]


@given(
    st.lists(st.lists(st.integers(2, 400), min_size=1, max_size=6), min_size=1, max_size=12),
    st.lists(st.integers(2, 900), min_size=1, max_size=9),
)
def test_every_batch_has_a_size_and_there_are_few(batches: list[list[int]], later: list[int]) -> None:
    rows = [examples(*lengths) for lengths in batches]
    sizes = Sizes(rows)
    assert len(sizes.examples) <= 6 and list(sizes.examples) == sorted(sizes.examples, reverse=True)
    assert all(sizes.fitting(size_of(example)) == size for size, example in sizes.examples.items())
    assert {sizes.fitting(size_of(own)) for own in rows} == set(sizes.examples)
    for own in [*rows, examples(*later)]:  # a later batch may be larger than any of the first epoch
        size, fitted = size_of(own), sizes.fitting(size_of(own))
        assert fitted.tokens >= size.tokens and fitted.rows >= size.rows and fitted.documents > size.documents
        assert fitted.tokens - size.tokens < sizes.tokens


OTHERS = [lk.LoRA(r=2, init="pissa"), lk.DoRA(r=2), lk.LoRAFA(r=2), lk.OFT(r=4, oft_block_size=0)]
BATCHES = [examples(9, 12, 4), examples(40, 45)]  # 32 tokens and 96, in steps of 16


def filled() -> dict[str, Tensor]:
    return {**collate_fixed(examples(9, 12, 4), Size(48, 32, 6)), "weight": torch.tensor(7.0)}


def pass_of(model: Any, buffers: dict[str, Tensor]) -> _Pass:
    """A pass on such buffers, where nothing can be proved on values."""
    model.set_attn_implementation(NAME)
    trained = [p for p in model.parameters() if p.requires_grad]
    one = _Pass(model, presumed(model, torch.device("cuda")), Size(48, 32, 6), trained)
    one.buffers = buffers
    return one


# ------------------------------------------------------------------------------------------------------------ the pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_pass_is_the_ordinary_one(family: str) -> None:
    exact = family != "Gemma2"  # whose own attention is NaN on padding in float64, so nothing can be held against it
    model = model_of(family, torch.float64 if exact else torch.float32)
    task = task_of(model)
    assert task.fast.rows
    team = FixedTeam(model, task.fast, Sizes(BATCHES))
    for lengths in ([9, 12, 4], [30], [5, 5, 5, 5, 5], [40, 20]):  # sizes come again, with other contents
        rows = examples(*lengths)
        for weight in (1, 17):
            assert_same(
                through(team, model, task, rows, weight),
                ordinary(model, task, rows, weight),
                rtol=1e-6 if exact else 1e-4,
            )
    assert {size.tokens for size in team._passes} == {32, 64, 96}


@compiling
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("Llama", "eager"),
        *(pytest.param(name, "eager", marks=pytest.mark.slow) for name in list(FAMILIES)[1:]),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_a_compiled_pass_is_the_ordinary_one(family: str, backend: str) -> None:
    torch.compiler.reset()
    model = model_of(family, torch.float32)
    task = task_of(model)
    team = FixedTeam(model, task.fast, Sizes(BATCHES))
    with compiled_blocks(model, backend) as count:
        assert count == 3
        for lengths in ([9, 12, 4], [5, 5, 5, 5, 5], [40, 20]):
            rows = examples(*lengths)
            assert_same(through(team, model, task, rows, 17), ordinary(model, task, rows, 17), rtol=1e-4)
    assert all(block.compiled is None for block in model.modules() if isinstance(block, FastBlock))


@compiling
def test_compiled_once_for_each_size_and_not_for_each_block() -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = model_of(dtype=torch.float32)
    task = task_of(model)
    every = [examples(16 * n, 16 * n) for n in range(1, 7)]  # as many sizes as there may be
    team = FixedTeam(model, task.fast, Sizes(every))
    with compiled_blocks(model, backend):  # ty: ignore[invalid-argument-type]
        for rows in [*every, *every]:
            through(team, model, task, rows, 1)
    assert len(team._passes) == 6
    assert len(graphs) == 12, "six sizes; the first block is one of its own, its input needs no gradient"


@pytest.mark.parametrize(
    "method",
    OTHERS,
    ids=[type(m).__name__ for m in OTHERS],
)
def test_other_adapters(method: Any) -> None:
    model = model_of(method=method)
    task = task_of(model)
    team = FixedTeam(model, task.fast, Sizes(BATCHES))
    for lengths in ([9, 12, 4], [5, 5, 5, 5, 5]):
        assert_same(
            through(team, model, task, examples(*lengths), 3), ordinary(model, task, examples(*lengths), 3), 1e-5
        )


class Recording:
    """As a CUDA graph does: it gives the same memory every time, and knows nothing of the values that it was made with."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]:
        loss, gradients = work()
        self.made += 1

        def again() -> Any:
            own, new = work()
            loss.copy_(own)
            for g, n in zip(gradients, new, strict=True):
                g.copy_(n)
            return loss, [g.clone() for g in gradients]

        return again


def test_gradients_add_up_and_all_sizes_are_recorded_at_the_first_step() -> None:
    model = model_of()
    task = task_of(model)
    record = Recording()
    team = FixedTeam(model, task.fast, Sizes(BATCHES), record)
    rows, more = examples(9, 9), examples(7, 3)
    trained = [p for p in model.parameters() if p.requires_grad]
    for own in (rows, more):
        team.backward(lambda r: task.loss(model, r)[0], [own], 5, trained)
        assert record.made == (2 if own is rows else 3), "those of the first epoch; a smaller one when it comes"
    expected = [ordinary(model, task, own, 5)[1] for own in (rows, more)]
    for p, a, b in zip(trained, *expected, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-6, atol=1e-9)
    trained[0].data = trained[0].data.clone()  # as a controller does that changes ranks
    with pytest.raises(CheckError, match="replaced during the run"):
        team.backward(lambda r: task.loss(model, r)[0], [rows], 5, trained)


def test_what_a_recording_keeps_of_its_rows_is_found() -> None:
    def stuck(work: Callable[[], Any]) -> Callable[[], Any]:
        result = work()
        return lambda: result

    model = model_of()
    task = task_of(model)
    with pytest.raises(CheckError, match="differs from the ordinary one"):
        through(FixedTeam(model, task.fast, Sizes(BATCHES), stuck), model, task, examples(9, 12), 1)


def test_a_loss_that_is_not_finite_is_the_loops_to_report() -> None:
    model = model_of()
    task = task_of(model)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    loss, _ = through(FixedTeam(model, task.fast, Sizes(BATCHES)), model, task, examples(9, 12), 1)
    assert loss != loss


def test_a_pass_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(dtype=torch.float32)
    task = task_of(model)
    alone = documents.allowed

    def across(ends: documents.Documents, tokens: int, window: int | None = None) -> Tensor:
        return alone(documents.Documents(ends.ends[[0, -1]]), tokens, window)

    monkeypatch.setattr(documents, "allowed", across)
    team = FixedTeam(model, task.fast, Sizes(BATCHES))
    with pytest.raises(CheckError, match="differs from the ordinary one"):
        through(team, model, task, examples(9, 12, 4), 1)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs a torch that is built for CUDA; a GPU is not needed"
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_a_pass_waits_for_the_gpu_or_leaves_it(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that have a device and no data: what a recording cannot hold is an error here, without a GPU.

    Forward and loss; autograd's own threads ask the driver. What happens backward is looked at on the processor, below.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    shapes = {name: (t.shape, t.dtype) for name, t in filled().items()}
    enable_packing(model_of())  # makes its attention known to transformers
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # all is made where it should be
    monkeypatch.setattr(LoRAAdapter, "start", lambda *_, **__: None)  # it checks values
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, trained, **_: [torch.empty_like(p) for p in trained])
    with FakeTensorMode(), torch.device("cuda"):
        buffers = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in shapes.items()}
        loss, _ = pass_of(model_of(family, dtype), buffers).run()
    assert loss.device.type == "cuda"


class NothingFromTheDevice(TorchDispatchMode):
    """Fails on operations whose result the host, or the size of a tensor, depends on."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.FORBIDDEN, name
        if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_nor_going_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the processor, with the loss as a GPU has it. The attention is masked here: the one kernel of a GPU is torch's."""
    enable_packing(model_of())
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)  # as it is while a GPU records
    one = pass_of(model_of(family, torch.float32), filled())
    with NothingFromTheDevice():
        loss, gradients = one.run()
    assert loss > 0 and all(g is not None and g.abs().sum() > 0 for g in gradients)
    usual = _Pass(one.model, presumed(one.model), one.size, one.trained)
    usual.buffers = one.buffers
    with pytest.raises(AssertionError, match="local_scalar"), NothingFromTheDevice():
        usual.run()  # a processor's loss looks at its values


# ----------------------------------------------------------------------------------------------------------------- runs


def settings(model: Path, data: Path, output: Path, **more: Any) -> Any:
    tree = {
        "model.name": str(model),
        "model.dtype": "float32",
        "data.path": str(data),
        "method.r": 3,
        "optim.lr": 1e-2,
        "train.batch_size": 4,
        "train.max_steps": 3,
        "train.save_steps": 0,
        "output": str(output),
    } | {key.replace("__", "."): value for key, value in more.items()}
    return loads("", [f"{key}={json.dumps(value)}" for key, value in tree.items() if value is not ...])[0]


def losses(output: Path) -> list[float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@compiling
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_is_the_run(
    backend: str, still_model: Path, rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(fixed, "compiled_blocks", lambda model: compiled_blocks(model, backend))
    data = rows(10)
    run(settings(still_model, data, tmp_path / "plain"))
    run(settings(still_model, data, tmp_path / "compiled", train__compile=True, train__accumulate=1))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert "blocks compiled, at sizes of" in (tmp_path / "compiled" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"train__cuda_graph": True}, "the model is on cpu"),
        ({"train__compile": True, "method__dropout": 0.1}, "dropout draws"),
        (
            {"train__compile": True, "method__name": "boft", "method__r": ..., "method__boft_dropout": 0.5},
            "dropout draws",
        ),
        ({"train__compile": True, "train__diagnose": True}, "train.diagnose compares"),
        ({"train__compile": True, "train__controller": "relora", "train__max_steps": 40}, "controller"),
        ({"train__compile": True, "train__checkpointing": True}, "recomputed"),
        ({"train__compile": True, "train__cache_prefix": True, "method__last_n_layers": 1}, "cache_prefix"),
    ],
    ids=str,
)
def test_what_changes_from_pass_to_pass_is_refused(
    more: dict[str, Any], why: str, still_model: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"train\.(compile|cuda_graph) cannot be used here") as refusal:
        run(settings(still_model, rows(10), tmp_path / "run", **more))
    assert why in str(refusal.value.why)


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_pass_is_the_ordinary_one(dtype: torch.dtype) -> None:
    from lorakit.train.fixed import CudaGraphs

    model = model_of(dtype=dtype).cuda()
    task = task_of(model)
    team = FixedTeam(model, task.fast, Sizes(BATCHES), CudaGraphs())
    for lengths in ([9, 12, 4], [30], [5, 5, 5, 5, 5], [40, 20], [8, 8]):
        rows, tolerance = examples(*lengths), 1e-5 if dtype == torch.float32 else 2e-2
        found, expected = through(team, model, task, rows, 7), ordinary(model, task, rows, 7)
        assert found[0] == pytest.approx(expected[0], rel=tolerance)
        off = sum(float((a - b).square().sum()) for a, b in zip(found[1], expected[1], strict=True))
        assert off <= (10 * tolerance) ** 2 * sum(float(b.square().sum()) for b in expected[1])


@pytest.mark.gpu
def test_a_recorded_run_is_the_run(still_model: Path, rows: Callable[..., Path], tmp_path: Path) -> None:
    run(settings(still_model, rows(10), tmp_path / "plain"))
    run(settings(still_model, rows(10), tmp_path / "recorded", train__cuda_graph=True))
    assert losses(tmp_path / "recorded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
