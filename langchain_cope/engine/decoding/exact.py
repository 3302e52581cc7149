"""Where an answer copies, or must be exact: there the adaptive contrast steps back.

A rule on text alone, the same for every base: the answer so far, the text of the token that the
personal model finds likeliest, and the prompt. No model and no tokenizer in sight.
"""

import re

COPIED = 20
"""Characters of an answer that stand in the prompt, too, from which it counts as a copy."""
_FENCE = "```"
_QUOTES = '"“”„«»'
_NUMBER = re.compile(r"\d[.,:/%-]?$")
_ADDRESS = re.compile(r"://|^www\.|\w@")
_WORD_WITHIN = re.compile(r"(?:(?<=\w )|(?<=\w, ))[^\W\d_][\w’'-]*\w")


def names_in(prompt: str) -> frozenset[str]:
    """Return the words of `prompt` that have a capital within a sentence."""
    return frozenset(word for word in _WORD_WITHIN.findall(prompt) if word[0].isupper())


def is_exact(answer: str, token: str, prompt: str, names: frozenset[str]) -> bool:
    """Tell whether the next token belongs to a span that must be exact.

    Such spans are: code between fences or backticks, quotations (to the end of their line), web
    and mail addresses, numbers, names that the prompt holds, and copies of at least `COPIED`
    characters of the prompt.

    Args:
        answer: its text so far.
        token: the text of the token that the personal model finds likeliest.
        prompt: the text of the prompt.
        names: `names_in(prompt)`.
    """
    if answer.count(_FENCE) % 2:
        return True
    line = answer[answer.rfind("\n") + 1 :]
    num_quotes = sum(line.count(mark) for mark in _QUOTES)
    if num_quotes % 2 or line.replace(_FENCE, "").count("`") % 2:
        return True
    word = "" if not line or line[-1].isspace() else line.split()[-1]
    if _ADDRESS.search(word) or _NUMBER.search(word) or token.lstrip()[:1].isdigit():
        return True
    if _is_name((word + token if token[:1].strip() else token).strip(), names):
        return True
    return len(answer) >= COPIED and answer[-COPIED:] + token in prompt


def _is_name(word: str, names: frozenset[str]) -> bool:
    """Tell whether `word`, which may go on, is one of `names` or begins like one."""
    if word in names:
        return True
    return len(word) > 2 and word[0].isupper() and any(name.startswith(word) for name in names)
