"""Two users in one LangGraph graph: it learns how each writes, then answers each in that manner.

Run: python examples/two_users_in_a_graph.py
The first run trains on both users' texts (a few minutes on two CPU cores); later ones find the
adapters in the default store. It needs an extra: pip install '.[gguf,agents]' in a checkout
"""

from pathlib import Path
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from langchain_cope import ChatCoPe, PersonalizeUser, read_history
from langchain_cope.stores import open_store

DATA = Path(__file__).parent / "data"
TEXTS = {"robin": DATA / "user.jsonl", "kim": DATA / "notes.txt"}
QUESTION = "Write a headline about a cat that sleeps on a heater."

store = open_store(None)
chat = ChatCoPe(store=store, max_tokens=40)
learner = PersonalizeUser(store=store, gate="always")


def user_of(config: RunnableConfig) -> str:
    """Return the user of a run; an app puts it there after its login."""
    user: str = config["configurable"]["user_id"]
    return user


def learn(_: MessagesState, config: RunnableConfig) -> None:
    """Learn from the user's texts where nothing was learnt yet."""
    user = user_of(config)
    if store.active(user) is None:
        history = read_history(TEXTS[user], user_id=user)
        print(f"learning from {len(history.items)} texts of {user} …", flush=True)
        learner.invoke({"user_id": user, "history": history.items}, config)


def answer(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
    """Answer as the user in the configuration."""
    return {"messages": [chat.invoke(state["messages"], config)]}


builder = StateGraph(MessagesState)
builder.add_node("learn", learn)
builder.add_node("answer", answer)
builder.add_edge(START, "learn")
builder.add_edge("learn", "answer")
graph = builder.compile(InMemorySaver())

print("loading the model …", flush=True)
chat.load()
for user in TEXTS:
    # A thread for each user: what one said is not in the other's conversation.
    config: RunnableConfig = {"configurable": {"user_id": user, "thread_id": user}}
    request = {"messages": [("user", QUESTION)]}
    for mode, chunk in graph.stream(request, config, stream_mode=["custom", "updates"]):
        if mode == "custom":  # the training's progress
            line = f"{user}: {chunk['stage']} {chunk['step']} of {chunk['total']}"
            print(f"\r{line:40}", end="", flush=True)
        elif "answer" in chunk:
            print(f"\r{user}: {chunk['answer']['messages'][-1].text:40}", flush=True)
print(f"base: {chat.invoke(QUESTION).text}")
