"""Every method with every start, optimizer, controller and way of running: it works, or it is refused before it begins.

What works trains two steps, goes on from a checkpoint to the same bits, and comes back from its directory. What is
refused is refused by the configuration, with a reason; only what depends on the layers of a model may be refused when
the adapter is put on it. The files and the facts they declare are the source: a new file is covered on arrival.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.core import files
from lorakit.core.errors import UsageError
from lorakit.core.start import needs
from lorakit.data import encode, find_task, read_train_valid
from lorakit.models.packing import enable_packing
from lorakit.models.quantize import quantize
from lorakit.optim import OPTIMIZERS
from lorakit.train import session
from lorakit.train.adapter_state import adapter_tensors
from lorakit.train.base import Base
from lorakit.train.checkpoint import optimizer_tensors
from lorakit.train.config import RunConfig
from lorakit.train.config_file import loads
from lorakit.train.controllers import CONTROLLERS
from lorakit.train.loop import Job, State, alone, restore, update
from lorakit.train.progress import Progress
from lorakit.train.session import ORDINARY

METHODS = sorted(lk.METHODS)
# Sizes that fit a layer of 32 by 32; whatever else a method has is at its default.
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2}, "molora": {"top_k": 2}, "oft": {}, "boft": {},
    "stack": {"parts": [{"name": "lora", "r": 2}, {"name": "bitfit"}, {"name": "houlsby", "bottleneck": 4}]},
}  # fmt: skip
OPTIM: dict[str, dict[str, Any]] = {
    "galore": {"optim.options": {"rank": 2, "refresh": 1}},
    "flora": {
        "optim.options": {"rank": 2, "refresh": 1},
        "optim.betas": [0.0, 0.999],
    },  # with momentum only for large ones
}
SCHEDULED: dict[str, dict[str, Any]] = {
    "relora": {"every": 1, "warmup": 0}, "cola": {"links": 3}, "plora": {"stages": 3},
    "adalora": {"tinit": 0, "tfinal": 1, "deltaT": 1}, "molora": {},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "rank_pattern": {"method.rank_pattern": {"q_proj": 3}},
    "alpha_pattern": {"method.alpha_pattern": {"q_proj": 3.0}},
    "modules_to_save": {"method.modules_to_save": ["lm_head", "norm"]},
    "padded": {"packed": False},
    "batch_tokens": {"train.batch_size": ..., "train.batch_tokens": 60},
    "checkpointing": {"train.checkpointing": True},
    "nf4": {"model.quantize": "nf4"},
    "classification": {"method.target_modules": ["query", "output.dense"], "train.task": "classification"},
}


def repairs(init: str) -> bool:
    """Whether a start needs a base that was quantized."""
    return "residual" in vars(lk.INITS.module(init)).get("NEEDS", ())


DIMENSIONS: dict[str, dict[str, dict[str, Any]]] = {
    "way": WAYS,
    "init": {n: {"method.init": n, "model.quantize": "nf4" if repairs(n) else None} for n in lk.INITS},
    "optimizer": {n: {"optim.name": n, "train.accumulate": 2, **OPTIM.get(n, {})} for n in OPTIMIZERS},
    "controller": {n: {"train.controller": {"name": n, **SCHEDULED.get(n, {})}} for n in CONTROLLERS},
}


PACKED = [True]


class Silent(Progress):
    def __init__(self) -> None:
        super().__init__(0, live=False)

    def _write(self, text: str) -> None:
        pass


class Bench:
    """The models, the data and a directory, made once; a session in memory for a configuration."""

    def __init__(self, directory: Path, language: Path, encoder: Path) -> None:
        from lorakit.models.load import load

        self.directory, self.paths = directory, {"sft": language, "classification": encoder}
        chat = [
            [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes!" * (1 + i % 3)}]
            for i in range(12)
        ]
        rows = {
            "sft": [{"messages": m} for m in chat],
            "classification": [
                {"text": f"{i} of 12" + "?!"[i % 2] * 5, "label": ["odd", "even"][i % 2]} for i in range(12)
            ],
        }
        self.models, self.data, self.copies = {}, {}, {}
        for task, path in self.paths.items():
            file = directory / f"{task}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
            loaded = load(str(path), task="causal" if task == "sft" else task, dtype="float32", labels=["even", "odd"])
            read = read_train_valid(file)[0]
            settings = {"task": find_task(read, None), "labels": ["even", "odd"] if task != "sft" else None}
            self.data[task] = encode(read, loaded.tokenizer, model_limit=128, **settings)
            self.models[task] = loaded
        assert enable_packing(self.models["sft"].model)
        self.experts = []
        for i, targets in enumerate((["q_proj"], ["q_proj", "down_proj"])):
            model = lk.attach(self.fresh("sft"), lk.LoRA(r=2 + i), target_modules=targets)
            with torch.no_grad():
                for _, _, adapter in lk.adapters(model):
                    adapter.lora_B.normal_(std=0.02)
            self.experts.append(str(lk.save(model, directory / f"expert{i}")))

    def fresh(self, task: str) -> nn.Module:
        return copy.deepcopy(self.models[task].model)

    def plain(self, task: str, slot: int) -> nn.Module:
        """One of a few copies of the model, without the adapter of the trial before."""
        model = self.copies.setdefault((task, slot), None) or self.fresh(task)
        self.copies[task, slot] = model
        return lk.detach(model) if lk.names(model) else model

    def config(self, method: str, changes: dict[str, Any]) -> RunConfig:
        task = changes.get("train.task", "sft")
        fields = lk.METHODS[method].__dataclass_fields__
        own = SETTINGS.get(method, {"r": 2} if {"r", "alpha"} <= fields.keys() else {})
        own = {"adapters": self.experts} if "experts" in needs(lk.METHODS[method]()) else own
        if task == "classification" or "experts" not in needs(lk.METHODS[method]()):
            own = {"target_modules": ["q_proj", "down_proj"], **own}
        if method == "stack" and task == "sft":
            own = {**own, "parts": [part for part in own["parts"] if part["name"] != "bitfit"]}  # Llama has no biases
        tree = {
            "model.name": str(self.paths[task]), "model.dtype": "float32", "data.path": "rows.jsonl", "method.name": method,
            **{f"method.{key}": value for key, value in own.items()}, "optim.lr": 1e-2, "optim.warmup": 0,
            "train.batch_size": 2, "train.max_steps": 3, "train.task": task, "output": str(self.directory / "run"),
        }  # fmt: skip
        tree |= {key: value for key, value in changes.items() if key != "packed"}
        return loads("", [f"{key}={json.dumps(value)}" for key, value in tree.items() if value is not ...])[0]

    def base(self, config: RunConfig, slot: int) -> Base:
        """The base of a run; runs that are alive together have their own `slot`."""
        task, lost = str(config.train.task), {}
        shared = not (config.model.quantize or config.train.checkpointing)  # these change the model itself
        model = self.plain(task, slot) if shared else self.fresh(task)
        head = list(self.models[task].head_modules)
        if config.model.quantize:
            lost = quantize(model, config.model.quantize, config.method.config, **vars(config.method.target))
        return Base(model, self.models[task].tokenizer, head, None, lost)

    def begin(self, config: RunConfig, found: Any = None) -> tuple[session.Session, Job]:
        run = SimpleNamespace(path=self.directory, note=lambda text: None, checkpoints=self.directory / "none")
        one = session.Session(
            config, run, self.base(config, found is not None), self.data[str(config.train.task)], None, None, Silent()
        )
        one._attach(found)
        return one, one._job(SimpleNamespace())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_language: Path, tiny_encoder: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("composition"), tiny_language, tiny_encoder)


@pytest.fixture(scope="module")
def tiny_language(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A Llama with 2 layers of width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {f"{kind}_token_id": getattr(tiny_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=256, **sizes, **special)
    directory = tmp_path_factory.mktemp("models") / "tiny-language"
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is proved about the model again each time, and nothing has to outlive a crash."""
    monkeypatch.setattr(session, "enable_packing", lambda model: PACKED[-1])
    monkeypatch.setattr(session, "accelerate", lambda model, known: ORDINARY)
    monkeypatch.setattr(files, "sync", lambda path: None)


def pairs() -> Iterator[Any]:
    for method in METHODS:
        for dimension in DIMENSIONS:
            if dimension != "init" or "init" in lk.METHODS[method].__dataclass_fields__:
                yield pytest.param(method, dimension, id=f"{method}-{dimension}")


@pytest.mark.parametrize(("method", "dimension"), list(pairs()))
def test_every_pair_works_or_is_refused_before_it_begins(bench: Bench, method: str, dimension: str) -> None:
    wrong = []
    for value, changes in DIMENSIONS[dimension].items():
        PACKED[:] = [changes.get("packed", True)]
        try:
            outcome = tried(bench, method, changes, saves=dimension != "optimizer")  # which leaves no trace in the file
        except Exception as error:  # a crash: the one thing that must not be
            outcome = f"{type(error).__name__}: {error}"
        if outcome is not None:
            wrong.append(f"{method} with {dimension} {value}: {outcome}")
    assert not wrong, "\n".join(wrong)


def tried(bench: Bench, method: str, changes: dict[str, Any], *, saves: bool = True) -> str | None:
    """Say what is wrong with a pair, or None."""
    try:
        config = bench.config(method, changes)
    except UsageError as refusal:
        return None if len(str(refusal)) > 40 else f"refused without a reason: {refusal}"
    try:
        one, job = bench.begin(config)
    except UsageError as refusal:
        return None if refusal.why and refusal.fix and late(config, refusal) else f"refused late: {refusal}"
    began, base = adapter_tensors(job.model, "default"), base_bytes(job.model)
    began = {name: tensor.clone() for name, tensor in began.items()}
    state = State()
    step(job, state)
    if saves:
        one._first_step()
    tensors, saved = checkpoint(job, state)
    step(job, state)
    _, again = bench.begin(config, session.Found(tensors, saved))
    resumed = restore(again, tensors, saved)
    step(again, resumed)
    a, b = (adapter_tensors(j.model, "default") for j in (job, again))
    if a.keys() != b.keys() or not all(map(torch.equal, a.values(), b.values())):
        return "resuming gives another adapter"
    if base_bytes(job.model) != base:
        return "the base has changed"
    if all(name in began and torch.equal(began[name], tensor) for name, tensor in a.items()):
        return "it has learned nothing"
    return came_back(bench, config, job) if saves else None


def base_bytes(model: nn.Module) -> bytes:
    """A digest of the base, whatever it is stored in."""
    own = {name: p for name, p in model.named_parameters() if ".adapters." not in name}
    return hashlib.sha256(b"".join(p.detach().view(torch.uint8).numpy().tobytes() for p in own.values())).digest()


def late(config: RunConfig, refusal: UsageError) -> bool:
    """Whether it took the model to know: layers that the method refuses to be on, or an optimizer that says it needs one."""
    by_layers = str(refusal.where).startswith("layers ")
    by_size = "optim.name" in refusal.what and not vars(OPTIMIZERS.module(config.optim.name)).get("BY_METHOD", False)
    return by_layers or by_size


def step(job: Job, state: State) -> None:
    alone(update(job, state, job.steps[state.step]))
    state.step += 1


def checkpoint(job: Job, state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    optimizer, optimizer_scalars = optimizer_tensors(job.optimizer)
    controller, controller_scalars = job.controller.state()
    tensors = {"adapter": adapter_tensors(job.model, "default"), "optimizer": optimizer, "controller": controller}
    scalars = {"state": vars(state), "optimizer": optimizer_scalars, "controller": controller_scalars}
    return copy.deepcopy(tensors), json.loads(json.dumps(scalars))


def came_back(bench: Bench, config: RunConfig, job: Job) -> str | None:
    """The directory on a fresh base gives the trained model's outputs."""
    lk.save(job.model, bench.directory / "saved")
    loaded = lk.load(bench.base(config, 2).model, bench.directory / "saved").eval()
    rows = list(job.examples[:3])
    with torch.no_grad():
        job.model.eval()
        trained, again = (float(job.task.loss(m, rows)[0]) for m in (job.model, loaded))
    if abs(trained - again) > 1e-4 * abs(trained):
        return f"it comes back as another adapter: loss {again}, not {trained}"
    return None
