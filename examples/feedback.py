"""An app that learns from edits: robin corrects what the model wrote; the edits are chosen, the originals rejected.

Run: python examples/feedback.py (a few minutes on two CPU cores)
"""

import json
from pathlib import Path

from langchain_core.messages import HumanMessage

from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeUser

history = ChromaHistory()  # in memory; a folder or a server's URL keeps it
chat = ChatCoPe(user_id="robin", max_tokens=30)
written = json.loads((Path(__file__).parent / "data" / "user.jsonl").read_text(encoding="utf-8"))

for row in written["history"][-40:]:
    question = [HumanMessage(row["prompt"])]
    answer = chat.invoke(question)
    history.add(
        "robin",
        [{"prompt": question, "answer": answer, "score": 0, "correction": row["completion"]}],
    )

read = history.history("robin")
print(f"{len(read.items)} edited answers, {read.num_pairs} of them pairs for DPO")
result = PersonalizeUser(history=history).invoke({"user_id": "robin"})
print(f"published: {result.published} ({result.reason})")
for note in result.notes:
    print(f"note: {note}")

question = written["queries"][0]["prompt"]
print(f"\nbefore: {ChatCoPe(max_tokens=30).invoke(question).content}")
print(f"after:  {chat.invoke(question).content}")
print(f"robin:  {written['queries'][0]['completion']}")
