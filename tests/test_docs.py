"""The pages: marked code blocks run, all blocks parse, links lead somewhere, the map is complete.

A Python block right after the line `<!-- run -->` is run. The blocks of a page share one namespace,
in which `folder` is an adapter and `fingerprint` the base that it is for. They run in an empty
folder, with a store of their own.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import adapter_store
import langchain_cope

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "docs", "examples", "langchain_cope")
PAGES = sorted([*ROOT.glob("*.md"), *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))])
MARK = re.compile(r"^<!-- run -->$", re.M)
BLOCK = re.compile(r"(?P<mark>^<!-- run -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.M)
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
PACKAGES = ("langchain_cope", "adapter_store", "cli/cope_lc")

Make = Callable[..., Path]


class Block(NamedTuple):
    """A block of Python in a page."""

    line: int
    code: str
    runs: bool


def text_of(page: Path) -> str:
    """Return the text of a page, with the files that it includes."""
    text = page.read_text(encoding="utf-8")
    return SNIPPET.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), text)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, match.start("code")), match["code"], bool(match["mark"]))
        for match in BLOCK.finditer(text)
    ]


def code_of(block: Block, page: Path, flags: int = 0) -> object:
    padded = "\n" * block.line + block.code  # so that a traceback names the page's own line
    return compile(padded, str(page), "exec", flags=flags, dont_inherit=True)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# LangChain prefers its checkpointers; apps that have chat histories keep them all the same.
@pytest.mark.filterwarnings("ignore:The class `InMemoryChatMessageHistory`")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if MARK.search(p.read_text("utf-8"))], ids=name_of
)
def test_the_marked_code_of_a_page_runs(
    page: Path, tiny: Make, adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COPE_STORE", str(tmp_path / "store"))
    namespace = {"__name__": "__page__", "folder": adapter(tiny()), "fingerprint": {"base": "tiny"}}
    blocks = [block for block in blocks_of(page) if block.runs]
    assert len(blocks) == len(MARK.findall(page.read_text("utf-8"))), "a mark without a block"
    for block in blocks:
        exec(code_of(block, page), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_of_a_page_parses(page: Path) -> None:
    for block in blocks_of(page):
        code_of(block, page, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in relative_links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}, and there is no such file"
        if anchor:
            assert anchor in anchors_of(target), f"{name_of(page)} links to {link}: no such heading"


def relative_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", link):
            yield link


def anchors_of(page: Path) -> set[str]:
    """Return what a link to a heading of the page ends in, as GitHub and mkdocs make it."""
    headings = HEADING.findall(FENCED.sub("", text_of(page)))
    kept = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s", "-", words) for words in kept}


def test_the_tree_in_the_architecture_names_every_source_file() -> None:
    packages = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    sources = {name_of(path) for path in packages if path.name != "__init__.py"}
    named = set(files_of_tree())
    assert sorted(named - sources) == [], "named in ARCHITECTURE.md, and not there"
    assert sorted(sources - named) == [], "not named in ARCHITECTURE.md"


def files_of_tree() -> Iterator[str]:
    """Yield the files in the tree of ARCHITECTURE.md: two spaces a level, one file a line."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = text.split("## The tree", 1)[1].split("```text\n", 1)[1].split("```", 1)[0]
    folders: list[str] = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        if name.endswith("/"):
            folders[depth:] = [name]
        else:
            yield "".join(folders[:depth]) + name


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    named = set(re.findall(r"^::: ([\w.]+)|^ +- (\w+)$", pages, re.M))
    names = {(one or other).split(".")[-1] for one, other in named}
    public = {*langchain_cope.__all__, *adapter_store.__all__}
    errors = {name for name in public if name.endswith("Error")}  # the page of their module
    assert sorted(public - errors - names) == []


def test_every_module_that_the_architecture_mentions_exists() -> None:
    text = FENCED.sub("", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    modules = set(re.findall(r"`([\w/.]+\.py)`", text))
    paths = [f"/{name_of(path)}" for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    paths.append("/tests/tiny.py")
    missing = [name for name in modules if not any(path.endswith(f"/{name}") for path in paths)]
    assert sorted(missing) == []
