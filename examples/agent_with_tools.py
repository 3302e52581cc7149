"""An agent with tools for two users: LangChain's own loop, each run answered in its user's manner.

Needs a base that can follow instructions, and extras:
pip install "langchain-cope[agents,grammar]"
Run: python examples/agent_with_tools.py Qwen/Qwen3-0.6B (or the path of any instruct model)
"""

import sys
from dataclasses import dataclass

from langchain.agents import create_agent

from langchain_cope import ChatCoPe, CoPeUserMiddleware


@dataclass
class Context:
    """What the app knows of a run; the user comes from its own login, never from the client."""

    user_id: str


def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


def days_between(first: str, second: str) -> int:
    """Days from one date to another, both as YYYY-MM-DD."""
    from datetime import date

    return (date.fromisoformat(second) - date.fromisoformat(first)).days


# The starter, which comes with the package, shows that it runs; it is no assistant.
model = sys.argv[1] if len(sys.argv) > 1 else "starter"
chat = ChatCoPe(model=model, max_tokens=200)
agent = create_agent(
    chat, [add, days_between], middleware=[CoPeUserMiddleware()], context_schema=Context
)

request = {"messages": [("user", "How many days lie between 2026-01-01 and 2026-03-01?")]}
limits = {"recursion_limit": 8}
for user in ("robin", "alice"):
    print(f"\n{user}: ", end="", flush=True)
    for message, _ in agent.stream(request, limits, context=Context(user), stream_mode="messages"):
        for piece in getattr(message, "tool_call_chunks", []):
            if piece["name"]:
                print(f"[{piece['name']}] ", end="", flush=True)
            print(piece["args"], end="", flush=True)
        print(message.content, end="", flush=True)
print()
