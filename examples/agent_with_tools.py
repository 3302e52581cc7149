"""An agent with two tools that knows its user: the run's context names who is logged in.

The context comes from the app, never from the client or the model. The model answers in that user's
manner, where it has learnt it, and a tool reads that user's calendar.

Run: python examples/agent_with_tools.py [QUESTION]
It needs extras: pip install '.[gguf,agents,grammar]' in a checkout
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain.tools import ToolRuntime
from langchain_core.messages import HumanMessage

from langchain_cope import ChatCoPe, CoPeUserMiddleware

CALENDARS = {
    "robin": {"monday": "the dentist at 10 o'clock", "friday": "the cinema with Alice at 8"},
    "alice": {"monday": "a yoga class at 6 o'clock"},
}


@dataclass
class Context:
    """What the app knows of a run."""

    user_id: str


def my_appointments(day: str, runtime: ToolRuntime[Context]) -> str:
    """Look up my appointments on a day of the week."""
    appointment = CALENDARS[runtime.context.user_id].get(day.lower(), "no appointments")
    return f"On {day} you have {appointment}."


def weather(city: str) -> str:
    """Get the weather in a city."""
    return f"It rains in {city}."  # an app asks a service here


@wrap_model_call
def tool_first(
    request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
) -> ModelResponse[Any]:
    """Ask for one tool call, then for an answer from what it gave, the facts first.

    A model as small as smollm2 needs it so. With a larger model leave this out; it decides.
    """
    if request.messages[-1].type == "human":
        one_call = {"parallel_tool_calls": False}
        return handler(request.override(tool_choice="any", model_settings=one_call))
    asked, *_, result = request.messages
    answer = HumanMessage(f"{result.text}\n\nSo, in one short sentence: {asked.text}")
    return handler(request.override(messages=[answer], tools=[]))


chat = ChatCoPe(max_tokens=100)
agent = create_agent(
    chat,
    [weather, my_appointments],
    middleware=[CoPeUserMiddleware(), tool_first],
    context_schema=Context,
)


def main() -> None:
    print("loading the model …", flush=True)
    chat.load()
    question = " ".join(sys.argv[1:]) or "What do I have to do on Monday?"
    for user in CALENDARS:
        print(f"\n{user}: {question}")
        request = {"messages": [("user", question)]}
        for step in agent.stream(request, context=Context(user), stream_mode="values"):
            message = step["messages"][-1]
            for call in getattr(message, "tool_calls", []):
                print(f"  calls {call['name']} with {call['args']}")
            if message.type in ("ai", "tool") and message.text:
                print(f"  {message.type}: {message.text}")


if __name__ == "__main__":
    main()
