"""Two users over HTTP with OpenAI's own client: each is answered in a voice of their own.

pip install '.[gguf,serve]' openai    (in a checkout)
cope-lc serve                                  # in another terminal
python openai_client.py http://127.0.0.1:8000/v1 alice bob
"""

import os
import sys

from openai import OpenAI


def main() -> None:
    url, *users = sys.argv[1:]
    client = OpenAI(base_url=url, api_key=os.environ.get("COPE_KEY", "none"))
    model = client.models.list().data[0].id
    for user in users:
        print(f"{user}: ", end="")
        question = "Write a headline: the village bakery has won a prize for its rye bread."
        pieces = client.chat.completions.create(
            model=model,
            user=user,
            messages=[{"role": "user", "content": question}],
            max_tokens=40,
            stream=True,
        )
        for piece in pieces:
            print(piece.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
