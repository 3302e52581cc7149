"""Agents on a real base: small tasks with tools, run many times with different seeds.

Every run is LangChain's own `create_agent` loop with three tools; the runs sample, so that they
differ, and are decoded together. A question is answered by a call (`tool_choice="any"`), since a
small base hardly ever calls a tool by itself (`--free` leaves it the choice); after the result it
calls again or answers, as it likes.

The tools bound the length of their strings, as is wise with a small base (docs/chat.md).

Counted are calls that are invalid, which only those are that the token budget cuts; calls that a
run repeats although their result is in the conversation; and runs that end by the recursion limit.
How often the right tool was called with the right arguments says what the base understands; it is
reported and not promised. The last line is one JSON object.
"""

import argparse
import asyncio
import json
from collections import Counter
from typing import Annotated, Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, wrap_model_call
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.errors import GraphRecursionError
from pydantic import Field

from langchain_cope import ChatCoPe

# A small base may never close a string of its own; the schema closes it.
Short = Annotated[str, Field(max_length=40)]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def get_weather(city: Short) -> str:
    """Tell the weather in a city."""
    return f"In {city} it is sunny, 21 degrees."


def look_up(word: Short) -> str:
    """Explain what a word means."""
    return f"{word}: evening light after sunset."


@wrap_model_call
async def call_first(request: ModelRequest[Any], handler: Any) -> Any:
    """Have a question answered by a call of a tool."""
    asked = isinstance(request.messages[-1], HumanMessage)
    return await handler(request.override(tool_choice="any") if asked else request)


TOOLS = [add, get_weather, look_up]
TASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("Add 17 and 25 with the tool.", "add", {"a": 17, "b": 25}),
    ("What is the weather in Paris? Use the tool.", "get_weather", {"city": "Paris"}),
    ("Look up the word dusk with the tool.", "look_up", {"word": "dusk"}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--recursion-limit", type=int, default=25)
    parser.add_argument("--free", action="store_true", help="calls are the model's own idea")
    parser.add_argument("--show", type=int, default=0, help="print so many conversations")
    options = parser.parse_args()
    results = asyncio.run(_all(options))
    total: Counter[str] = sum((counts for counts, _ in results), Counter())
    for _, messages in results[: options.show]:
        print("\n".join(message.pretty_repr() for message in messages), "\n")
    names = ("calls", "invalid", "repeated", "recursion_limit", "right_tool", "right_arguments")
    for name in names:
        print(f"{name:<18}{total[name]:>6}")
    print(json.dumps({"benchmark": "agents", "runs": options.runs, **{n: total[n] for n in names}}))


async def _all(options: argparse.Namespace) -> list[tuple[Counter[str], list[BaseMessage]]]:
    return await asyncio.gather(*(_run(options, number) for number in range(options.runs)))


async def _run(options: argparse.Namespace, number: int) -> tuple[Counter[str], list[BaseMessage]]:
    """Return (counts, conversation) of one run; its task goes round, its seed is its number."""
    chat = ChatCoPe(
        model=options.model,
        dtype=options.dtype,
        store="memory://agents",
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        seed=number,
    )
    task, name, arguments = TASKS[number % len(TASKS)]
    agent: Any = create_agent(chat, TOOLS, middleware=[] if options.free else [call_first])
    config: RunnableConfig = {"recursion_limit": options.recursion_limit}
    messages: list[BaseMessage] = []
    counts: Counter[str] = Counter()
    try:
        async for state in agent.astream(
            {"messages": [("user", task)]}, config, stream_mode="values"
        ):
            messages = state["messages"]
    except GraphRecursionError:
        counts["recursion_limit"] += 1
    answers = [message for message in messages if isinstance(message, AIMessage)]
    calls = [(call["name"], call["args"]) for answer in answers for call in answer.tool_calls]
    distinct = {json.dumps(call, sort_keys=True) for call in calls}
    counts["calls"] = len(calls)
    counts["invalid"] = sum(len(answer.invalid_tool_calls) for answer in answers)
    counts["repeated"] = len(calls) - len(distinct)
    counts["right_tool"] = int(any(called == name for called, _ in calls))
    counts["right_arguments"] = int((name, arguments) in calls)
    return counts, messages


if __name__ == "__main__":
    main()
