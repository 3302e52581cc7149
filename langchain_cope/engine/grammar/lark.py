"""A grammar written in llguidance's dialect of Lark."""

import json
from collections.abc import Collection

from langchain_cope.engine.grammar.schema import CALL_BEGIN, CALL_END, Grammar
from langchain_cope.engine.grammar.vocabulary import Vocabulary


def to_lark(grammar: Grammar, vocabulary: Vocabulary, stop_ids: Collection[int] = ()) -> str:
    """Return the rules of `grammar` for answers in tokens of `vocabulary`.

    Free text may hold the special tokens in `stop_ids`.
    """
    lines = ["%llguidance {}"]
    if grammar.text:
        lines += _free_text(grammar, vocabulary, stop_ids)
    else:
        lines += _only_json(grammar, vocabulary)
    if grammar.calls:
        names = [f"call_{index}" for index in range(len(grammar.calls))]
        lines.append(f"call: {' | '.join(names)}")
    for index, (name, schema) in enumerate(grammar.calls):
        start = '{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": '
        lines.append(f'call_{index}: {_literal(start)} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: %json {schema}")
    if grammar.answer is not None:
        lines.append(f"answer: %json {grammar.answer}")
    return "\n".join(lines)


def _free_text(grammar: Grammar, vocabulary: Vocabulary, stop_ids: Collection[int]) -> list[str]:
    """Return the rules of text with calls in it; without calls, of any text."""
    lines = []
    pieces, ends = [], ["tail"]
    if grammar.calls and grammar.several:
        pieces.append("tag")
    markers = sorted({*vocabulary.markers, *stop_ids})
    if markers:
        pieces.append("marker")
        lines.append(f"marker: TEXT <[{','.join(map(str, markers))}]>")
    if grammar.calls and not grammar.several:
        ends.append("tag BLANK")
    before = f"({' | '.join(pieces)})* " if pieces else ""
    lines += [
        f"start: {before}({' | '.join(ends)})",
        "tail: TEXT",
        r"TEXT: /(.|\n)*/",
        r"BLANK: /\s*/",
    ]
    begin, end = _mark(CALL_BEGIN, vocabulary), _mark(CALL_END, vocabulary)
    if begin == CALL_BEGIN:
        lines.append(f'tag: TEXT {begin} "\\n" call "\\n" {end}')
    else:
        lines.append(f"opened[lazy]: TEXT {begin}")
        lines.append(f'tag: opened "\\n" call "\\n" {end}')
    return lines


def _only_json(grammar: Grammar, vocabulary: Vocabulary) -> list[str]:
    """Return the rules of answers that are calls or JSON and nothing else."""
    alternatives, lines = [], []
    if grammar.calls:
        alternatives.append('tag ("\\n" tag)*' if grammar.several else "tag")
        begin, end = _mark(CALL_BEGIN, vocabulary), _mark(CALL_END, vocabulary)
        lines.append(f'tag: {begin} "\\n" call "\\n" {end}')
    if grammar.answer is not None:
        alternatives.append("answer")
    return [f"start: {' | '.join(alternatives)}", *lines]


def _mark(mark: str, vocabulary: Vocabulary) -> str:
    """Return how the grammar names the mark of a call: a special token as such, else as text."""
    return mark if mark in vocabulary.special else _literal(mark)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
