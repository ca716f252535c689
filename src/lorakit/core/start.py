"""What an init may look at when it fills the factors of one layer."""

from typing import NamedTuple

from .adapter import Base
from .statistics import Statistics


class Start(NamedTuple):
    """A layer whose factors start: the change will be scale * B A."""

    base: Base
    scale: float
    statistics: Statistics | None
