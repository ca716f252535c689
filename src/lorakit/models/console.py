"""What appears on stderr: a note while something slow runs, and nothing from transformers."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def status(text: str) -> Generator[None]:
    """Show `text` with a spinner on a terminal, as one plain line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text, highlight=False)
        yield
        return
    with console.status(text):
        yield


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers' reports and progress bars off the terminal: what matters in them comes back as errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
