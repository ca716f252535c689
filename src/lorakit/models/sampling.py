"""How the next token is drawn, and where a text stops: the two hooks of transformers' generation loop that we fill."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to


class Draw:
    """A logits processor that draws: it leaves only the drawn token possible, so that the greedy loop takes it.

    Each row has a random stream of its own, from (seed, row index): neither the batch nor anyone's use of torch's
    global generator changes what is drawn.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, rows: list[int]) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._streams = [torch.Generator().manual_seed((seed << 20) + row) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn scores (B, V) into zero at the drawn token and -inf elsewhere."""
        probabilities = nucleus((scores.float() / self._temperature).softmax(-1), self._top_p).cpu()
        rows = zip(probabilities, self._streams, strict=True)
        drawn = torch.stack([row.multinomial(1, generator=stream) for row, stream in rows]).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of tokens whose probability reaches `top_p`; (B, V), not renormalised."""
    if top_p >= 1:
        return probabilities
    ranked, order = probabilities.sort(descending=True)
    beyond = ranked.cumsum(-1) - ranked >= top_p  # reached without this token
    return torch.zeros_like(probabilities).scatter(1, order, ranked.masked_fill(beyond, 0.0))


class StopText:
    """A stopping criterion: a row is done when one of the texts appears in what it has written since `start`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str], start: int) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row (B,) is done."""
        written = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        done = [before_stop(text, self._stop) != text for text in written]
        return torch.tensor(done, device=input_ids.device)


def before_stop(text: str, stop: Sequence[str] | None) -> str:
    """The part of `text` before the first stop text."""
    places = [place for end in stop or () if end and (place := text.find(end)) >= 0]
    return text[: min(places)] if places else text


def held_back(text: str, stop: Sequence[str] | None) -> int:
    """How many characters at the end of a growing `text` may still change: half a character, or half a stop text."""
    sound = text.rstrip(_BROKEN)
    begun = [n for end in stop or () for n in range(1, len(end)) if sound.endswith(end[:n])]
    return len(text) - len(sound) + max(begun, default=0)
