import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "generate_cli.py"))["page"]()
    stored = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert stored == page, "docs/command-line.md is stale: run `make docs-cli` and commit it"
