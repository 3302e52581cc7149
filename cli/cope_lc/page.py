"""A page that a command writes: one HTML file that needs nothing else and runs no script."""

from collections.abc import Sequence
from html import escape

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
