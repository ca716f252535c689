"""The directory of a run: whose it is, whether it is new, unfinished or finished, and what was asked for in it.

    config.yaml (resolved)  env.json  metrics.jsonl  samples.jsonl  log.txt  checkpoints/  adapter/  report.html

`adapter/` appears last and whole, so its presence is what "finished" means.
"""

import json
import os
import platform
import shutil
import time
from pathlib import Path

import torch

from ..core.errors import FileError, UsageError
from ..core.files import LOCK, atomic_write
from .checkpoint import steps
from .config import RunConfig
from .config_check import resume_conflicts
from .config_file import dump, load

CONFIG, ADAPTER, CHECKPOINTS, LOG = "config.yaml", "adapter", "checkpoints", "log.txt"


class RunDirectory:
    """A run's directory, checked before anything is loaded. Raises UsageError rather than overwrite anything."""

    def __init__(self, path: str | Path, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output {str(path)!r} is a file", fix="name a directory")
        if self.finished and not overwrite:
            raise UsageError(
                f"{path} holds a finished run",
                fix=f"use its adapter ({self.adapter}), choose another output, or give --overwrite",
            )
        foreign = self._foreign()
        if foreign:
            raise UsageError(
                f"output {str(path)!r} holds files that are not a run's: {', '.join(foreign[:5])}",
                fix="choose an empty or new directory",
            )

    def make(self) -> None:
        """Make the directory. Raises UsageError where that cannot be."""
        where = f"output {str(self.path)!r}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {where}", why=error.strerror, fix="choose another output") from None
        if not os.access(self.path, os.W_OK):
            raise UsageError(f"{where} is not writable", fix="choose another output")

    @property
    def adapter(self) -> Path:
        """Where the trained adapter goes."""
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints go."""
        return self.path / CHECKPOINTS

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return (self.adapter / "adapter_config.json").exists()

    def clear(self) -> None:
        """Delete what an earlier run left here (under the lock, for --overwrite)."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def claim(self, config: RunConfig) -> None:
        """Write the resolved configuration, or compare it with the one the unfinished run was started with.

        A run that ended before its first checkpoint left nothing to go on with, so its configuration gives way.
        """
        file = self.path / CONFIG
        if not file.exists() or not steps(self.checkpoints):
            atomic_write(file, dump(config))
            atomic_write(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
            return
        changed = resume_conflicts(load(file)[0], config)
        if changed:
            raise UsageError(
                f"{self.path} holds an unfinished run with another {', '.join(changed)}",
                fix="give the same configuration to resume it, choose another output, or give --overwrite",
                where=str(file),
            )

    def note(self, text: str) -> None:
        """Append a line to log.txt."""
        with (self.path / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _foreign(self) -> list[str]:
        if not self.path.is_dir() or (self.path / CONFIG).exists():
            return []
        mine = {LOCK, LOG}
        return sorted(e.name for e in self.path.iterdir() if e.name not in mine and not e.name.startswith(".lorakit"))


def environment() -> dict[str, object]:
    """Give the versions and the hardware that the figures of a run belong to."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "packages": {n: installed(n) for n in ("lorakit", "torch", "transformers", "safetensors", "tokenizers")},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def require_run(path: Path) -> Path:
    """Give `path` if it is a run's directory; FileError else."""
    if not (path / CONFIG).exists():
        raise FileError(f"{path} is not a run's directory", why=f"there is no {CONFIG} in it")
    return path
