"""Rows of one answer each, or of a better and a worse one, as prompt/completion rows.

    {"text": …}                                                           a text without a prompt
    {"prompt": …, "completion": …}                                        TRL; the completion is what is learnt
    {"instruction": …, "input": …, "output": …}                           Alpaca
    {"prompt": …, "chosen": …, "rejected": …}                             TRL; without prompt it is what both begin with
    {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}     OpenAI
    {"prompt": …, "answer": …, "score": 1 or 0, "correction": …}          feedback, in LangSmith's words
    {"inputs": {…}, "outputs": {…}, "score": …, "correction": …}          the same on a run that LangSmith traced

Prompts are texts or messages; answers are texts, a message, or assistant messages.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from langchain_cope.errors import HistoryError
from langchain_cope.history.items import checked_text, shown
from langchain_cope.history.messages import plain_message, plain_messages
from langchain_cope.history.reader import TIME_KEYS, Located, checked_row, content_text, named

Row = Mapping[str, Any]
_KEPT = (*TIME_KEYS, "conversation", "weight")


def pair_rows(row: Row, where: str) -> list[Located]:
    """Prompt and completion, and what was rejected, where there is any."""
    completion = _answer(row["completion"], "completion", where)
    rejected = row.get("rejected") or ()
    return _made(
        row,
        where,
        row.get("prompt"),
        completion,
        [rejected] if isinstance(rejected, str) else rejected,
    )


def text_rows(row: Row, where: str) -> list[Located]:
    """A text that answers nothing."""
    return _made(row, where, None, _answer(row["text"], "text", where))


def alpaca_rows(row: Row, where: str) -> list[Located]:
    """The instruction, the input after it where there is one, and the output."""
    asked = [checked_text(row[key], key, where) for key in ("instruction", "input") if row.get(key)]
    earlier: list[dict[str, Any]] = (
        [{"role": "system", "content": row["system"]}] if row.get("system") else []
    )
    for index, turns in enumerate(_list(row.get("history") or [], "history", where)):
        if not isinstance(turns, list) or len(turns) != 2:
            raise HistoryError(
                f"{where}: history[{index}] is {shown(turns)}; expected [instruction, output]"
            )
        earlier += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), turns, strict=True)
        ]
    prompt: Any = "\n\n".join(asked)
    if earlier:
        prompt = [*earlier, {"role": "user", "content": prompt}]
    return _made(row, where, prompt, _answer(row["output"], "output", where))


def preference_rows(row: Row, where: str) -> list[Located]:
    """TRL's pairs: texts with their prompt, or messages, of which the prompt may be what both sides begin with."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _split(prompt, plain_messages(chosen), plain_messages(rejected))
    elif prompt is None:
        raise HistoryError(
            f"{where}: chosen and rejected without prompt; expected a prompt, or messages that begin with it"
        )
    return _pair(row, where, prompt, (chosen, "chosen"), (rejected, "rejected"))


def openai_pair_rows(row: Row, where: str) -> list[Located]:
    """OpenAI's pairs: one assistant message each."""
    asked = checked_row(row["input"], f"{where}: input")
    if "messages" not in asked:
        raise HistoryError(f"{where}: input must hold messages; found {named(asked)}")
    sides = [(row[key], key) for key in ("preferred_output", "non_preferred_output")]
    return _pair(row, where, asked["messages"], *sides)


def feedback_rows(row: Row, where: str) -> list[Located]:
    """What a user thought of an answer.

    An edited answer is chosen and the original rejected; a liked one is learnt; a disliked one is rejected in favour of
    what the user liked as an answer to the same prompt. Feedback that says neither is no row.
    """
    answer = _answer(row["answer"], "answer", where)
    if row.get("prompt") in (None, "", []):
        raise HistoryError(f"{where}: feedback without prompt: nobody can tell what was answered")
    correction = _correction(row.get("correction"), where)
    liked = _verdict(row.get("score"), where)
    if correction not in (None, answer):
        return _made(row, where, row["prompt"], correction, [answer])
    if liked or correction:
        return _made(row, where, row["prompt"], answer)
    return _made(row, where, row["prompt"], None, [answer]) if liked is False else []


def traced_rows(row: Row, where: str) -> list[Located]:
    """What a user thought of a traced run: of a chat model or an agent, or of a chain that makes one text of one."""
    inputs, outputs = (checked_row(row[key], f"{where}: {key}") for key in ("inputs", "outputs"))
    prompt = (
        _unwrapped(inputs["messages"])
        if "messages" in inputs
        else _only_value(inputs, "inputs", where)
    )
    if "generations" in outputs:
        generation = checked_row(
            _first(_unwrapped(outputs["generations"])), f"{where}: outputs: generations"
        )
        answer = generation.get("message") or generation.get("text")
    elif "messages" in outputs:
        answer = _first(list(reversed(_list(outputs["messages"], "outputs: messages", where))))
    else:
        answer = _only_value(outputs, "outputs", where)
    return feedback_rows({**row, "prompt": prompt, "answer": answer}, where)


def _unwrapped(value: Any) -> Any:
    """The one list in a batch of one: a trace has both messages and generations as lists of lists."""
    return (
        value[0]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list)
        else value
    )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else None


def _only_value(values: Row, what: str, where: str) -> Any:
    if len(values) != 1:
        raise HistoryError(
            f"{where}: {what} must hold messages, or one text and nothing else; found {named(values)}"
        )
    return next(iter(values.values()))


def _verdict(score: Any, where: str) -> bool | None:
    """True for thumbs up, False for thumbs down; what lies between is the app's to decide."""
    if score is None:
        return None
    if isinstance(score, int | float) and score in (1, 0, -1):
        return score == 1
    raise HistoryError(
        f"{where}: the score is {shown(score)}; expected 1 or true (liked), 0, -1 or false (disliked), or null"
    )


def _correction(correction: Any, where: str) -> str | None:
    """The edited answer: a text, a message, or LangSmith's mapping with one text in it."""
    if correction is None or correction == "":
        return None
    if isinstance(correction, Mapping) and "content" not in plain_message(correction):
        if len(correction) != 1:
            raise HistoryError(
                f"{where}: correction must be a text or hold one; found {named(correction)}"
            )
        (correction,) = correction.values()
    return _answer(correction, "correction", where)


def _split(prompt: Any, chosen: list[Any], rejected: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    """(prompt, chosen, rejected) with what the sides begin with in common made (the end of) the prompt."""
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    shared = chosen[:length]
    asked = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else plain_messages(prompt or [])
    )
    if not shared or not isinstance(asked, list):
        return prompt, chosen, rejected
    repeated = asked in (
        shared[: len(asked)],
        shared[len(shared) - len(asked) :],
    )  # as in UltraFeedback
    return shared if repeated else [*asked, *shared], chosen[length:], rejected[length:]


def _pair(
    row: Row, where: str, prompt: Any, chosen: tuple[Any, str], rejected: tuple[Any, str]
) -> list[Located]:
    if chosen[0] == rejected[0]:
        raise HistoryError(
            f"{where}: {chosen[1]} and {rejected[1]} are the same; expected two different answers"
        )
    return _made(row, where, prompt, _answer(*chosen, where), [_answer(*rejected, where)])


def _made(row: Row, where: str, prompt: Any, completion: Any, rejected: Any = ()) -> list[Located]:
    made = {key: row[key] for key in _KEPT if key in row}
    made["prompt"] = plain_messages(prompt)
    if completion is not None:
        made["completion"] = completion
    if rejected:
        made["rejected"] = rejected
    return [(where, made)]


def _answer(value: Any, what: str, where: str) -> str:
    """The text of an answer; raises HistoryError for a blank one and for turns of anybody but the assistant."""
    if isinstance(value, BaseModel | Mapping):
        value = [value]
    if isinstance(value, list):
        texts = []
        for index, message in enumerate(plain_messages(value)):
            here = f"{where}: {what}[{index}]"
            if (role := checked_row(message, here).get("role", "assistant")) != "assistant":
                raise HistoryError(
                    f"{here} has the role {shown(role)}; expected one answer, of the assistant"
                )
            texts.append(content_text(message.get("content"), here)[0])
        value = "\n\n".join(text for text in texts if text)
    text = checked_text(value, what, where)
    if not text.strip():
        raise HistoryError(f"{where}: {what} is blank: there is nothing to learn from")
    return text


def _list(value: Any, what: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise HistoryError(f"{where}: {what} must be a list, not {type(value).__name__}")
    return value
