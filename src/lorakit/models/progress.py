"""A note on stderr while something slow runs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show `text` with a spinner on a terminal, as one plain line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text, highlight=False)
        yield
        return
    with console.status(text):
        yield
