"""The built-in models (converted at most once a session), and every network connection refused."""

import socket
from pathlib import Path

import pytest

from lorakit.core.errors import LorakitError
from lorakit.models import load, resolve


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def built_in():
    """Resolve a built-in model, or skip where its wheel is not installed."""

    def directory(name: str) -> Path:
        try:
            return resolve(name)
        except LorakitError as error:
            pytest.skip(f"{name}: {error.what}; {error.fix}")

    return directory


@pytest.fixture(scope="session")
def smollm2(built_in):
    built_in("smollm2")
    return load("smollm2", dtype="float32", device="cpu")
