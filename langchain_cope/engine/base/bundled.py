"""Where the base that comes with this package lies. Knows no torch."""

from pathlib import Path

STARTER = Path(__file__).parents[2] / "starter"
"""Folder of `starter`, a base of 7 million parameters for tests and first tries."""
