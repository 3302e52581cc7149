"""A graph that learns from a user's texts, shows its progress, and answers in the user's manner.

Run: pip install langgraph, then python examples/langgraph_progress.py
(about a minute on two CPU cores). Ctrl-C stops it within a training step, and the next run goes on
after the last finished stage.
"""

import asyncio
import json
from pathlib import Path
from typing import TypedDict

from langgraph.graph import END, START, StateGraph

from langchain_cope import ChatCoPe, PersonalizeUser

personalize = PersonalizeUser(job_dir="robin-job")  # where unfinished work is kept
chat = ChatCoPe(max_tokens=40)


class State(TypedDict, total=False):
    """What the graph's nodes share."""

    user_id: str
    history: list[dict[str, str]]
    question: str
    reason: str
    answer: str


async def learn(state: State) -> State:
    result = await personalize.ainvoke({"user_id": state["user_id"], "history": state["history"]})
    return {"reason": result.reason}


async def answer(state: State) -> State:
    message = await chat.ainvoke(state["question"], {"configurable": {"user_id": state["user_id"]}})
    return {"answer": str(message.content)}


graph = StateGraph(State)
graph.add_node("learn", learn)
graph.add_node("reply", answer)
graph.add_edge(START, "learn")
graph.add_edge("learn", "reply")
graph.add_edge("reply", END)


async def main() -> None:
    file = Path(__file__).parent / "data" / "user.jsonl"
    texts = json.loads(file.read_text(encoding="utf-8"))
    query = texts["queries"][0]
    request = State(user_id="robin", history=texts["history"], question=query["prompt"])
    async for mode, chunk in graph.compile().astream(request, stream_mode=["custom", "values"]):
        if mode == "custom":
            progress = f"{chunk['stage']}: {chunk['step']} of {chunk['total']}"
            print(f"\r{progress}      ", end="", flush=True)
    print(f"\n{chunk['reason']}")
    print(f"in robin's manner: {chunk['answer']}")
    print(f"robin wrote: {query['completion']}")


if __name__ == "__main__":
    asyncio.run(main())
