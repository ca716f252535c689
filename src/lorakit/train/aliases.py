"""The names that other tools give to our keys: PEFT, transformers, TRL, LLaMA-Factory, axolotl, unsloth, mlx-lm ...

A file or command line may use them, at the top level or inside a section; each use is answered with a one-line notice.
Most are another name for one key (RENAMED). Some also say it in another way (CONVERTED). A few ask for what always
happens (NEEDLESS).
"""

from collections.abc import Callable, Mapping
from typing import Any

RENAMED: Mapping[str, str] = {
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "model_name": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "dataset": "data.path",
    "dataset_path": "data.path",
    "data_path": "data.path",
    "train_file": "data.path",
    "validation_file": "data.valid",
    "eval_dataset": "data.valid",
    "val_size": "data.valid",
    "val_set_size": "data.valid",
    "adapter": "method.name",
    "finetuning_type": "method.name",
    "fine_tune_type": "method.name",
    "lora_r": "method.r",
    "lora_rank": "method.r",
    "rank": "method.r",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "use_rslora": "method.rank_stabilized",
    "additional_target": "method.modules_to_save",
    "lora_modules_to_save": "method.modules_to_save",
    "layers_to_transform": "method.layers",
    "loraplus_lr_ratio": "optim.b_ratio",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "max_grad_norm": "optim.clip",
    "gradient_clipping": "optim.clip",
    "adam_epsilon": "optim.eps",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "grad_accumulation_steps": "train.accumulate",
    "cutoff_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "max_seq_len": "train.max_length",
    "sequence_len": "train.max_length",
    "model_max_length": "train.max_length",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "iters": "train.max_steps",
    "save_every": "train.save_steps",
    "steps_per_eval": "train.eval_steps",
    "gradient_checkpointing": "train.checkpointing",
    "grad_checkpoint": "train.checkpointing",
    "save_total_limit": "train.keep_checkpoints",
    "max_new_tokens": "eval.max_tokens",
    "early_stopping_patience": "eval.patience",
    "load_best_model_at_end": "eval.load_best",
    "output_dir": "output",
    "run_dir": "output",
}

NEEDLESS: Mapping[str, str] = {
    "logging_steps": "every step is written to metrics.jsonl",
    "logging_first_step": "every step is written to metrics.jsonl",
    "steps_per_report": "every step is written to metrics.jsonl",
    "use_peft": "every run trains an adapter",
    "remove_unused_columns": "columns that are not needed are never read",
}


def _targets(value: Any) -> dict[str, Any]:
    if value in ("all", "all-linear"):
        return {"method.target_modules": "all-linear"}
    if isinstance(value, str) and "," in value:
        return {"method.target_modules": [name.strip() for name in value.split(",")]}
    return {"method.target_modules": [value] if isinstance(value, str) else value}


def _all_linear(value: Any) -> dict[str, Any]:
    return {"method.target_modules": "all-linear"} if value is True else {}


def _init(value: Any) -> dict[str, Any]:
    if value is False:
        raise ValueError("false (random A and B) would change the model before training; name a start value")
    return {"method.init": value.lower()} if isinstance(value, str) else {}


def _bfloat16(value: Any) -> dict[str, Any]:
    return {"model.dtype": {True: "bfloat16", False: "float32"}.get(value, "auto")}


def _float16(value: Any) -> dict[str, Any]:
    if value is True:
        raise ValueError("float16 overflows in training without loss scaling; use model.dtype: bfloat16")
    return {}


def _four_bits(value: Any) -> dict[str, Any]:
    return {"model.quantize": "nf4"} if value is True else {}


def _eight_bits(value: Any) -> dict[str, Any]:
    return {"model.quantize": "int8"} if value is True else {}


def _bits(value: Any) -> dict[str, Any]:
    formats = {None: None, 4: "nf4", 8: "int8"}
    if value not in formats:
        raise ValueError(f"{value} bits are not available; 4 and 8 are")
    return {"model.quantize": formats[value]}


def _last_layers(value: Any) -> dict[str, Any]:
    return {"method.last_n_layers": None if value == -1 else value}


def _warmup_ratio(value: Any) -> dict[str, Any]:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"must be a fraction from 0 to below 1, got {value!r}")
    return {"optim.warmup": value}


def _warmup_steps(value: Any) -> dict[str, Any]:
    if isinstance(value, float) and 0 < value < 1:
        raise ValueError(f"must be a whole number of steps, got {value!r}; optim.warmup takes fractions")
    return {"optim.warmup": value}


CONVERTED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "lora_target": _targets,
    "lora_target_modules": _targets,
    "lora_target_linear": _all_linear,
    "init_lora_weights": _init,
    "bf16": _bfloat16,
    "fp16": _float16,
    "load_in_4bit": _four_bits,
    "load_in_8bit": _eight_bits,
    "quantization_bit": _bits,
    "num_layers": _last_layers,
    "warmup_ratio": _warmup_ratio,
    "warmup_steps": _warmup_steps,
}


OTHER_NAMES = (*RENAMED, *CONVERTED, *NEEDLESS)


def translate(name: str, value: Any) -> dict[str, Any]:
    """Give {our dotted key: value} for another tool's key; nothing if it needs no setting here.

    Raises KeyError for an unknown name, ValueError (with the reason) for a value that has no counterpart here.
    """
    if name in NEEDLESS:
        return {}
    if name in CONVERTED:
        return CONVERTED[name](value)
    return {RENAMED[name]: value}
