"""A model ready to use: a base model and, if one was named, its adapter; found from what a user types."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import FileError, UsageError
from .machine import set_threads
from .output import note, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"


@dataclass(frozen=True)
class Opened:
    """A model in eval mode: `path` is the base model's directory, `adapter` the active adapter's, None without one."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    base: str
    path: Path
    adapter: Path | None
    side: dict[str, Any]

    def prompt(self, text: str, system: str | None = None) -> str | list[dict[str, str]]:
        """Put a user's text into the form the adapter was trained on: messages, or the text in its prompt format."""
        if self.tokenizer.chat_template is not None:
            return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
        from ..data import write_prompt

        return write_prompt(self.side.get("prompt_format") or "{prompt}", text, system)


def find_adapter(name: str) -> Path | None:
    """Give the adapter directory that `name` means (an adapter, or a run that has one); None if it is no adapter."""
    path = Path(name)
    if (path / "adapter_config.json").exists():
        return path
    if (path / "adapter" / "adapter_config.json").exists():
        return path / "adapter"
    if (path / "checkpoints").is_dir():
        raise FileError(f"the run {path} is not finished: it has no adapter yet", fix=f"lorakit train {path}")
    return None


def require_adapter(name: str) -> Path:
    """Give the adapter directory that `name` means; FileError if there is none."""
    found = find_adapter(name)
    if found is None:
        missing = "there is no such directory" if not Path(name).exists() else "there is no adapter_config.json in it"
        raise FileError(f"{name} is no adapter", why=missing, fix="give the directory that training wrote: RUN/adapter")
    return found


def base_of(adapter: Path) -> str:
    """Give the base model an adapter was trained on: as the run that holds it says, else as the adapter says."""
    if (adapter.parent / "config.yaml").exists():
        from ..train.config_file import load

        return load(adapter.parent / "config.yaml")[0].model.name
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise FileError("the adapter does not name its base model", fix="--base MODEL", where=str(adapter))
    return named


def open_model(
    name: str, *, base: str | None = None, dtype: str = "auto", classify: bool = False, plain: bool = False
) -> Opened:
    """Load an adapter on its base model, or a bare base model if `name` is no adapter.

    A base that was quantized in training is quantized here too; `plain` reads its weights back into float tensors.
    Raises UsageError for a classifier unless `classify`, FileError for files that do not fit.
    """
    from ..interop.adapter_directory import load as load_adapter
    from ..models.load import load

    set_threads()
    adapter = find_adapter(name)
    if adapter is None:
        loaded = load(base or name, dtype=dtype)
        return Opened(loaded.model, loaded.tokenizer, loaded.name, loaded.path, None, {})
    side = read_json(adapter / "lorakit.json") if (adapter / "lorakit.json").exists() else {}
    labels = _labels(adapter, side)
    if labels is not None and not classify:
        raise UsageError(f"{name} is a classifier; it writes no text", fix=f"lorakit eval {name} --data FILE")
    chosen = base or base_of(adapter)
    if not quiet():
        note(f"adapter {adapter} on {chosen}")
    check_base(adapter, side, chosen, named=base is not None)
    task = "causal" if labels is None else "classification"
    loaded = load(chosen, task=task, labels=labels, dtype=dtype, prepare=_as_trained(adapter, side, plain))
    load_adapter(loaded.model, adapter, ADAPTER)
    loaded.model.eval()
    return Opened(loaded.model, loaded.tokenizer, chosen, loaded.path, adapter, side)


def _as_trained(
    adapter: Path, side: dict[str, Any], plain: bool
) -> "Callable[[PreTrainedModel, list[str]], None] | None":
    """Give what stores a base's weights as they were when the adapter was trained; None if they were not quantized."""
    stored = (side.get("base") or {}).get("quantize")
    if stored is None:
        return None
    in_full = read_json(adapter / "adapter_config.json").get("modules_to_save")

    def prepare(model: "PreTrainedModel", head: list[str]) -> None:
        from ..models.quantize import dequantize, quantize

        quantize(model, stored, modules_to_save=in_full)
        if plain:
            dequantize(model)

    return prepare


def check_base(adapter: Path, side: dict[str, Any], chosen: str, *, named: bool) -> None:
    """Refuse a base whose weights are not those the adapter was trained on; one that was named on purpose gets a note."""
    from ..models.directory import fingerprint
    from ..models.resolve import resolve

    wanted = (side.get("base") or {}).get("fingerprint")
    if wanted is None or fingerprint(resolve(chosen)) == wanted:
        return
    if not named:
        why = "its fingerprint differs from the one in lorakit.json; on other weights the adapter means something else"
        fix = "--base MODEL names a base on purpose"
        raise FileError(f"{chosen} is not the model this adapter was trained on", why=why, fix=fix, where=str(adapter))
    note(f"{chosen} is not the model this adapter was trained on")


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object of an adapter; FileError if it is none."""
    from ..interop.read import read_json as read

    if not path.is_file():
        raise FileError(f"{path.name} is missing", where=str(path.parent))
    return read(path)


def _labels(adapter: Path, side: dict[str, Any]) -> list[str] | None:
    if read_json(adapter / "adapter_config.json").get("task_type") != "SEQ_CLS":
        return None
    labels = side.get("labels")
    if not isinstance(labels, list):
        raise FileError(
            "the classifier does not name its classes", why="lorakit.json has no labels", where=str(adapter)
        )
    return [label if isinstance(label, str) else json.dumps(label) for label in labels]
