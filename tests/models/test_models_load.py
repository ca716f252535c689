import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lorakit.core.errors import FileError, UsageError
from lorakit.models import load
from lorakit.models.load import check_finite, pick_dtype


@pytest.fixture
def model(tmp_path, tiny_model):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(directory, change):
    file = directory / "model.safetensors"
    with safe_open(file, "pt") as opened:
        weights = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_the_model_is_the_one_in_the_files(tiny_model):
    loaded = load(tiny_model, dtype="float32", device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    assert torch.equal(loaded.model(tokens).logits, reference(tokens).logits)
    assert not loaded.model.training and loaded.head_modules == [] and loaded.path == tiny_model
    assert loaded.tokenizer.decode(loaded.tokenizer("héllo")["input_ids"]) == "héllo"


def test_a_new_head_comes_from_the_seed_alone(tiny_encoder):
    def head(seed, noise):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        loaded = load(tiny_encoder, task="classification", labels=["no", "yes", "maybe"], seed=seed, device="cpu")
        assert torch.equal(torch.get_rng_state(), state)
        assert loaded.head_modules == ["classifier"] and loaded.model.dtype == torch.float32
        assert loaded.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
        assert loaded.model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
        return loaded.model.classifier.weight

    assert torch.equal(head(0, noise=1), head(0, noise=2))
    assert not torch.equal(head(0, noise=1), head(1, noise=1))


def test_a_decoder_can_classify(tiny_model):
    loaded = load(tiny_model, task="classification", labels=["a", "b"], dtype="float32", device="cpu")
    assert loaded.head_modules == ["score"]
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    assert loaded.model(torch.arange(5)[None]).logits.shape == (1, 2)


def test_a_trained_head_is_kept_for_its_classes_and_trained_anew_for_others(tiny_encoder, tmp_path):
    first = load(tiny_encoder, task="classification", labels=["no", "yes"], seed=3, device="cpu")
    first.model.save_pretrained(tmp_path / "trained")
    first.tokenizer.save_pretrained(tmp_path / "trained")

    def again(labels):
        return load(tmp_path / "trained", task="classification", labels=labels, device="cpu")

    for labels in (None, ["no", "yes"]):
        kept = again(labels)
        assert kept.head_modules == [] and torch.equal(kept.model.classifier.weight, first.model.classifier.weight)
    assert again(["cat", "dog"]).head_modules == ["classifier"]
    assert again(["cat", "dog", "cow"]).model.classifier.out_features == 3
    assert again(["cat", "dog", "cow"]).head_modules == ["classifier"]
    with pytest.raises(UsageError, match="order"):
        again(["yes", "no"])


def test_classifying_needs_labels(tiny_encoder):
    with pytest.raises(UsageError, match="needs labels"):
        load(tiny_encoder, task="classification", device="cpu")
    for labels in (["one"], ["twice", "twice"]):
        with pytest.raises(UsageError, match="two or more different"):
            load(tiny_encoder, task="classification", labels=labels, device="cpu")


def test_no_code_of_the_directory_runs(model, tmp_path):
    canary = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    (model / "modeling_evil.py").write_text(canary)
    edit(
        model / "config.json",
        auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
        trust_remote_code=True,
        _attn_implementation_internal="kernels-community/evil",
        _attn_implementation="someone/evil",
        _experts_implementation_internal="someone/evil",
    )
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.T", "modeling_evil.T"]})
    loaded = load(model, dtype="float32", device="cpu")
    assert loaded.model.config._attn_implementation == "sdpa"
    edit(model / "config.json", model_type="evil")
    with pytest.raises(FileError, match="no model type 'evil'"):
        load(model, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(value, dtype):
    layer = torch.nn.Linear(40, 30).to(dtype)
    layer.bias.data.fill_(torch.finfo(dtype).max)  # large is fine
    check_finite(layer)
    layer.weight.data[17, 23] = value
    with pytest.raises(FileError, match="1 weights") as caught:
        check_finite(layer)
    assert caught.value.why == "weight"


def test_damaged_weights_are_refused(model):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda weights: weights[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(FileError, match="NaN or infinity") as caught:
        load(model, device="cpu")
    assert caught.value.why == name
    rewrite(model, lambda weights: weights.pop(name))
    with pytest.raises(FileError, match="missing or of the wrong shape") as caught:
        load(model, device="cpu")
    assert caught.value.why == name
    edit(model / "config.json", hidden_size=64)
    with pytest.raises(FileError):
        load(model, device="cpu")


def test_a_body_that_is_missing_is_damage_also_under_a_new_head(tiny_encoder, tmp_path):
    directory = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    rewrite(directory, lambda weights: weights.pop("encoder.layer.0.output.dense.weight"))
    with pytest.raises(FileError, match="missing"):
        load(directory, task="classification", labels=["a", "b"], device="cpu")


def test_a_tokenizer_that_does_not_fit_is_refused(model):
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(FileError, match="cannot load the tokenizer"):
        load(model, device="cpu")


def test_a_tokenizer_with_too_many_tokens_is_refused(model, tiny_tokenizer, tmp_path):
    import copy

    larger = copy.deepcopy(tiny_tokenizer)
    larger.add_tokens(["one", "more"])
    larger.save_pretrained(model)
    with pytest.raises(FileError, match="does not belong to the model") as caught:
        load(model, device="cpu")
    assert str(len(tiny_tokenizer) + 1) in caught.value.why


def test_padding_uses_a_token_that_is_there(model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    edit(model / "config.json", pad_token_id=None)
    loaded = load(model, device="cpu")
    assert loaded.tokenizer.pad_token == "<|endoftext|>"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id < loaded.model.config.vocab_size
    assert loaded.model.get_input_embeddings().num_embeddings == loaded.model.config.vocab_size


def test_the_dtype_rule(tiny_model, tiny_encoder, monkeypatch):
    decoder, encoder = (load(path, device="cpu", dtype="float32", **more).model.config for path, more in [
        (tiny_model, {}), (tiny_encoder, {"task": "classification", "labels": ["a", "b"]})
    ])  # fmt: skip
    cpu = torch.device("cpu")
    for native, chosen in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(sys.modules["lorakit.models.load"], "native_bfloat16", lambda device, native=native: native)
        assert pick_dtype("auto", cpu, "causal", decoder) == chosen
        assert pick_dtype("auto", cpu, "classification", decoder) == chosen
        assert pick_dtype("auto", cpu, "classification", encoder) == torch.float32
        assert pick_dtype("bfloat16", cpu, "classification", encoder) == torch.bfloat16
    with pytest.raises(UsageError, match="no dtype called 'float16'"):
        pick_dtype("float16", cpu, "causal", decoder)
