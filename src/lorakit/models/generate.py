"""Write text with a model: many prompts at once, or one answer piece by piece."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..core.bank import route_of
from ..core.errors import UsageError
from .console import quiet_transformers
from .modes import evaluating
from .prompts import Prompt, encode_prompt, end_tokens
from .sampling import Draw, StopText, before_stop, held_back

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_FROM_THE_MODEL = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    stop: Sequence[str] | None = None,
    adapters: Sequence[str | None] | None = None,
) -> list[str]:
    """The continuation of every prompt, in order, without the prompt, control tokens and stop text.

    A prompt is a text (one user message where the tokenizer has a chat template), a list of messages, or token ids. The
    text ends at an end token, before one of the `stop` texts, or after `max_tokens`. Temperature 0 takes the likeliest
    token; else tokens are drawn from the smallest set that holds `top_p` of the probability, for each prompt from
    (seed, its index) alone. adapters: of a bank (`lk.bank`) that is active, one for each prompt, None being the base.
    UsageError for a prompt longer than the model's context, and for settings out of range.
    """
    _check(max_tokens, temperature, top_p, batch_size)
    if adapters is not None and len(adapters) != len(prompts):
        raise UsageError(f"{len(adapters)} adapters for {len(prompts)} prompts", fix="give one for each prompt")
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    _check_lengths(encoded, _context(model))
    ends = _end_ids(model, tokenizer)
    texts = [""] * len(encoded)
    for rows in _batches([len(ids) for ids in encoded], _context(model), max_tokens, batch_size):
        inputs = _inputs(model, tokenizer, [encoded[i] for i in rows])
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        room = min(max_tokens, (_context(model) or start + max_tokens) - start)
        routed = nullcontext() if adapters is None else route_of(model).during([adapters[i] for i in rows])
        with routed, _writing(model, tokenizer, ends, room) as settings:
            tokens = cast(Any, model).generate(
                **inputs,
                generation_config=settings,
                logits_processor=_draw(temperature, top_p, seed, rows),
                stopping_criteria=[StopText(tokenizer, stop, start)] if stop else None,
            )
        for i, row in zip(rows, tokens[:, start:].tolist(), strict=True):
            texts[i] = before_stop(_decode(tokenizer, _until(row, ends)), stop)
    return texts


def stream(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    *,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] | None = None,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces as it is written; joined they are what `generate` gives for it alone."""
    _check(max_tokens, temperature, top_p, 1)
    encoded = encode_prompt(tokenizer, prompt)
    _check_lengths([encoded], _context(model))
    state, ends, draw = (
        _inputs(model, tokenizer, [encoded]),
        _end_ids(model, tokenizer),
        _draw(temperature, top_p, seed, [0]),
    )
    start = 1 if model.config.is_encoder_decoder else len(encoded)
    written: list[int] = []
    shown = ""
    for _ in range(min(max_tokens, (_context(model) or start + max_tokens) - start)):
        with _writing(model, tokenizer, ends, 1) as settings:
            state = _step(model, state, settings, draw)
        written.append(int(_sequences(state)[0, -1]))
        text = _decode(tokenizer, _until(written, ends))
        if written[-1] in ends or before_stop(text, stop) != text:
            break
        ready = text[: len(text) - held_back(text, stop)]
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    rest = before_stop(_decode(tokenizer, _until(written, ends)), stop)[len(shown) :]
    if rest:
        yield rest


def _step(
    model: "PreTrainedModel", state: dict[str, Any], settings: "GenerationConfig", draw: list[Draw] | None
) -> dict[str, Any]:
    """Generate one token and give the inputs of the next call: with the cache so far, or the encoder's output."""
    if model.config.is_encoder_decoder and "encoder_outputs" not in state:
        with torch.no_grad():
            encoded = model.get_encoder()(input_ids=state.pop("input_ids"), attention_mask=state["attention_mask"])
        state["encoder_outputs"] = encoded
    out = cast(Any, model).generate(
        **state, generation_config=settings, logits_processor=draw, return_dict_in_generate=True
    )
    if model.config.is_encoder_decoder:
        return {**state, "decoder_input_ids": out.sequences}
    mask = torch.ones_like(out.sequences)
    return {"input_ids": out.sequences, "attention_mask": mask, "past_key_values": out.past_key_values}


def _sequences(state: dict[str, Any]) -> Tensor:
    return state["decoder_input_ids"] if "decoder_input_ids" in state else state["input_ids"]


def _check(max_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    wrong = [
        *([f"max_tokens must be at least 1, got {max_tokens}"] if max_tokens < 1 else []),
        *([f"temperature must be 0 or more, got {temperature}"] if not 0 <= temperature < float("inf") else []),
        *([f"top_p must be in (0, 1], got {top_p}"] if not 0 < top_p <= 1 else []),
        *([f"batch_size must be at least 1, got {batch_size}"] if batch_size < 1 else []),
    ]
    if wrong:
        raise UsageError("; ".join(wrong))


def _check_lengths(encoded: list[list[int]], context: int | None) -> None:
    for i, ids in enumerate(encoded):
        if not ids or (context is not None and len(ids) >= context):
            why = f"the model takes up to {context} with the answer" if ids else "there is nothing to go on from"
            raise UsageError(
                f"prompt {i} has {len(ids)} tokens", why=why, fix="shorten it" if ids else "write something"
            )


def _context(model: "PreTrainedModel") -> int | None:
    """The number of positions the model has; None where it has no limit (relative positions, recurrence)."""
    return getattr(
        model.config.get_text_config(decoder=True), "max_position_embeddings", None
    )  # under any of its names


def _batches(lengths: list[int], context: int | None, max_tokens: int, batch_size: int) -> list[list[int]]:
    """Indices by batch: long prompts first, so that neighbours need little padding.

    One that leaves less than `max_tokens` of the context goes alone, so that it cannot shorten another's answer.
    """
    limit = context or max(lengths, default=0) + max_tokens
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    alone = [[i] for i in order if lengths[i] + max_tokens > limit]
    rest = order[len(alone) :]
    return alone + [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]


def _inputs(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]]) -> dict[str, Tensor]:
    """Pad to one length, before the text where the model writes on from it, and mask by length, never by token id."""
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    blanks = [[0] * (width - len(row)) for row in rows]
    if model.config.is_encoder_decoder:
        ids = [row + [pad] * len(blank) for row, blank in zip(rows, blanks, strict=True)]
        mask = [[1] * len(row) + blank for row, blank in zip(rows, blanks, strict=True)]
    else:
        ids = [[pad] * len(blank) + row for row, blank in zip(rows, blanks, strict=True)]
        mask = [blank + [1] * len(row) for row, blank in zip(rows, blanks, strict=True)]
    device = model.device
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


@contextmanager
def _writing(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ends: set[int], max_tokens: int
) -> Generator["GenerationConfig"]:
    """Evaluation mode, and settings of ours alone: a model's file may ask for sampling, penalties, even remote code."""
    from transformers import GenerationConfig

    before = model.generation_config
    own = {name: value for name in _FROM_THE_MODEL if (value := before.to_dict().get(name)) is not None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=sorted(ends), pad_token_id=pad, use_cache=True, **own
    )
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad, **own)
    try:
        with evaluating(model), quiet_transformers():
            yield settings
    finally:
        model.generation_config = before


def _end_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    declared = model.generation_config.eos_token_id
    own = declared if isinstance(declared, list) else [declared]
    return {end for end in own if end is not None} | end_tokens(tokenizer)


def _draw(temperature: float, top_p: float, seed: int, rows: list[int]) -> list[Draw] | None:
    return [Draw(temperature, top_p, seed, rows)] if temperature > 0 else None


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
