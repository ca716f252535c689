"""Moved to core/files.py (adapter directories and the model cache need it too); import it from there."""

from ..core.files import LOCK, WORKSPACE, RunLock, atomic_directory, atomic_write, discard, disk_errors, reclaim, sync

__all__ = ["LOCK", "WORKSPACE", "RunLock", "atomic_directory", "atomic_write", "discard", "disk_errors", "reclaim", "sync"]
