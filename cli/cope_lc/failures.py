"""Errors to exit codes, and to one line for people: what was wrong, where, what to do."""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from cope_lc.quiet_libraries import quiet_libraries
from cope_lc.text import one_line

FAILED, WRONG_INPUT = 1, 2
_INTERRUPTED = 130  # what Typer returns after Ctrl-C

# What Typer raises for a wrong call. Typer exports no name for it, and the module that defines it
# differs between releases (click, or Typer's copy of it); in each it is the base of BadParameter.
UsageError = typer.BadParameter.__bases__[0]


def exit_with(call: Callable[[], Any], *, debug: bool) -> NoReturn:
    """Run `call` and end the process with its exit code.

    Args:
        call: Runs the command; returns the exit code, or something else for 0.
        debug: Print the traceback of an error before its line.

    Raises:
        SystemExit: Always; 0 done, 1 it failed, 2 the input or the call was wrong.
    """
    # The process ends: looking through all of its objects for cycles would take a second.
    atexit.register(gc.freeze)
    try:
        with quiet_libraries(debug=debug):
            code = call()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away: a message would reach no one
        _drop_output()
        raise SystemExit(FAILED) from None
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # Typer's: its message is the help
            print(error, file=sys.stderr)
            raise SystemExit(WRONG_INPUT) from None
        if debug:
            traceback.print_exception(error)
        code, line = code_and_line(error)
        _say("; ".join([line, *getattr(error, "__notes__", ())]))
    if code == _INTERRUPTED:
        _say("stopped")
        code = FAILED
    raise SystemExit(code if isinstance(code, int) else 0)


def code_and_line(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error, and the line that tells people of it."""
    from adapter_store.errors import (
        AdapterNotFoundError,
        AdapterStoreError,
        InvalidAdapterError,
        KeyMismatchError,
    )
    from langchain_cope.errors import Cancelled, CopeError, InputError

    if isinstance(error, Cancelled):
        return FAILED, str(error)
    if isinstance(error, UsageError):
        return WRONG_INPUT, f"error: {_usage(error)}"
    if isinstance(error, InputError | InvalidAdapterError | AdapterNotFoundError):
        return WRONG_INPUT, f"error: {error}"
    if isinstance(error, KeyMismatchError):
        settings = (
            "on the command line keys are COPE_STORE_KEY_FILE or COPE_STORE_KEYS, "
            "the pepper is COPE_STORE_PEPPER"
        )
        return FAILED, f"error: {error}; {settings}"
    if isinstance(error, CopeError | AdapterStoreError):
        return FAILED, f"error: {error}"
    # pydantic's, told by its name: only a command that loaded pydantic can raise it.
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        return WRONG_INPUT, f"error: {_invalid(error.errors())}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return FAILED, f"error: {where}{error.strerror}"
    kind = type(error).__name__
    return FAILED, f"error: {kind}: {error}; this was not expected: --debug shows where it happened"


def _usage(error: Any) -> str:
    message = error.format_message().rstrip(".")
    return f"{message}; see {error.ctx.command_path} --help" if error.ctx else message


def _invalid(problems: list[Any]) -> str:
    """Return what pydantic says of each field, without its links."""
    lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems]
    return "; ".join(lines)


def _say(line: str) -> None:
    try:
        print(one_line(line), file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Send the interpreter's last flush nowhere: it would complain about the closed pipe again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
