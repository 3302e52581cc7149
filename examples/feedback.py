"""An app that learns from edits: what robin corrects is chosen, what the model wrote rejected.

Run: python examples/feedback.py (a few minutes on two CPU cores)
"""

import json
from pathlib import Path

from langchain_core.messages import HumanMessage

from langchain_cope import ChatCoPe, ChromaHistory, PersonalizeUser

history = ChromaHistory()  # in memory; a folder or a server's URL keeps it
chat = ChatCoPe(user_id="robin", max_tokens=30)
texts = json.loads((Path(__file__).parent / "data" / "user.jsonl").read_text(encoding="utf-8"))

for row in texts["history"][-40:]:
    question = [HumanMessage(row["prompt"])]
    answer = chat.invoke(question)
    edit = {"prompt": question, "answer": answer, "score": 0, "correction": row["completion"]}
    history.add("robin", [edit])

edits = history.history("robin")
print(f"{len(edits.items)} edited answers, {edits.num_pairs} of them pairs for DPO")
result = PersonalizeUser(history=history).invoke({"user_id": "robin"})
print(f"published: {result.published} ({result.reason})")
for note in result.notes:
    print(f"note: {note}")

question = texts["queries"][0]["prompt"]
print(f"\nbefore: {ChatCoPe(max_tokens=30).invoke(question).content}")
print(f"after:  {chat.invoke(question).content}")
print(f"robin:  {texts['queries'][0]['completion']}")
