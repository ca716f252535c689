"""Load a model and its tokenizer from a directory: offline, safetensors only, none of its code run, weights checked."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from ..core.errors import FileError, UsageError
from .console import quiet_transformers
from .directory import read_json
from .resolve import resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Task = Literal["causal", "classification"]

# Keys of config.json that name code to run: a class in the directory, or an attention or expert kernel to fetch.
_CODE_KEYS = re.compile(
    r"auto_map|custom_pipelines|.*(attn|experts)_implementation.*|.*kernel_config.*|trust_remote_code"
)
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "</s>")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded base. `head_modules` are modules that the files do not hold, to be trained and saved in full."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    head_modules: list[str]
    name: str
    path: Path


def load(
    name: str | Path,
    *,
    task: Task = "causal",
    dtype: str | torch.dtype = "auto",
    labels: list[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    prepare: "Callable[[PreTrainedModel, list[str]], object] | None" = None,
) -> Loaded:
    """Load `name` (see `resolve`) for a task, in eval mode, with finite weights and a tokenizer that fits.

    `labels` are the class names in the order of the logits; a new head is initialised from `seed` alone. `dtype` "auto"
    is bfloat16 where the device computes it natively, else float32, and float32 for encoders that classify.
    Encoder-decoder models load as such under "causal". `prepare` is called with the model and its `head_modules` before
    it goes to the device: what shrinks the model (`quantize.py`) then needs no room there for the whole. Raises
    FileError for anything wrong with the files, UsageError for arguments that do not fit.
    """
    path = resolve(name)
    place = pick_device(device)
    with quiet_transformers():
        config = read_config(path)
        head_fits = task == "causal" or set_labels(config, labels, path)
        model, fresh = _model(path, config, task, pick_dtype(dtype, place, task, config), seed)
        tokenizer = _tokenizer(path, config)
    check_finite(model)
    _check_vocabulary(model, tokenizer, path)
    _set_padding(model, tokenizer)
    head = _head_modules(model, fresh, head_fits)
    if prepare is not None:
        prepare(model, head)
    return Loaded(model.to(place).eval(), tokenizer, head, str(name), path)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device meant by "auto": CUDA, else Apple's GPU, else the processor."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device, task: Task, config: "PretrainedConfig") -> torch.dtype:
    """The dtype meant by "auto" (see `load`) or by a name. UsageError for an unknown name."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in named:
        return named[dtype]
    if dtype != "auto":
        raise UsageError(f"no dtype called {dtype!r}", fix=f"choose one of auto, {', '.join(named)}")
    encoder = task == "classification" and _is_encoder(config)
    return torch.bfloat16 if native_bfloat16(device) and not encoder else torch.float32


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, so that it is faster than float32 and not slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


def check_finite(model: torch.nn.Module) -> None:
    """Raise FileError naming the weights that hold NaN or infinity; one read of the weights, no copy."""
    weights = dict([*model.named_parameters(), *model.named_buffers()])
    bad = [name for name, weight in weights.items() if weight.is_floating_point() and not _finite(weight)]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise FileError(
            f"{len(bad)} weights of the model hold NaN or infinity",
            why=shown,
            fix="download or copy the model again; if it was trained or merged, that run diverged",
        )


def _finite(weight: torch.Tensor) -> bool:
    """NaN spreads to both extremes, infinity is one of them."""
    return weight.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight.detach()))


def read_config(path: Path) -> "PretrainedConfig":
    """The configuration in `path`, without the keys that name code to run. FileError when it is damaged or unknown."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    content = _without_code(read_json(path / "config.json"))
    model_type = content.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise FileError(
            f"transformers has no model type {model_type!r}",
            why="lorakit never runs code that comes with a model",
            fix="use a model that transformers implements, or a newer transformers",
            where=str(path / "config.json"),
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # the validators of many model types raise many things
        raise FileError("config.json is not valid", why=_first_line(error), where=str(path / "config.json")) from error


def _without_code(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_code(value) for key, value in content.items() if not _CODE_KEYS.fullmatch(key)}
    return content


def _is_encoder(config: "PretrainedConfig") -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def set_labels(config: "PretrainedConfig", labels: list[str] | None, path: Path) -> bool:
    """Write the class names into the config and say whether a head trained for just these classes is there.

    UsageError if none are given or known, or if they are the head's own in another order.
    """
    declared: dict[int, str] = cast(Any, config).id2label
    names = list(declared.values()) if read_json(path / "config.json").get("id2label") else []
    if labels is None:
        if not names:
            raise UsageError("a model without a classification head needs labels", where=str(path))
        return True
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise UsageError("labels must be two or more different names", why=f"got {labels}")
    if set(names) == set(labels) and names != labels:
        raise UsageError(
            "the labels are not in the order of the model's head", why=f"it has {names}", fix="give them in that order"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    return names == labels


def auto_class(config: "PretrainedConfig", task: Task) -> Any:
    """The class of transformers that builds the model for a task."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if task == "classification":
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _model(
    path: Path, config: "PretrainedConfig", task: Task, dtype: torch.dtype, seed: int
) -> tuple["PreTrainedModel", set[str]]:
    """The model, and its parameters that were not in the files: at most the head or the pooler of a classifier."""
    from safetensors import SafetensorError

    auto, classify = auto_class(config, task), task == "classification"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a missing head is the only thing drawn at random
            model, info = auto.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=classify,  # a head of another number of classes is replaced
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise FileError(
            f"cannot load the model as {auto.__name__[9:]}", why=_first_line(error), where=str(path)
        ) from error
    fresh = {
        entry if isinstance(entry, str) else entry[0] for entry in (*info["missing_keys"], *info["mismatched_keys"])
    }
    body = model.base_model_prefix + "."
    damaged = sorted(key for key in fresh if not classify or (key.startswith(body) and ".pooler." not in key))
    if damaged:
        raise FileError(
            f"{len(damaged)} weights are missing or of the wrong shape",
            why=", ".join(damaged[:5]) + (" ..." if len(damaged) > 5 else ""),
            fix="the files and config.json do not belong together, or this is not a model for the task",
            where=str(path),
        )
    return model, fresh


def _head_modules(model: "PreTrainedModel", fresh: set[str], head_fits: bool) -> list[str]:
    """The modules whose parameters have to be trained in full: the new ones, and a head made for other classes."""
    body = model.base_model_prefix + "."
    foreign = set() if head_fits else {name for name, _ in model.named_parameters() if not name.startswith(body)}
    return sorted({name.rpartition(".")[0] for name in fresh | foreign})


def _tokenizer(path: Path, config: "PretrainedConfig") -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged tokenizer.json
        raise FileError("cannot load the tokenizer", why=_first_line(error), where=str(path)) from error
    if tokenizer is None:
        raise FileError("there is no tokenizer in the model directory", where=str(path))
    return tokenizer


def _check_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
    rows = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise FileError(
            "the tokenizer does not belong to the model",
            why=f"its largest token id is {largest}, the embedding has {rows} rows",
            fix="use the tokenizer files the model was published with",
            where=str(path),
        )


def _set_padding(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give both the same padding token, an existing one: no embedding is resized (padding is masked by length)."""
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        known = next((token for token in _PAD_TOKENS if token in vocabulary), None)
        tokenizer.pad_token = known or tokenizer.eos_token or next(iter(vocabulary))
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
