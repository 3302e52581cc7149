"""Third-party libraries kept quiet: standard output is the answer's, standard error is ours.

Libraries print, warn, log and draw progress bars wherever they like. Their settings are made here,
before they are imported.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from cope_lc.text import one_line

_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_OURS = ("langchain_cope", "adapter_store")


@contextlib.contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Show our own log lines and, unless `debug`, no warnings of libraries."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer in letters that the terminal lacks is no failure.
            stream.reconfigure(errors="backslashreplace")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneSafeLine())
    # With a handler at the root, Python does not print stray warnings itself.
    silence = logging.NullHandler()
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
    """Send everything printed inside the block to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


class _OneSafeLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(f"{record.levelname.lower()}: {record.getMessage()}")
