"""Base models: find one by name, load it, pack documents through it, let it write, and say what training it will need.

Importing this imports no transformers; the functions do when they are called.
"""

from .directory import fingerprint
from .generate import generate, stream
from .load import Loaded, check_finite, load
from .memory import Estimate, estimate
from .packing import enable_packing
from .prompts import encode_chat, encode_prompt, end_tokens
from .resolve import BUILT_IN, resolve
from .skeleton import Anatomy, anatomy, skeleton

__all__ = [
    "BUILT_IN",
    "Anatomy",
    "Estimate",
    "Loaded",
    "anatomy",
    "check_finite",
    "enable_packing",
    "encode_chat",
    "encode_prompt",
    "end_tokens",
    "estimate",
    "fingerprint",
    "generate",
    "load",
    "resolve",
    "skeleton",
    "stream",
]
