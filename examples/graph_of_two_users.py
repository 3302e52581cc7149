"""LangGraph with two users: one graph, one model, a thread of messages and a manner for each user.

Needs pip install "langchain-cope[agents]". Run after
`cope-lc personalize examples/data/user.jsonl`: python examples/graph_of_two_users.py
"""

from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from langchain_cope import ChatCoPe

chat = ChatCoPe(max_tokens=40)


def answer(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
    """Answer as the user in the configuration, which reaches the model with it."""
    return {"messages": [chat.invoke(state["messages"], config)]}


graph = (
    StateGraph(MessagesState)
    .add_node("answer", answer)
    .add_edge(START, "answer")
    .compile(InMemorySaver())
)

article = "A baking show is among the titles trending this week."
question = f"Generate a headline for the following article.\narticle: {article}"
for user in ("robin", "another user"):
    config: RunnableConfig = {"configurable": {"user_id": user, "thread_id": f"talk of {user}"}}
    request = {"messages": [("user", question)]}
    print(f"{user}: ", end="")
    for message, _ in graph.stream(request, config, stream_mode="messages"):
        print(message.content, end="", flush=True)
    print()
