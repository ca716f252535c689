"""The adapter of a run on disk: the PEFT directory with what a run knows about it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..data.dataset import Dataset
from ..interop.adapter_directory import WEIGHTS, save
from ..interop.read import read_tensors
from .base import Base
from .config import RunConfig

PEFT_TASK = {"sft": "CAUSAL_LM", "completion": "CAUSAL_LM", "classification": "SEQ_CLS"}


@dataclass(frozen=True)
class AdapterFiles:
    """Saves adapter `name` of a run's model. `fingerprint` is that of the base."""

    base: Base
    config: RunConfig
    data: Dataset
    fingerprint: str | None
    name: str

    def save(self, directory: Path) -> tuple[int, int]:
        """Write the directory and open it again. Gives (tensors, bytes of their file)."""
        named = self.config.model.name
        own = named if self.base.path is None or not Path(named).exists() else Path(named).resolve().name
        extra = {
            "base": {"name": own, "quantize": self.config.model.quantize, "fingerprint": self.fingerprint},
            "task": self.config.train.task,
            "labels": self.data.labels,
            "template": self.data.facts.template,
            "prompt_format": self.data.prompt_format,
            "max_length": self.data.max_length,
        }
        task = PEFT_TASK[str(self.config.train.task)]
        tokenizer = self.base.tokenizer
        save(self.base.model, directory, self.name, base=named, tokenizer=tokenizer, task_type=task, extra=extra)
        file = directory / WEIGHTS
        return len(read_tensors(file)), file.stat().st_size

    def try_saving(self, directory: Path) -> int:
        """Save beside, open again, delete: errors of saving are found after the first step, not after the last."""
        with tempfile.TemporaryDirectory(dir=directory, prefix=".lorakit-first-step-") as scratch:
            return self.save(Path(scratch) / "adapter")[0]
