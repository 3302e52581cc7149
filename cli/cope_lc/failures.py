"""Errors to exit codes, and to one line for people: what was wrong, where, what to do."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

FAILED, WRONG_INPUT = 1, 2
_INTERRUPTED = 130  # what Typer returns after Ctrl-C


def exit_with(call: Callable[[], Any], *, debug: bool) -> NoReturn:
    """Run ``call`` and end the process with the contract's exit code; ``debug`` shows the traceback of what failed."""
    from cope_lc.quiet_libraries import quiet_libraries

    try:
        with quiet_libraries(debug=debug):
            code = call()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away: there is nobody to tell
        _drop_output()
        raise SystemExit(FAILED) from None
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # Typer's: its message is the help
            print(error, file=sys.stderr)
            raise SystemExit(WRONG_INPUT) from None
        if debug:
            import traceback

            traceback.print_exception(error)
        code, line = explain(error)
        _say(line)
    if code == _INTERRUPTED:
        _say("stopped")
        code = FAILED
    raise SystemExit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and its line."""
    from adapter_store.errors import (
        AdapterNotFoundError,
        AdapterStoreError,
        InvalidAdapterError,
        KeyMismatchError,
    )
    from langchain_cope.errors import Cancelled, CopeError, InputError

    if isinstance(error, Cancelled):
        return FAILED, str(error)
    if isinstance(
        error, typer.BadParameter.__mro__[1]
    ):  # Typer's usage error, which it exports under no name
        return WRONG_INPUT, f"error: {_usage(error)}"
    if isinstance(error, InputError | InvalidAdapterError | AdapterNotFoundError):
        return WRONG_INPUT, f"error: {error}"
    if isinstance(error, KeyMismatchError):
        return (
            FAILED,
            f"error: {error}. Here keys are COPE_STORE_KEY_FILE or COPE_STORE_KEYS, the pepper COPE_STORE_PEPPER",
        )
    if isinstance(error, CopeError | AdapterStoreError):
        return FAILED, f"error: {error}"
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):
        return WRONG_INPUT, f"error: {_invalid(error.errors())}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return FAILED, f"error: {where}{error.strerror}"
    kind = type(error).__name__
    return FAILED, f"error: {kind}: {error}; this was not expected: --debug shows where it happened"


def _usage(error: Any) -> str:
    context = error.ctx
    help_of = f"; see {context.command_path} --help" if context else ""
    return f"{error.format_message().rstrip('.')}{help_of}"


def _invalid(problems: list[Any]) -> str:
    """What pydantic found wrong, field by field, without its links."""
    return "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in problems)


def _say(line: str) -> None:
    from cope_lc.text import one_line

    try:
        print(one_line(line), file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Let the interpreter's last flush go nowhere, where it would complain about the closed pipe once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
