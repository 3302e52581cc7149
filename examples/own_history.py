"""An app that learns from its use: what the user writes goes to Chroma, and then into an adapter.

Run: python examples/own_history.py (about a minute on two CPU cores)
"""

import json
from pathlib import Path

from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeUser

history = ChromaHistory("robin-chroma")  # a folder; or "http://localhost:8000" for a Chroma server
texts = json.loads((Path(__file__).parent / "data" / "user.jsonl").read_text(encoding="utf-8"))
history.add("robin", texts["history"])
print(f"{history.count('robin')} items of robin in Chroma")

result = PersonalizeUser(history=history).invoke({"user_id": "robin"})
print(f"published: {result.published} ({result.reason})")

question = texts["queries"][0]["prompt"]
for user in (None, "robin"):
    print(f"\n{user or 'the base'}: ", end="")
    for chunk in ChatCoPe(user_id=user, max_tokens=40).stream(question):
        print(chunk.content, end="", flush=True)
print(f"\nrobin wrote: {texts['queries'][0]['completion']}")
