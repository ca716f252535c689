"""From training to the merged model on a tiny model, through the commands a user types."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.train.config_file import load


def test_train_made_a_run_of_what_was_asked_for(trained: Path, tiny_model: Path) -> None:
    config = load(trained / "config.yaml")[0]
    assert (config.model.name, config.optim.lr, config.train.max_steps) == (str(tiny_model), 0.05, 5)
    assert vars(config.method.config)["r"] == 4
    assert (trained / "adapter" / "adapter_model.safetensors").exists()


def test_a_finished_run_is_not_touched_without_overwrite(lorakit: Callable, trained: Path) -> None:
    before = (trained / "adapter" / "adapter_model.safetensors").read_bytes()
    done = lorakit("train", trained)
    assert done.code == 2
    assert "--overwrite" in done.err
    assert (trained / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_resume_insists_on_a_checkpoint(lorakit: Callable, tmp_path: Path) -> None:
    done = lorakit("train", "--resume", "model=m", "data=d", f"output={tmp_path}/new")
    assert done.code == 2
    assert "no unfinished run" in done.err


def test_the_result_is_json_on_stdout_and_progress_has_no_control_codes(
    lorakit: Callable, tiny_model: Path, orders_file: Path, tmp_path: Path
) -> None:
    flags = ["--model", tiny_model, "--data", orders_file, "-o", tmp_path / "run", "--max-steps", 2, "--json"]
    done = lorakit("finetune", *flags)
    assert done.code == 0
    found = json.loads(done.out)
    assert (found["steps"], found["adapter"]) == (2, str(tmp_path / "run" / "adapter"))
    assert "step 2/2" in done.err
    assert not {"\x1b", "\r"} & set(done.err)


def test_plan_foresees_what_training_does(lorakit: Callable, trained: Path, orders_file: Path, tmp_path: Path) -> None:
    from lorakit.cli.inspect import describe

    done = lorakit("plan", trained, f"output={tmp_path}/x", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    real = describe(trained / "adapter")
    assert (found["trainable"], found["layers"]) == (real["parameters"], real["layers"])
    assert (found["steps"], found["rows_per_step"], found["rows"]) == (5, 4, 16)
    memory = found["memory_bytes"]
    assert memory["total"] == sum(v for k, v in memory.items() if k not in ("total", "available"))
    assert memory["adapter"] == 4 * real["parameters"]
    assert not (tmp_path / "x").exists()
    text = lorakit("train", trained, f"output={tmp_path}/x", "--dry-run").out
    assert "5 of 4 rows" in text
    assert not (tmp_path / "x").exists()


def test_plan_says_what_would_fit_if_it_does_not(
    lorakit: Callable, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.cli import planning

    monkeypatch.setattr(planning, "_available", lambda: 1000)
    done = lorakit("plan", trained)
    assert done.code == 5
    assert "train.checkpointing: true (-" in done.err
    assert "train.batch_size: 2 with train.accumulate: 2 (-" in done.err


def test_inspect_reads_the_files(lorakit: Callable, trained: Path) -> None:
    from safetensors.torch import load_file

    found = json.loads(lorakit("inspect", trained, "--json").out)
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    assert (found["r"], found["method"], found["layers"]) == (4, "lora", 21)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    some = "model.layers.1.mlp.up_proj"
    assert found["modules"][some]["lora_B"]["norm"] == pytest.approx(
        float(tensors[f"base_model.model.{some}.lora_B.weight"].norm()), rel=1e-5
    )
    assert found["warnings"] == []
    assert "lora_B" in lorakit("inspect", trained / "adapter").out


def test_inspect_warns_of_an_untrained_adapter(lorakit: Callable, trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "adapter", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    assert "1 tensors are all zero" in lorakit("inspect", tmp_path / "a").out


def logits(directory: Path, adapter: Path | None, text: str) -> torch.Tensor:
    """What transformers and PEFT make of the files, without any of our code."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses names that transformers is renaming
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_is_base_and_adapter(
    dtype: str, lorakit: Callable, trained: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    found = json.loads(lorakit("fuse", trained, "-o", output, "--dtype", dtype, "--json").out)
    text = "two small lattes for Maya"
    wanted, base = logits(tiny_model, trained / "adapter", text), logits(tiny_model, None, text)
    merged = logits(output, None, text)
    changed = (wanted - base).abs().max()
    assert changed > 0.05
    if dtype == "float32":
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-4)
        assert found["max_logit_difference"] < 1e-4 * found["max_logit"]
        assert found["relative_delta_error"] == 0
        assert found["top1_agreement"] == 1
    else:
        assert (merged - wanted).abs().max() < 0.3 * changed
        assert 0 < found["relative_delta_error"] < 0.2
    assert found["layers_changed"] == found["layers"] == 21
    assert 0.5 < found["weights_changed"] <= 1
    assert json.loads((output / "config.json").read_text())["dtype"] == dtype
    again = lorakit("merge", trained, "-o", output)
    assert again.code == 2
    assert "--overwrite" in again.err


def test_an_adapter_that_changes_nothing_is_not_merged(lorakit: Callable, trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({k: t * (0 if "lora_B" in k else 1) for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    done = lorakit("merge", tmp_path / "run", "-o", tmp_path / "merged")
    assert done.code == 8
    assert "equals the base model" in done.err
    assert not (tmp_path / "merged").exists()


def test_generate_follows_the_adapter(lorakit: Callable, trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    ask = ["-p", "hi", "--max-tokens", 8, "--json"]
    with_adapter = json.loads(lorakit("generate", trained, *ask).out)
    base = json.loads(lorakit("infer", tiny_model, *ask).out)
    lorakit("merge", trained, "-o", tmp_path / "m", "--dtype", "float32")
    merged = json.loads(lorakit("generate", tmp_path / "m", *ask, "--dtype", "float32").out)
    in_float32 = json.loads(lorakit("generate", trained, *ask, "--dtype", "float32").out)
    assert with_adapter[0]["prompt"] == "hi"
    assert merged == in_float32 != base


def test_generate_reads_stdin(lorakit: Callable, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    from_stdin = lorakit("generate", trained, "--max-tokens", 8).out
    assert from_stdin == lorakit("generate", trained, "-p", "hi", "--max-tokens", 8).out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert lorakit("generate", trained).code == 2


def test_chat_switches_between_base_and_adapter(
    lorakit: Callable, trained: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(model: Path) -> str:
        return lorakit("generate", model, "-p", "hi", "--max-tokens", 6).out

    typed = "hi\n/reset\n/base\nhi\n/reset\n/compare\nhi\n/what\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    done = lorakit("chat", trained, "--max-tokens", 6)
    with_adapter, base = answer(trained), answer(tiny_model)
    assert done.code == 0
    assert done.out == f"{with_adapter}{base}base:\n{base}adapter:\n{with_adapter}"
    assert with_adapter != base
    assert "/what is no command" in done.err


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_eval_measures_what_transformers_measures(
    lorakit: Callable, trained: Path, tiny_model: Path, orders_file: Path
) -> None:
    import torch.nn.functional as F
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = ["--data", orders_file, "--dtype", "float32", "--exact-match", 3, "--max-tokens", 4]
    found = json.loads(lorakit("eval", trained, *flags, "--json").out)
    base_model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    models = {"base": base_model, "adapter": None}
    means = {}
    for name in models:
        model = base_model if name == "base" else PeftModel.from_pretrained(base_model, trained / "adapter").eval()
        total = count = 0
        for line in orders_file.read_text().splitlines():
            messages = json.loads(line)["messages"]
            prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            whole = prompt + messages[1]["content"] + "<|im_end|>"
            ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
            start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, start - 1 : -1]
            total += float(F.cross_entropy(scores, ids[0, start:], reduction="sum"))
            count += ids.shape[1] - start
        means[name] = total / count
    assert found["eval_loss"] == pytest.approx(means["adapter"], rel=1e-4)
    assert found["base"]["eval_loss"] == pytest.approx(means["base"], rel=1e-4)
    assert found["exact_match"] == found["base"]["exact_match"] == 0  # four tokens are too few for any ticket
    assert means["adapter"] < means["base"]


def test_eval_gates(lorakit: Callable, trained: Path, orders_file: Path) -> None:
    flags = [trained, "--data", orders_file, "--no-compare"]
    assert lorakit("eval", *flags, "--max-loss", 100).code == 0
    done = lorakit("eval", *flags, "--max-loss", 0.001)
    assert done.code == 8
    assert "above 0.001" in done.err


def test_a_classifier_is_trained_evaluated_and_merged(
    lorakit: Callable, tiny_encoder: Path, rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = rows(16, label=True)
    run = tmp_path / "run"
    flags = ["--model", tiny_encoder, "--data", data, "-o", run, "--epochs", 6, "--lr", 0.02]
    assert lorakit("train", *flags, "--batch-size", 8).code == 0
    found = json.loads(lorakit("eval", run, "--data", data, "--min-accuracy", 0.9, "--json").out)
    assert found["eval_accuracy"] >= 0.9
    refused = lorakit("generate", run, "-p", "x")
    assert refused.code == 2
    assert "is a classifier" in refused.err
    check = json.loads(lorakit("merge", run, "-o", tmp_path / "m", "--json").out)
    assert check["top1_agreement"] == 1
    from transformers import AutoModelForSequenceClassification

    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert list(merged.config.id2label.values()) == ["even", "odd"]


def test_quickstart_tells_the_story_and_fails_where_nothing_was_learned(
    lorakit: Callable, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.cli import quickstart

    monkeypatch.setattr(quickstart, "MODEL", str(tiny_model))
    monkeypatch.setattr(quickstart, "STEPS", 2)
    monkeypatch.setattr(quickstart, "MAX_TOKENS", 4)
    done = lorakit("quickstart", "-o", tmp_path / "q")
    assert done.code == 8  # the tiny model cannot learn this
    assert "of 16 answers are right" in done.err
    parts = [
        "● model",
        "● data    240 rows to train, 40 held out",
        "│ ",
        "● plan    LoRA r=8",
        "BEFORE",
        "exact match 0/16",
        "AFTER",
        "✓ the adapter opens again",
    ]
    places = [done.out.index(part) for part in parts]
    assert places == sorted(places)
    assert "\x1b" not in done.out + done.err
    config = load(tmp_path / "q" / "config.yaml")[0]
    assert (config.optim.lr, config.train.max_steps, config.method.target.last_n_layers) == (1e-3, 2, 12)
    assert lorakit("quickstart", "-o", tmp_path / "q").code == 2


@pytest.mark.slow
def test_quickstart_learns(lorakit: Callable, tmp_path: Path) -> None:
    done = lorakit("quickstart", "-o", tmp_path / "q")
    assert done.code == 0
    assert "exact match 0/16" in done.out
