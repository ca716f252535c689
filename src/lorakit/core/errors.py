"""Errors a user can cause. Each says what went wrong, why, how to fix it and where; the command line turns the class into an exit code."""


class LorakitError(Exception):
    """Base of every error with a known cause. `exit_code` is what the command line exits with."""

    exit_code = 1

    def __init__(self, what: str, *, why: str | None = None, fix: str | None = None, where: str | None = None) -> None:
        self.what, self.why, self.fix, self.where = what, why, fix, where
        super().__init__(what)

    def __str__(self) -> str:
        parts = [("why  ", self.why), ("fix  ", self.fix), ("where", self.where)]
        return "\n".join([self.what, *(f"  {label} : {text}" for label, text in parts if text)])


class UsageError(LorakitError, ValueError):
    """A wrong argument, option or configuration."""

    exit_code = 2


class DataError(LorakitError, ValueError):
    """Training or evaluation data that cannot be used."""

    exit_code = 3


class FileError(LorakitError):
    """A model, adapter or checkpoint file that is missing, damaged or of the wrong kind."""

    exit_code = 4


class ResourceError(LorakitError):
    """Not enough memory or disk."""

    exit_code = 5


class DivergenceError(LorakitError, ArithmeticError):
    """NaN or infinity in a loss, a gradient or a weight, or a loss that explodes."""

    exit_code = 6


class LockError(LorakitError):
    """Another process uses the same directory."""

    exit_code = 7


class CheckError(LorakitError):
    """A check the user asked for (parity, gate) did not hold."""

    exit_code = 8
