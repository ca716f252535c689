"""Base models: find one by name, load it, pack documents through it, let it write, and say what training it will need.

Importing this imports no transformers; the functions do when they are called.
"""

from .directory import fingerprint
from .generate import generate, stream
from .load import Loaded, check_finite, load
from .packing import enable_packing
from .prompts import encode_chat, encode_prompt, end_tokens
from .resolve import BUILT_IN, resolve

__all__ = [
    "BUILT_IN",
    "Loaded",
    "check_finite",
    "enable_packing",
    "encode_chat",
    "encode_prompt",
    "end_tokens",
    "fingerprint",
    "generate",
    "load",
    "resolve",
    "stream",
]
