"""What is no history is refused by name and never learnt line by line; ordinary texts are read."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from langchain_cope.errors import HistoryError
from langchain_cope.history import read_history
from langchain_cope.history.foreign import READ, look_of_text

CHAT = "an exported chat, such as WhatsApp's or Telegram's"
TIMED = "a chat log with times"
LOG = "a log, as most lines begin with date and time"


def whatsapp(stamp: str) -> str:
    """A chat as WhatsApp exports it, with a message of several lines; `stamp` ends at the name."""
    return (
        f"{stamp}Ann: hello\n{stamp}Bob: well\nthis goes on\n\nand on\n"
        f"{stamp}Ann: <Media omitted>\n{stamp}Bob Jones: so: what now?\n"
    )


FOREIGN = [
    # WhatsApp, Android
    (CHAT, whatsapp("12/24/23, 9:01 PM - ")),
    (CHAT, "12/24/23, 9:01 PM - Name: text"),
    (CHAT, whatsapp("12/24/23, 9:01\u202fPM - ")),
    (CHAT, whatsapp("24/12/2023, 21:01 - ")),
    (CHAT, whatsapp("24.12.23, 21:01 - ")),
    (CHAT, whatsapp("24-12-2023 21:01 - ")),
    (CHAT, whatsapp("2023-12-24, 9:01 p.m. - ")),
    (CHAT, whatsapp("2023/12/24 21:01 - ")),
    (CHAT, whatsapp("24/12/2023 à 21:01 - ")),
    (CHAT, whatsapp("24/12/2023 às 21:01 - ")),
    (CHAT, whatsapp("24.12.2023 klo 21.01 - ")),
    (CHAT, whatsapp("24/12/23 21.01 - ")),
    (CHAT, whatsapp("2023. 12. 24. 오후 9:01, ")),
    (CHAT, whatsapp("2023年12月24日 21:01 - ")),
    (CHAT, whatsapp("24.12.2023 г., 21:01 - ")),
    (CHAT, whatsapp("٢٤/١٢/٢٠٢٣، ٩:٠١ م - ")),
    (CHAT, whatsapp("24 Dec 2023, 21:01 - ")),
    (CHAT, "12/24/23, 9:00 PM - Messages are encrypted.\n" + whatsapp("12/24/23, 9:01 PM - ")),
    (CHAT, "A note of mine\n" * 40 + whatsapp("12/24/23, 9:01 PM - ")),
    # iOS
    (CHAT, whatsapp("[24.12.23, 21:01:05] ")),
    (CHAT, whatsapp("\u200e[12/24/23, 9:01:05\u202fPM] ")),
    (CHAT, whatsapp("[2023-12-24, 21:01:05] \u200e")),
    # Telegram, KakaoTalk, IRC, Discord, Slack, LINE, Zoom
    (CHAT, "Ann, [24.12.23 21:01]\nhello\n\nBob, [24.12.23 21:02]\nwell\nand so on\n"),
    (CHAT, "Ann Lee, [Dec 24, 2023 at 9:01 PM]:\nhello\nBob, [Dec 24, 2023 at 9:02 PM]:\nwell\n"),
    (CHAT, "[Ann] [오후 9:01] hello\n[Bob] [오후 9:02] well\n"),
    (CHAT, "[12/24 9:01 PM] Ann Lee\nhello\n[12/24 9:02 PM] Bob\nwell\n"),
    (TIMED, "<ann> hello\n<bob> well\n<ann> so\n"),
    (TIMED, "21:01 <ann> hello\n21:02 <bob> well\n21:03 -!- eve has joined\n"),
    (TIMED, "[21:01] <ann> hello\n[21:02] <bob> well\n[21:02] <ann> so\n"),
    (TIMED, "9:01 PM Ann: hello\n9:02 PM Bob: well\n9:03 PM Ann: so\n"),
    (TIMED, "Ann — Today at 9:01 PM\nhello\nBob — Today at 9:02 PM\nwell\n" * 2),
    (TIMED, "Ann Lee  9:01 PM\nhello\nBob  9:02 PM\nwell\nAnn Lee  9:03 PM\nso\n"),
    (TIMED, "2023/12/24(Sun)\n21:01\tAnn\thello\n21:02\tBob\twell\n21:03\tAnn\tso\n"),
    (TIMED, "21:01:05 From Ann to Everyone: hi\n21:01:07 From Bob to Everyone: yo\n" * 2),
    (TIMED, "0:03\nso this is\n0:07\na transcript\n0:09\nof a video\n"),
    ("a transcript with the speakers' names", "Ann: hi\nBob: yo\nAnn: so?\nBob: fine\nAnn: ok\n"),
    # mail
    (
        "an e-mail or a mailbox",
        "From ann@x.org Mon Dec 24 21:01:05 2023\nFrom: Ann <a@x.org>\n\nhi",
    ),
    ("an e-mail or a mailbox", "Return-Path: <a@x.org>\nReceived: from x\nSubject: hi\n\nhello\n"),
    ("an e-mail or a mailbox", "Von: Ann\nAn: Bob\nBetreff: Hallo\n\nLieber Bob\n"),
    ("an e-mail or a mailbox", "See below\n\nFrom: Ann\nSent: Monday\nSubject: hi\n\nhello\n"),
    # tables
    (
        "a table, such as CSV",
        'date,author,text\n2023-12-24,ann,hello\n2023-12-25,bob,"well, yes"\n',
    ),
    ("a table, such as CSV", "date,author,text\n2023-12-24,ann,well, yes, no\n2023-12-25,bob,so\n"),
    ("a table, such as CSV", '"text","likes"\n"hello, all",3\n"bye",4\n'),
    ("a table, such as CSV", "text;likes\nhello;3\nbye;4\n"),
    ("a table, such as CSV", "name, age\nann, 31\nbob, 32\n"),
    ("a table, such as CSV", "1,ann,hello\n2,bob,well\n3,ann,so\n"),
    ("a table, such as CSV", "| a | b |\n|---|---|\n| c | d |\n"),
    ("a TSV table", "date\ttext\n2023-12-24\thello\n2023-12-25\twell\n"),
    # markup
    ("HTML", "<!DOCTYPE html>\n<html><body><p>hello</p></body></html>"),
    ("HTML", "\n<!-- saved -->\n<div>hello</div>"),
    ("HTML or XML", "<p>hello</p>\n<p>bye</p>\n"),
    ("XML", '<?xml version="1.0"?>\n<smses><sms body="hi"></sms></smses>'),
    ("HTML or XML", "<posts>\n<post>hello</post>\n</posts>"),
    ("Markdown with front matter", "---\ntitle: Hello\ntags: [a]\n---\n\nA text.\n"),
    ("Markdown with front matter", "---\n# mine\ntitle: Hello\n---\nA text.\n"),
    ("Markdown with front matter", "+++\ntitle = 'Hello'\n+++\n\nA text.\n"),
    ("YAML", "posts:\n  - title: Hello\n    text: A text.\n  - title: Bye\n    text: So.\n"),
    ("YAML", "---\nname: ann\ntext: hello\n"),
    # others
    (
        "subtitles",
        "1\n00:00:01,000 --> 00:00:03,000\nhello\n\n2\n00:00:04,000 --> 00:00:05,000\nbye",
    ),
    ("subtitles", "WEBVTT\n\n00:01.000 --> 00:03.000\n<v Ann>hello\n"),
    ("a calendar (iCalendar)", "BEGIN:VCALENDAR\nVERSION:2.0\nEND:VCALENDAR\n"),
    ("contacts (vCard)", "BEGIN:VCARD\nFN:Ann\nEND:VCARD\n"),
    ("RTF", "{\\rtf1\\ansi hello}"),
    ("LaTeX", "\\documentclass{article}\n\\begin{document}\nhello\n"),
    ("an archive of X (Twitter)", 'window.YTD.tweets.part0 = [\n{"tweet": {}}\n]'),
    (LOG, "2023-12-24 21:01:05,123 INFO started\n2023-12-24 21:01:06,001 WARN slow\n"),
    (LOG, "Dec 24 21:01:05 host sshd[1]: started\nDec 24 21:01:06 host sshd[1]: done\n"),
    (LOG, "INFO 2023-12-24 21:01:05 started\nWARN 2023-12-24 21:01:06 slow\n"),
    (LOG, "Dec 24, 2023, 9:01 PM\nAnn\nhello\nDec 24, 2023, 9:03 PM\nBob\nwell\n"),
    (LOG, "12/24/23, 9:00 PM - Messages are encrypted.\n12/24/23, 9:01 PM - Ann joined\n"),
    (LOG, "2023-12-24T21:01:05Z started\n2023-12-24T21:01:06Z done\n"),
    (LOG, '1.2.3.4 - - [24/Dec/2023:21:01:05 +0000] "GET /"\n' * 2),
    ("JSON;", json.dumps({"text": "hello"}) + "\n" + json.dumps({"text": "bye"})),
    ("JSON;", json.dumps([{"text": "hello"}], indent=1)),
    ("JSON;", '{"text": "hello"\n'),
    ("JSON;", "{'role': 'user', 'content': 'hello'}\n"),
]


@pytest.mark.parametrize(("look", "text"), FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_foreign_text_is_refused_by_name(tmp_path: Path, look: str, text: str, mark: str) -> None:
    path = tmp_path / "posts.txt"
    path.write_text(mark + text, encoding="utf-8")
    with pytest.raises(HistoryError) as caught:
        read_history(path, user_id="ann")
    assert str(caught.value).startswith(f"{path}: looks like {look}")
    assert str(caught.value).endswith(READ)
    assert "\n" not in str(caught.value)


ORDINARY = [
    "Monday: rain all day.\nTuesday: sun, at last.\nWednesday: we walked home.\n",
    "12 May 2024. Rain.\n13 May 2024. Sun.\n14 May 2024. We walked.\n",
    "2024-05-12: rain\n2024-05-13: sun\n2024-05-14: we walked\n",
    "24.12.2023 was a quiet day.\nOn 25.12.2023 at 21:01 we left.\nThen nothing.\nNothing.\n",
    "Woke up at 7:30.\nThe train left at 9:15 PM\nHome at 18:40\nSlept.\n",
    "10:30 Breakfast: eggs\nThen we walked.\nIt rained.\nI read.\n",
    "We wrote:\n12/24/23, 9:01 PM - Ann: hello\nThat was it.\n" + "And I went on.\n" * 10,
    "Hello, world\nGoodbye, moon\nWell, no\n",
    "Hi,there\nwell, no\nso, yes\nand, then\n",
    "Apples, pears and plums, mostly.\nNo, thanks, I said, twice.\nGood.\n",
    "I like: tea\nNote: buy milk\nTodo: sleep\nIdea: a boat\nOnce more: tea\n",
    "Note: buy milk\nNote: call home\nNote: sleep\nNote: read\n",
    "To: my love\nI wrote: nothing.\nSo it goes.\n",
    "From Rome to Paris in 1999\nWhat a trip: long.\n",
    "# A heading\n\nA text with *stars* and #tags.\n- a point\n- another\n",
    "---\nA text between lines.\n---\nAnother one.\n",
    "<3 you all\nx < y and y > z\nI <i>really</i> mean it.\n",
    "Shopping:\n- milk\n- eggs\n",
    "[sic] he said.\n[1] A footnote.\n(2) Another.\n",
    "{braces} are fun\n[[wiki]] links too\n",
    "A line; with a semicolon; or two\nand | a | pipe\n",
    "1. first\n2. second\n3. third\n",
    "@ann so true\nRT @bob: yes\nhttps://example.org is down\n",
    "Привет, мир\nКак дела: хорошо\n今日は、いい天気。\n",
    "1984 was a year.\n2001, too.\n3.50 euros at 10:30, no less\n",
    "-- \nsigned, me\n=====\nover\n",
    "Q: why?\nA: because.\n",
    "hello\n",
    "hello\tthere\nno tab here\n",
    "7:30 up\n8:00 train\n9:00 work\n",
    "milk, eggs, bread\nrain, wind, sun\nred, green, blue\n",
    "Dear Ann, hi\nDear Bob, yo\nDear Eve, so\n",
    "> what he said\nI disagree\n> really?\nYes.\n",
    "1,000 people came\n2,500 left\n",
    "100\n200\n300\n",
]


@pytest.mark.parametrize("text", ORDINARY, ids=range(len(ORDINARY)))
def test_an_ordinary_text_is_read_line_by_line(tmp_path: Path, text: str) -> None:
    assert look_of_text(text) is None
    path = tmp_path / "posts.txt"
    path.write_text(text)
    history = read_history(path, user_id="ann")
    assert [item.completion for item in history.items] == list(
        dict.fromkeys(line.strip() for line in text.split("\n") if line.strip())
    )


def test_the_repositorys_own_texts_are_ordinary() -> None:
    data = Path(__file__).parents[2] / "examples" / "data" / "user.jsonl"
    row = json.loads(data.read_text().splitlines()[0])
    texts = "\n".join(entry["completion"] for entry in row["history"])
    assert look_of_text(texts) is None


def _zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "look"),
    [
        ("mail.mbox", b"hello", "looks like a mailbox"),
        ("mail.mbox", b"From a@x.org Mon Dec 24 21:01:05 2023\nFrom: a\n", "looks like an e-mail"),
        ("posts.csv", b"hello\nbye", "looks like a CSV table"),
        ("posts.csv", b"id,text\n1,hello\n", "looks like a table"),
        ("notes.md", b"# A note\n\nA text.\n", "looks like Markdown"),
        ("notes.md", b"A text.\n", "looks like Markdown"),
        ("notes.md", b"[a link](x)\n", "looks like Markdown"),
        ("notes.text", b"A text.\n", "looks like plain text named .text"),
        ("notes", b"A text.\n", "looks like plain text without .txt"),
        ("chat.jsonl", whatsapp("12/24/23, 9:01 PM - ").encode(), f"looks like {CHAT}"),
        ("posts.json", b"id,text\n1,hello\n", "looks like a table"),
        ("export.zip", _zip("conversations.json"), "a ZIP archive; unpack it"),
        ("posts.txt", _zip("x"), "a ZIP archive; unpack it"),
        ("essay.docx", _zip("word/document.xml"), "a Word document; save its text"),
        ("essay.txt", b"%PDF-1.7\n\xff", "a PDF"),
        ("photo.txt", b"\xff\xd8\xff\xe0", "an image"),
        ("msgstore.db", b"SQLite format 3\0", "an SQLite database"),
    ],
)
def test_other_files_are_named_in_one_line_with_what_is_read(
    tmp_path: Path, name: str, content: bytes, look: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(HistoryError) as caught:
        read_history(path, user_id="ann")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert look in message
    assert message.endswith(READ)
    assert "\n" not in message


def test_a_folder_is_named_with_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="is a folder; name a file in it, or several; what is"):
        read_history(tmp_path)
