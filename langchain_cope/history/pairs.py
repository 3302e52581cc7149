"""Rows of one answer each, or of a better and a worse one, as prompt/completion rows.

    {"text": …}                                       a text without a prompt
    {"prompt": …, "completion": …}                    TRL; the completion is what is learnt
    {"instruction": …, "input": …, "output": …}       Alpaca
    {"prompt": …, "chosen": …, "rejected": …}         TRL
    {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}    OpenAI
    {"prompt": …, "answer": …, "score": 1 or 0, "correction": …}    feedback, in LangSmith's words
    {"inputs": {…}, "outputs": {…}, "score": …, "correction": …}    the same on a traced run

Prompts are texts or messages; answers are texts, a message, or assistant messages. A pair of TRL's
may lack a prompt: it is what both answers begin with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from langchain_cope.errors import HistoryError
from langchain_cope.history.messages import content_text, plain_message, plain_messages
from langchain_cope.history.rows import TIME_KEYS, Located, Row, shown

_CARRIED_OVER = (*TIME_KEYS, "conversation", "weight")


def pair_rows(row: Row) -> list[Row]:
    """Return prompt and completion, and what was rejected, where the row has it."""
    completion = _answer(row.field("completion"))
    rejected = row.get("rejected") or ()
    if isinstance(rejected, str):
        rejected = [rejected]
    return [_plain_row(row, row.get("prompt"), completion, rejected)]


def text_rows(row: Row) -> list[Row]:
    """Return a text that answers nothing."""
    return [_plain_row(row, None, _answer(row.field("text")))]


def alpaca_rows(row: Row) -> list[Row]:
    """Return the instruction, the input after it where there is one, and the output."""
    asked = [row.field(key).text() for key in ("instruction", "input") if row.get(key)]
    earlier: list[dict[str, Any]] = []
    if row.get("history"):
        for turns in row.field("history").entries():
            earlier += _alpaca_turns(turns)
    prompt: Any = "\n\n".join(asked)
    if earlier:
        prompt = [*earlier, {"role": "user", "content": prompt}]
    return [_plain_row(row, prompt, _answer(row.field("output")))]


def preference_rows(row: Row) -> list[Row]:
    """Return a pair of TRL's: texts with their prompt, or messages.

    Of messages the prompt may be what both sides begin with.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = plain_messages(chosen), plain_messages(rejected)
        num_shared = _common_prefix(chosen, rejected)
        prompt, num_asked = _asked(prompt, chosen[:num_shared])
        answers = {"chosen": chosen[num_asked:], "rejected": rejected[num_asked:]}
        row = row.with_fields({**row.value, **answers})
    elif prompt is None:
        raise HistoryError(
            f"{row.where}: chosen and rejected without prompt; "
            "expected a prompt, or messages that begin with it"
        )
    return [_preference(row, prompt, "chosen", "rejected")]


def openai_pair_rows(row: Row) -> list[Row]:
    """Return a pair of OpenAI's: one assistant message each."""
    asked = row.field("input").row()
    if "messages" not in asked:
        raise HistoryError(f"{asked.where} must hold messages; found {asked.field_names()}")
    return [_preference(row, asked["messages"], "preferred_output", "non_preferred_output")]


def feedback_rows(row: Row) -> list[Row]:
    """Return what a user thought of an answer.

    An edited answer is chosen and the original rejected; a liked one is learnt; a disliked one is
    rejected in favour of what the user liked as an answer to the same prompt. Feedback without
    score and correction gives no row.
    """
    answer = _answer(row.field("answer"))
    prompt = row.get("prompt")
    if prompt in (None, "", []):
        raise HistoryError(
            f"{row.where}: feedback without prompt; expected the prompt that was answered"
        )
    correction = _correction(row.field("correction"))
    is_liked = _is_liked(row)
    if correction not in (None, answer):
        return [_plain_row(row, prompt, correction, [answer])]
    if correction is not None or is_liked:
        return [_plain_row(row, prompt, answer)]
    if is_liked is None:
        return []
    return [_plain_row(row, prompt, None, [answer])]


def traced_rows(row: Row) -> list[Row]:
    """Return what a user thought of a traced run.

    The run is that of a chat model or an agent, or of a chain that makes one text of one.
    """
    inputs, outputs = row.field("inputs").row(), row.field("outputs").row()
    if "messages" in inputs:
        prompt = _without_batch(inputs["messages"])
    else:
        prompt = _only_value(inputs)
    if "generations" in outputs:
        generations = _without_batch(outputs["generations"])
        generation = outputs.field("generations").with_value(_entry(generations, 0)).row()
        answer = generation.get("message") or generation.get("text")
    elif "messages" in outputs:
        messages = [message.value for message in outputs.field("messages").entries()]
        answer = _entry(messages, -1)
    else:
        answer = _only_value(outputs)
    return feedback_rows(row.with_fields({**row.value, "prompt": prompt, "answer": answer}))


def _alpaca_turns(turns: Located) -> list[dict[str, Any]]:
    if not isinstance(turns.value, list) or len(turns.value) != 2:
        raise HistoryError(f"{turns.where} is {shown(turns.value)}; expected [instruction, output]")
    instruction, output = turns.value
    return [
        {"role": "user", "content": instruction},
        {"role": "assistant", "content": output},
    ]


def _common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return with how many entries both begin."""
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length


def _asked(prompt: Any, shared: list[Any]) -> tuple[Any, int]:
    """Return the prompt of a pair, and how many of the messages that both sides share are in it."""
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = plain_messages(prompt or [])
    if not shared or not isinstance(messages, list):
        return prompt, 0
    # The sides of UltraFeedback repeat the prompt.
    begins_with_it = messages == shared[: len(messages)]
    ends_with_it = messages == shared[len(shared) - len(messages) :]
    if begins_with_it or ends_with_it:
        return shared, len(shared)
    return [*messages, *shared], len(shared)


def _without_batch(value: Any) -> Any:
    """Return the only list in a batch of one.

    A trace has both messages and generations as lists of lists.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        return value[0]
    return value


def _entry(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list) and value else None


def _only_value(row: Row) -> Any:
    if len(row.value) != 1:
        raise HistoryError(
            f"{row.where} must hold messages, or one text and nothing else; "
            f"found {row.field_names()}"
        )
    return next(iter(row.value.values()))


def _is_liked(row: Row) -> bool | None:
    """Return True for thumbs up, False for thumbs down, None without a score.

    What lies between is the app's to decide.
    """
    score = row.get("score")
    if score is None:
        return None
    if isinstance(score, int | float) and score in (1, 0, -1):
        return score == 1
    raise HistoryError(
        f"{row.where}: the score is {shown(score)}; "
        "expected 1 or true (liked), 0, -1 or false (disliked), or null"
    )


def _correction(correction: Located) -> str | None:
    """Return the edited answer: a text, a message, or LangSmith's mapping with one text in it."""
    value = correction.value
    if value is None or value == "":
        return None
    if isinstance(value, Mapping) and "content" not in plain_message(value):
        if len(value) != 1:
            names = correction.row().field_names()
            raise HistoryError(f"{correction.where} must be a text or hold one; found {names}")
        (text,) = value.values()
        return _answer(correction.with_value(text))
    return _answer(correction)


def _preference(row: Row, prompt: Any, chosen: str, rejected: str) -> Row:
    """Return the pair of the answers in the fields `chosen` and `rejected`."""
    if row[chosen] == row[rejected]:
        raise HistoryError(
            f"{row.where}: {chosen} and {rejected} are the same; expected two different answers"
        )
    return _plain_row(row, prompt, _answer(row.field(chosen)), [_answer(row.field(rejected))])


def _plain_row(row: Row, prompt: Any, completion: str | None, rejected: Any = ()) -> Row:
    """Return the row as prompt, completion and rejected answers, with its time and conversation."""
    fields = {key: row[key] for key in _CARRIED_OVER if key in row}
    fields["prompt"] = plain_messages(prompt)
    if completion is not None:
        fields["completion"] = completion
    if rejected:
        fields["rejected"] = rejected
    return row.with_fields(fields)


def _answer(answer: Located) -> str:
    """Return the text of an answer: a text, a message or messages.

    Raises HistoryError for a blank one, and for turns of any role but the assistant's.
    """
    value = answer.value
    if isinstance(value, BaseModel | Mapping):
        value = [value]
    if isinstance(value, list):
        messages = answer.with_value(plain_messages(value)).entries()
        texts = [_assistant_text(message.row()) for message in messages]
        value = "\n\n".join(text for text in texts if text)
    text = answer.with_value(value).text()
    if not text.strip():
        raise HistoryError(f"{answer.where} is blank: there is nothing to learn from")
    return text


def _assistant_text(message: Row) -> str:
    role = message.get("role", "assistant")
    if role != "assistant":
        raise HistoryError(
            f"{message.where} has the role {shown(role)}; expected one answer, of the assistant"
        )
    text, _ = content_text(message.field("content"))
    return text
