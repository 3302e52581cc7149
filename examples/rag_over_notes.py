"""Retrieval over one's own notes, answered in one's own voice: Chroma finds, the adapter writes.

Run: python examples/rag_over_notes.py [QUESTION]
The first run learns from the notes (a minute or two on two CPU cores); later ones find the adapter
in the default store. The notes, in examples/data/notes.txt, are invented.
"""

import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import chromadb
from chromadb.config import Settings
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda

from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeUser
from langchain_cope.stores import open_store

SIZE = 1024  # places of a vector


def embed(texts: list[str]) -> list[list[float]]:
    """Return a vector for each text, in which its words are counted, hashed into `SIZE` places.

    It needs no download, and finds notes that share long words with a question, whatever they mean.
    An app gives the embedding function of a real model.
    """
    vectors = []
    for text in texts:
        vector = [0.0] * SIZE
        for word in text.lower().replace("'s", "").split():
            word = word.strip(".,:!?")
            vector[crc32(word.encode()) % SIZE] += max(0.1, len(word) - 2)
        length = sum(value**2 for value in vector) ** 0.5 or 1.0
        vectors.append([value / length for value in vector])
    return vectors


# One collection serves both: what is learnt from, and what is searched.
client = chromadb.EphemeralClient(settings=Settings(anonymized_telemetry=False))
notes = ChromaHistory(client, "notes", embedding_function=embed)
store = open_store(None)


def closest(question: str, config: RunnableConfig) -> dict[str, str]:
    """Return the question, and the three notes of the run's user that are nearest to it."""
    found = client.get_collection("notes", embedding_function=None).query(
        query_embeddings=embed([question]),
        n_results=3,
        where={"user_id": config["configurable"]["user_id"]},
    )
    return {"question": question, "notes": "\n".join(found["documents"][0])}


class Progress(BaseCallbackHandler):
    """Shows how far a training is, on one line."""

    def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
        """Show one step."""
        line = f"  {data['stage']}: {data['step']} of {data['total']}"
        print(f"\r{line:40}", end="", flush=True)


prompt = ChatPromptTemplate.from_template("My notes:\n{notes}\n\nQuestion: {question}")
search = RunnableLambda(closest) | prompt
chat = ChatCoPe(store=store, max_tokens=40)

lines = (Path(__file__).parent / "data" / "notes.txt").read_text(encoding="utf-8").splitlines()
notes.add("kim", [{"text": line} for line in lines])
if store.active("kim") is None:
    print(f"learning from {len(lines)} notes …", flush=True)
    learner = PersonalizeUser(store=store, history=notes, gate="always")
    print("\n" + learner.invoke({"user_id": "kim"}, {"callbacks": [Progress()]}).reason)

question = " ".join(sys.argv[1:]) or "What does the lamp in the hall take?"
found = search.invoke(question, {"configurable": {"user_id": "kim"}})
print(f"\n{found.to_string()}\n")
for user in (None, "kim"):  # kim's notes in both cases, in two voices
    answer = (chat.bind(user_id=user) | StrOutputParser()).invoke(found)
    print(f"{user or 'base'}: {answer}")
