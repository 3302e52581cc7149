"""Retrieval beside CoPe: examples of the user's texts are in the prompt, the adapter does the rest.

Run after `cope-lc personalize examples/data/user.jsonl`: python examples/rag_next_to_cope.py
"""

import json
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda

from langchain_cope import ChatCoPe, ChromaHistory, Item

history = ChromaHistory("robin-chroma")
texts = json.loads((Path(__file__).parent / "data" / "user.jsonl").read_text(encoding="utf-8"))
if not history.count("robin"):
    history.add("robin", texts["history"])


def with_examples(question: str, config: RunnableConfig) -> dict[str, str]:
    """Add the user's texts that share most words with the question; any retriever would do."""
    words = set(question.lower().split())

    def num_shared(item: Item) -> int:
        return len(words & set(item.prompt.lower().split()))

    items = history.fetch(config["configurable"]["user_id"])
    closest = sorted(items, key=num_shared, reverse=True)[:3]
    examples = "\n".join(f"- {item.completion}" for item in closest)
    return {"question": question, "examples": examples}


prompt = ChatPromptTemplate.from_template(
    "{question}\nearlier headlines of this author:\n{examples}"
)
chain = RunnableLambda(with_examples) | prompt | ChatCoPe(max_tokens=40) | StrOutputParser()

question = texts["queries"][0]["prompt"]
print(chain.invoke(question, {"configurable": {"user_id": "robin"}}))
