"""What a file is that holds no history in a form that is read: told by its bytes, text and name.

A text file is learnt line by line. A chat log, a table or a mailbox that is named `.txt` would so
teach other people's messages, their names and the times: `look_of_text` recognises these. Few of
the lines of an ordinary text look so, and its first does not. Knows no rows and no formats.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise

SAMPLE = 2000
"""Lines of a text that are looked at."""
READ = (
    "what is read is JSON, a row a line (.jsonl) or a list (.json), "
    "and plain text with one of the user's texts a line (.txt)"
)

# What a file that is not text begins with, and what it is then.
_SIGNATURES = {
    b"PK\x03\x04": "a ZIP archive; unpack it (of ChatGPT's export, give conversations.json)",
    b"\x1f\x8b": "a file compressed with gzip; unpack it",
    b"BZh": "a file compressed with bzip2; unpack it",
    b"\xfd7zXZ": "a file compressed with xz; unpack it",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"PAR1": "a Parquet file; save its rows as JSONL",
    b"SQLite format 3\0": "an SQLite database; save its rows as JSONL",
    b"%PDF": "a PDF; save its text",
    b"\xd0\xcf\x11\xe0": "a document of an older Microsoft Office; save its text",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Files that are ZIP archives, and those that are known by their names alone.
_NAMES = {
    ".docx": "a Word document; save its text",
    ".xlsx": "an Excel workbook; save its rows as JSONL",
    ".pptx": "a PowerPoint presentation; save its text",
    ".odt": "an OpenDocument text; save its text",
    ".epub": "an e-book; save its text",
    ".csv": "a CSV table",
    ".tsv": "a TSV table",
    ".md": "Markdown",
    ".markdown": "Markdown",
    ".rst": "reStructuredText",
    ".mbox": "a mailbox",
    ".eml": "an e-mail",
    ".html": "HTML",
    ".htm": "HTML",
    ".xml": "XML",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".log": "a log",
    ".srt": "subtitles",
    ".vtt": "subtitles",
    ".ics": "a calendar",
    ".vcf": "contacts",
    ".rtf": "RTF",
    ".tex": "LaTeX",
    ".js": "JavaScript",
    ".py": "Python",
}
_BEGINNINGS = {
    "begin:vcalendar": "a calendar (iCalendar)",
    "begin:vcard": "contacts (vCard)",
    "webvtt": "subtitles (WebVTT)",
    "{\\rtf": "RTF",
    "%pdf": "a PDF",
    "%!ps": "PostScript",
    "\\documentclass": "LaTeX",
    "window.ytd": "an archive of X (Twitter)",
    "<?xml": "XML",
    "<!doctype html": "HTML",
    "<html": "HTML",
    "<!--": "HTML",
}

# Marks that set the direction of writing stand anywhere in exported chats.
_INVISIBLE = dict.fromkeys(map(ord, "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2069"))
_NUMBERS = r"\d{1,4}\s?[./\-年년]\s?\d{1,2}\s?[./\-月월]\s?\d{1,4}"
_WITH_MONTH = (
    r"\d{1,2}[. ]\s?(?:de )?[^\W\d_]{3,12}\.?,? (?:de )?\d{2,4}|"
    r"[^\W\d_]{3,12}\.? {1,2}\d{1,2}(?:,? \d{4})?"
)
_DATE = rf"(?:{_NUMBERS}|{_WITH_MONTH})"
_TIME = r"\d{1,2}[:.h]\d{2}(?:[:.,]\d{1,3}){0,2}"
_STAMP = rf"(?:{_DATE}\D{{1,12}}{_TIME}|{_TIME}\D{{1,12}}{_DATE})"
_HALF_DAY = r"[^\]\-–—,:<>]{0,12}"  # AM, p.m., 오후, Uhr

_JSON = re.compile(r"\s*(?:\{\s*[\"'}]|\[\s*[\[{\"\]])")
_STAMPED = re.compile(rf"\W{{0,3}}(?:[A-Z]{{3,8}}\W{{1,3}})?{_STAMP}")
_STAMP_ALONE = re.compile(rf"\W{{0,3}}{_STAMP}\D{{0,12}}$")
_ACCESS = re.compile(r".{0,60}\[\d{1,2}/\w{3}/\d{4}:\d\d:")
# 12/24/23, 9:01 PM - Ann: text    [24.12.23, 21:01:05] Ann: text
_WHATSAPP = re.compile(rf"\[?{_STAMP}{_HALF_DAY}(?:\]|\s?[-–—]|,)\s?[^:]{{1,60}}[::](?:\s|$)")
# Ann, [24.12.23 21:01]    [Ann] [9:01 PM] text    [12/24 9:01 PM] Ann
_BRACKETED = re.compile(
    rf"\S.{{0,60}}[,\s]\[{_STAMP}[^\]]{{0,8}}\]|\[[^\]]{{1,40}}\]\s\[[^\]\d]{{0,6}}{_TIME}[^\]]*\]|"
    rf"\[\d{{1,2}}[./-]\d{{1,2}}\.?,? {_TIME}[^\]]{{0,8}}\]\s\S"
)
# [21:01] <ann> text    9:01 PM Ann: text    21:01 tab Ann tab text    0:03 alone    <ann> text
_TIMED = re.compile(
    rf"\[?{_TIME}(?:{_HALF_DAY}\]|\s?[AaPp]\.?[Mm]\.?)?"
    r"(?:\t|\s*<[^>]{1,40}>|\s*[^\W\d][^:]{0,40}:\s|$)|"
    rf"\[{_TIME}\]|<[\w \-]{{1,30}}>\s"
)
# Ann — Today at 9:01 PM    Ann Lee   9:01 PM
_HEADING = re.compile(
    rf"([^\W\d][^:—]{{0,40}}?)(?:\s—\s.{{0,20}}?|\s{{1,4}}\[?){_TIME}\s?(?:[AaPp]\.?[Mm]\.?)?\]?"
)
_SPEAKER = re.compile(r"([^\W\d_][\w .'’-]{0,30}):\s")
_MAIL_NAMES = (
    "from to cc bcc subject date sent reply-to message-id received return-path mime-version "
    "content-type delivered-to von an betreff datum gesendet de à objet envoyé para asunto"
)
_MAIL_HEADER = re.compile(rf"(?i)({'|'.join(_MAIL_NAMES.split())}|x-[\w-]+):\s")
_MBOX = re.compile(r"From \S+.*\d{4}$")
_TIMECODES = re.compile(rf"{_TIME}\s-->\s{_TIME}")
_TAG = re.compile(r"(?i)<(div|p|span|table|ul|ol|li|section|article|h[1-6]|body|head)\b[^>]*>")
_ELEMENT = re.compile(r"<[A-Za-z_][\w:.-]*(\s[^>]*)?>")
_CLOSING = re.compile(r"</[A-Za-z][\w:.-]*>")
_SETTING = re.compile(r"[A-Za-z_][\w-]*\s*[:=]")
_YAML_KEY = re.compile(r"\s*(?:- )?[a-z_][\w-]*:(?:\s|$)")
_YAML_ENTRY = re.compile(r"\s*- \S|\s{2,}\S")
_YAML_NESTED = re.compile(r"\s+[a-z_][\w-]*:\s\S")
_TABLE_ROW = re.compile(r"\|.*\|$")
_COLUMN_NAME = re.compile(r"[^\W\d][\w .\-/()#]{0,30}")
_NUMBER = re.compile(rf"\W?\d[\d.,]*\W?|{_DATE}.{{0,20}}")


@dataclass(frozen=True)
class _Sample:
    """The first lines of a text."""

    raw: Sequence[str]
    """Without the blank ones."""

    @cached_property
    def lines(self) -> list[str]:
        """The lines without indent and invisible marks."""
        return [line.translate(_INVISIBLE).strip() for line in self.raw]

    @property
    def first(self) -> str:
        return self.lines[0]

    def count(self, pattern: re.Pattern[str]) -> int:
        """Number of lines that begin with the pattern."""
        return sum(pattern.match(line) is not None for line in self.lines)

    def share(self, pattern: re.Pattern[str]) -> float:
        return self.count(pattern) / len(self.lines)


def look_of_bytes(raw: bytes, suffix: str) -> str | None:
    """Return what a file looks like that is no text, None for one that may be.

    Args:
        raw: The file, or its beginning.
        suffix: The end of its name, in lower case and with the dot.
    """
    if raw.startswith(_UTF_16):
        return "UTF-16; save the file as UTF-8"
    for signature, look in _SIGNATURES.items():
        if raw.startswith(signature):
            return _NAMES.get(suffix, look)
    return None


def look_of_text(text: str) -> str | None:
    """Return what a text looks like that is not one of the user's texts a line, else None."""
    lines = [line for line in islice(text.split("\n"), SAMPLE) if line.strip()]
    if not lines:
        return None
    sample = _Sample(lines)
    return next((look for look, fits in _LOOKS if fits(sample)), None) or _beginning(sample.first)


def look_of_name(suffix: str) -> str:
    """Return what a text looks like that says nothing but by the end of its name."""
    if suffix in _NAMES:
        return _NAMES[suffix]
    name = f" named {suffix}" if suffix else " without .txt at the end of its name"
    return f"plain text{name}"


def seems_json(text: str) -> bool:
    """Tell whether a text begins as JSON does, broken or not."""
    return _JSON.match(text) is not None


def _beginning(line: str) -> str | None:
    beginnings = _BEGINNINGS.items()
    return next((look for start, look in beginnings if line.lower().startswith(start)), None)


def _is_json(sample: _Sample) -> bool:
    return seems_json("\n".join(sample.raw[:3])) or sample.share(_JSON) > 0.5


def _is_chat(sample: _Sample) -> bool:
    """Tell whether messages with date, time and name are in a text; their texts may go on below."""
    num_messages = sample.count(_WHATSAPP) + sample.count(_BRACKETED)
    if _WHATSAPP.match(sample.first) or _BRACKETED.match(sample.first):
        return True
    share = num_messages / len(sample.lines)
    return share >= 0.2 or (num_messages >= 3 and share >= 0.05)


def _is_timed_chat(sample: _Sample) -> bool:
    if sample.count(_TIMED) >= max(2, 0.5 * len(sample.lines)):
        return True
    headings = [match for line in sample.lines if (match := _HEADING.fullmatch(line))]
    names = {heading[1] for heading in headings}
    return len(headings) >= max(3, 0.25 * len(sample.lines), 1.5 * len(names))


def _is_transcript(sample: _Sample) -> bool:
    """Tell whether a few speakers take turns, each line led by a name, as in `Ann: hello`."""
    names = [match[1] for line in sample.lines if (match := _SPEAKER.match(line))]
    counts = Counter(names)
    num_changes = sum(one != other for one, other in pairwise(names))
    return (
        len(names) >= max(4, 0.9 * len(sample.lines))
        and 2 <= len(counts) <= min(10, len(names) / 2)
        and all(number > 1 for number in counts.values())
        and num_changes >= len(names) / 3
    )


def _is_log(sample: _Sample) -> bool:
    num_stamped = sample.count(_STAMPED) + sample.count(_ACCESS)
    is_mostly = num_stamped >= max(2, 0.5 * len(sample.lines))
    return is_mostly or sample.count(_STAMP_ALONE) >= max(2, 0.2 * len(sample.lines))


def _is_mail(sample: _Sample) -> bool:
    """Tell whether a text begins with the head of an e-mail, or holds heads of three lines."""
    if _MBOX.match(sample.first) and any(map(_MAIL_HEADER.match, sample.lines[1:3])):
        return True
    names = [match and match[1].lower() for match in map(_MAIL_HEADER.match, sample.lines)]
    if len(names) > 1 and names[0] and names[1] and names[0] != names[1]:
        return True
    heads = zip(names, names[1:], names[2:], strict=False)
    return any(all(head) and len(set(head)) == 3 for head in heads)


def _is_subtitles(sample: _Sample) -> bool:
    return any(map(_TIMECODES.match, sample.lines[:20]))


def _is_markup(sample: _Sample) -> bool:
    first, last = sample.first, sample.lines[-1]
    is_closed = any(map(_CLOSING.search, sample.lines))
    if is_closed and (_TAG.match(first) or (_ELEMENT.match(first) and last.endswith(">"))):
        return True
    num_closed = sum(_CLOSING.search(line) is not None for line in sample.lines)
    return num_closed >= max(3, 0.3 * len(sample.lines))


def _is_front_matter(sample: _Sample) -> bool:
    if sample.first not in ("---", "+++"):
        return False
    head = sample.lines[1:60]
    if sample.first not in head:
        return False
    head = [line for line in head[: head.index(sample.first)] if not line.startswith("#")]
    return bool(head) and _SETTING.match(head[0]) is not None


def _is_yaml(sample: _Sample) -> bool:
    """Tell whether nearly all lines are keys and entries, some of them nested."""
    keys = [line for line in sample.raw if _YAML_KEY.match(line)]
    entries = [line for line in sample.raw if line not in keys and _YAML_ENTRY.match(line)]
    is_document = sample.first == "---" and len(keys) > 1
    is_nested = any(map(_YAML_NESTED.match, sample.raw))
    return (is_document or is_nested) and len(keys) + len(entries) >= 0.9 * len(sample.raw) - 1


def _is_tsv(sample: _Sample) -> bool:
    widths = {line.rstrip("\r").count("\t") for line in sample.raw}
    return len(sample.raw) > 1 and len(widths) == 1 and widths != {0}


def _is_csv(sample: _Sample) -> bool:
    return sample.share(_TABLE_ROW) == 1 or any(_is_table(sample, mark) for mark in ",;|")


def _is_table(sample: _Sample, delimiter: str) -> bool:
    """Tell whether a text is a table.

    In prose the comma is followed by a space, and no column holds numbers alone.
    """
    try:
        records = [row for row in csv.reader(sample.raw, delimiter=delimiter) if row]
    except csv.Error:
        return False
    header, *others = records
    width = len(header)
    if width < 2 or not others:
        return False
    is_even = all(len(row) == width for row in others)
    is_named = all(_COLUMN_NAME.fullmatch(name.strip()) for name in header)
    num_wide = sum(len(row) >= width for row in others)
    if _is_tight(header) and _share(_is_tight, others) >= 0.8:
        return (is_named and num_wide >= 0.9 * len(others)) or (is_even and width >= 3)
    columns = zip(*others, strict=False)
    is_typed = any(all(_NUMBER.fullmatch(cell.strip()) for cell in column) for column in columns)
    return is_even and is_named and is_typed and len(others) >= 2


def _is_tight(row: Sequence[str]) -> bool:
    return len(row) > 1 and not row[1][:1].isspace()


def _share(fits: Callable[[Sequence[str]], bool], rows: Sequence[Sequence[str]]) -> float:
    return sum(map(fits, rows)) / len(rows)


_LOOKS: tuple[tuple[str, Callable[[_Sample], bool]], ...] = (
    ("JSON; name the file .jsonl, or .json where it is one list", _is_json),
    ("subtitles", _is_subtitles),
    ("an e-mail or a mailbox", _is_mail),
    ("Markdown with front matter", _is_front_matter),
    ("HTML or XML", _is_markup),
    ("an exported chat, such as WhatsApp's or Telegram's", _is_chat),
    ("a chat log with times", _is_timed_chat),
    ("a log, as most lines begin with date and time", _is_log),
    ("a TSV table", _is_tsv),
    ("a table, such as CSV", _is_csv),
    ("a transcript with the speakers' names", _is_transcript),
    ("YAML", _is_yaml),
)
