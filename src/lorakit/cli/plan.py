"""`lorakit plan`: what a run would do and need, before it does."""


def plan() -> None:
    """Say what a run would do and need."""


def show(config, json) -> None:
    """Say."""
