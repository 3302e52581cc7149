"""Third-party libraries kept quiet: standard output belongs to the answer, standard error to us.

Libraries print, warn, log and draw progress bars wherever they like. Their settings are made here, before they are imported.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ANONYMIZED_TELEMETRY": "False",  # Chroma's
    "TOKENIZERS_PARALLELISM": "false",
    # Torch threads that wait for one another give the core away soon, for a busy machine, but not between two operations.
    "GOMP_SPINCOUNT": "10000",
}
_OURS = ("langchain_cope", "adapter_store")


@contextlib.contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Show our own log lines and, unless ``debug``, nobody else's."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # an answer in letters that the terminal lacks is no failure
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneSafeLine())
    silence = (
        logging.NullHandler()
    )  # with a handler at the root, Python prints no stray warnings of its own accord
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in _OURS]
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
        root.addHandler(silence)
        for logger in ours:
            logger.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(silence)
            for logger in ours:
                logger.removeHandler(handler)


@contextlib.contextmanager
def prints_to_stderr() -> Iterator[None]:
    """Send whatever is printed inside to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class _OneSafeLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from cope_lc.text import one_line

        return one_line(f"{record.levelname.lower()}: {record.getMessage()}")
