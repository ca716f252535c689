"""From an exception to what the user reads on stderr and to the exit code."""

import errno
import os
import sys
import traceback
from typing import cast

import typer

from ..core.errors import LorakitError
from .output import style

SIGPIPE = 141  # what a shell gives for a process that a closed pipe ended

# The base of all that typer raises about a wrong command line (typer keeps its name and place private).
_COMMAND_LINE_ERROR = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def show(error: BaseException, *, debug: bool) -> None:
    """Print an error as `error: what`, then why, fix and where; the traceback only if asked for."""
    if isinstance(error, SystemExit) or _pipe_closed(error):
        _discard_stdout(error)
        return
    if debug or os.environ.get("LORAKIT_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if type(error).__name__ == "NoArgsIsHelpError":  # typer's: the message is the help text
        sys.stderr.write(f"{error}\n")
    else:
        sys.stderr.write(f"{style('error:', 'red', sys.stderr)} {message(error)}\n")


def message(error: BaseException) -> str:
    """Give the text for an error."""
    if isinstance(error, LorakitError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted"
    if isinstance(error, _COMMAND_LINE_ERROR):
        return f"{cast(typer.BadParameter, error).format_message()}\n  fix   : {_help_hint(error)}"
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return f"out of memory\n  why   : {_first_line(error)}\n  fix   : smaller train.batch_size or train.max_length"
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f"\n  where : {error.filename}" if error.filename else "")
    return f"unexpected {type(error).__name__}: {_first_line(error)}\n  fix   : --debug shows where it comes from"


def exit_code(error: BaseException) -> int:
    """Give the exit code for an error."""
    if _pipe_closed(error):
        return SIGPIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, LorakitError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130
    if isinstance(error, _COMMAND_LINE_ERROR):
        return 2
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return 5 if full or isinstance(error, MemoryError) or _out_of_memory(error) else 1


def _help_hint(error: BaseException) -> str:
    context = vars(error).get("ctx")
    return f"see `{context.command_path if context else 'lorakit'} --help`"


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's; by name, so that torch need not be imported


def _pipe_closed(error: BaseException) -> bool:
    # typer turns a broken pipe into SystemExit.
    turned = isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError)
    return turned or isinstance(error, BrokenPipeError)


def _discard_stdout(error: BaseException) -> None:
    """Keep Python from complaining at its end about what can no longer be written."""
    if _pipe_closed(error):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
