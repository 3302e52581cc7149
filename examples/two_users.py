"""One model, two users, one chain: the same question answered by the base and for each user.

Run after `cope-lc personalize examples/data/user.jsonl`: python examples/two_users.py
"""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_cope import ChatCoPe

prompt = ChatPromptTemplate.from_template(
    "Generate a headline for the following article.\narticle: {article}"
)
chain = prompt | ChatCoPe(max_tokens=40) | StrOutputParser()

article = "A thriller and a baking show are among the titles trending on the streaming service."
for user in (None, "robin", "a user without an adapter"):
    answer = chain.invoke({"article": article}, {"configurable": {"user_id": user}})
    print(f"{user or 'the base'}: {answer}")
