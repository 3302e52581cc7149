"""How well the adaptive contrast tells a user's own kind of question from others.

    python benchmarks/relevance.py headlines=users.jsonl subjects=… messages=… titles=… abstracts=…
        [--model smollm2]

Each file has one user a line (`{"user_id", "history": [{"prompt", "completion"}], "queries"}`), and
its name says what kind of text it holds: for each kind there are requests of our own wording below.
Nothing is trained, and no answer is made: what is measured is the relevance alone, by which the
adapter's scale goes.

| Column | Questions |
|---|---|
| own | the users' queries as they are |
| same wish | the matter of three queries a user, asked for in other words |
| alone | the same wish without matter of the user's kind |
| other wish | the same matter, asked for something else |
| unlike | `everyday.jsonl` |
| politely | the same, as "Could you please help me? … Many thanks!" |

A column is the mean relevance; of the last two it is the share of questions at 0. The last line is
one JSON object.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from no_harm import POOL, asked

from langchain_cope.engine import Base, PromptProfile, load_base
from langchain_cope.history import read_users

COLUMNS = ("own", "same wish", "alone", "other wish", "unlike", "politely")
TITLE = r"['\"](.*)['\"]\.?$"


@dataclass(frozen=True)
class Kind:
    """Requests of one kind of text."""

    matter: str
    """A pattern whose group is what a prompt of the file is about."""
    same: tuple[str, ...]
    other: tuple[str, ...]
    alone: tuple[str, ...]


KINDS = {
    "headlines": Kind(
        r"article: (.*)",
        (
            "Write a headline for this story: ",
            "Can you come up with a catchy headline for this?\n\n",
            "Headline please: ",
        ),
        (
            "Summarize this in one sentence: ",
            "Translate into French: ",
            "Write an e-mail to the author of this: ",
            "Who wrote this article, and where does it appear? ",
        ),
        (
            "Write a headline about Taylor Swift.",
            "Headline for a bakery that closes after a hundred years",
            "Give me a title for my story about space travel",
            "A headline on the library that opens on Sundays, please.",
        ),
    ),
    "subjects": Kind(
        r"message: (.*)",
        ("Give me a commit title for:\n", "What would be a good subject line for this change?\n"),
        (
            "Explain what this change does: ",
            "Write a poem about this: ",
            "Which files did this commit change? ",
        ),
        (
            "Write a commit subject for: fixed the login bug",
            "Commit title: I renamed the config folder",
            "What is a good subject line for a commit that removes dead code?",
        ),
    ),
    "messages": Kind(
        TITLE,
        ("Explain this commit in its message: ", "Commit message body for: "),
        ("What does this mean: ", "Translate into French: ", "When was this commit made? "),
        (
            "Write a commit message for a fix of the login bug.",
            "Body of the commit that removes dead code, please",
        ),
    ),
    "titles": Kind(
        r"abstract: (.*)",
        ("Title for this abstract: ", "How should I call this paper?\n"),
        ("Summarize this: ", "Explain this to a child: ", "Which paper did this first? "),
        (
            "Suggest a paper title about machine translation of idioms.",
            "What should I call a paper on parsing tweets?",
        ),
    ),
    "abstracts": Kind(
        TITLE,
        ("Write the abstract of my paper ", "My new paper needs an abstract. It is called "),
        ("What does this mean: ", "Translate into French: ", "Translate this title: "),
        (
            "Write an abstract about machine translation of idioms.",
            "I need an abstract for a paper on parsing tweets.",
        ),
    ),
}


def figures(base: Base, kind: Kind, file: Path, unlike: Sequence[str]) -> dict[str, float]:
    """Return the columns over all users of `file`."""
    found = defaultdict[str, list[float]](list)
    for user in read_users(file):
        profile = PromptProfile.of(base.everyday, asked(user.items))
        if profile is None:
            print(f"{user.user_id}: the prompts have no profile")
            continue
        queries = asked(user.queries)
        matches = (re.search(kind.matter, query, re.DOTALL) for query in queries[:3])
        matter = [match.group(1) for match in matches if match]
        questions = {
            "own": queries,
            "same wish": [form + text for form in kind.same for text in matter],
            "alone": kind.alone,
            "other wish": [form + text for form in kind.other for text in matter],
            "unlike": unlike,
            "politely": [f"Could you please help me? {text} Many thanks!" for text in unlike],
        }
        for column, texts in questions.items():
            found[column] += [profile.relevance(base.everyday, [text]) for text in texts]
    for column in COLUMNS[-2:]:
        found[column] = [float(value == 0) for value in found[column]]
    return {column: round(statistics.fmean(found[column]), 4) for column in COLUMNS}


def main() -> None:
    """Measure each file and print a table and one JSON line."""
    parser = argparse.ArgumentParser(description="What the adaptive contrast takes for own.")
    parser.add_argument("files", nargs="+", metavar="KIND=FILE", help=f"kinds: {', '.join(KINDS)}")
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    base = load_base(options.model)
    unlike = [json.loads(line)["prompt"] for line in POOL.read_text("utf-8").splitlines()]
    found = {}
    print(f"| kind | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for each in options.files:
        kind, _, file = each.partition("=")
        if kind not in KINDS:
            parser.error(f"{each!r}: give KIND=FILE, with a kind of {', '.join(KINDS)}")
        found[kind] = figures(base, KINDS[kind], Path(file), unlike)
        print(f"| {kind} | {' | '.join(f'{value:.3f}' for value in found[kind].values())} |")
    print(json.dumps({"model": options.model, **found}))


if __name__ == "__main__":
    main()
