"""A page that a command writes: one HTML file that needs nothing else and runs no script."""

import os
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import typer

# The policy holds even where the file is served: nothing is loaded, nothing runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, style: str, parts: Sequence[str]) -> str:
    """Return the page of some parts, which are HTML; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main>{chr(10).join(part for part in parts if part)}</main></body></html>\n"
    )


def check_page_file(file: Path | None) -> None:
    """Refuse what `--report` names where it cannot be written, before hours of work."""
    if file is None:
        return
    folder = file.absolute().parent
    problem = None
    if not folder.is_dir():
        problem = f"there is no folder {folder}"
    elif file.is_dir():
        problem = f"{file} is a folder: name a file in it"
    elif not os.access(file if file.exists() else folder, os.W_OK):
        problem = f"{file} cannot be written"
    if problem is not None:
        raise typer.BadParameter(problem, param_hint="--report")


def write_page(file: Path, html: str) -> None:
    """Write the page that `--report` asks for, and say so."""
    # Names of files may hold bytes that are no text.
    file.write_text(html, encoding="utf-8", errors="backslashreplace")
    print(f"report: {file}", file=sys.stderr)
