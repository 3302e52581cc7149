"""Retrieval over one's own notes, answered in one's own voice: Chroma finds, the adapter writes.

Run: python examples/rag_over_notes.py [QUESTION]
It learns from the notes first (about a minute on two CPU cores). The notes are invented.
"""

import sys
from pathlib import Path
from zlib import crc32

import chromadb
from chromadb.config import Settings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda

from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeUser

SIZE = 1024


def embed(texts: list[str]) -> list[list[float]]:
    """Return a vector for each text that counts its words' beginnings, hashed into `SIZE` places.

    It finds notes that share words with a question, whatever they mean. It needs no download; for
    more, give ChromaHistory the embedding function of a real model.
    """
    vectors = []
    for text in texts:
        vector = [0.0] * SIZE
        for word in text.lower().split():
            vector[crc32(word.strip(".,:!?")[:5].encode()) % SIZE] += 1.0
        vectors.append(vector)
    return vectors


client = chromadb.EphemeralClient(settings=Settings(anonymized_telemetry=False))
notes = ChromaHistory(client, "notes", embedding_function=embed)


def closest(question: str, config: RunnableConfig) -> dict[str, str]:
    """Return the question and the three notes of the run's user that are nearest to it."""
    user = config["configurable"]["user_id"]
    collection = client.get_collection("notes", embedding_function=None)
    found = collection.query(query_embeddings=embed([question]), n_results=3, where={"user_id": user})
    return {"question": question, "notes": "\n".join(found["documents"][0])}


prompt = ChatPromptTemplate.from_template("{notes}\n\n{question}")
chain = RunnableLambda(closest) | prompt | ChatCoPe(max_tokens=40) | StrOutputParser()

if __name__ == "__main__":
    file = Path(__file__).parent / "data" / "notes.txt"
    notes.add("kim", [{"text": line} for line in file.read_text(encoding="utf-8").splitlines()])
