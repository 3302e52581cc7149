"""Retrieval beside CoPe: the newest things that a user wrote go into the prompt, the user's manner comes from the adapter.

Run after `cope-lc personalize examples/data/user.jsonl`: python examples/rag_next_to_cope.py
"""

import json
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda

from langchain_cope import ChatCoPe, ChromaHistory

history = ChromaHistory("robin-chroma")
written = json.loads((Path(__file__).parent / "data" / "user.jsonl").read_text(encoding="utf-8"))
if not history.count("robin"):
    history.add("robin", written["history"])


def examples_of(question: str, config: RunnableConfig) -> dict[str, str]:
    """The user's texts that share most words with the question; any retriever would do."""
    user = config["configurable"]["user_id"]
    words = set(question.lower().split())
    ranked = sorted(
        history.fetch(user),
        key=lambda item: len(words & set(item.prompt.lower().split())),
        reverse=True,
    )
    return {
        "question": question,
        "examples": "\n".join(f"- {item.completion}" for item in ranked[:3]),
    }


prompt = ChatPromptTemplate.from_template(
    "{question}\nearlier headlines of this author:\n{examples}"
)
chain = RunnableLambda(examples_of) | prompt | ChatCoPe(max_tokens=40) | StrOutputParser()

question = written["queries"][0]["prompt"]
print(chain.invoke(question, {"configurable": {"user_id": "robin"}}))
