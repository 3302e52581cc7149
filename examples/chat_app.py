"""The agent of `agent_with_tools.py` behind a small web chat: several people at once.

Who asks is known by a cookie that this program made when they signed in; what a page sends beside
it names nobody. Their answers are decoded in one batch, each in its reader's own manner.

Run: python examples/chat_app.py [PORT]; then open http://127.0.0.1:8010 in two browsers
It needs extras: pip install '.[gguf,agents,grammar,serve]' in a checkout
"""

import json
import secrets
import sys
from collections.abc import Iterator
from typing import Annotated

import uvicorn
from agent_with_tools import CALENDARS, Context, agent, chat
from fastapi import Body, Cookie, FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse, StreamingResponse

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Chat</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>body { font: 1rem/1.5 system-ui; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
li { white-space: pre-wrap } .call, .tool { opacity: .7 }</style>
<h1>Chat</h1>
<p><label>Signed in as <select id="user"><option value="">nobody</select></label></p>
<ol id="said" aria-live="polite"></ol>
<form id="ask"><label>Question <input id="question" size="40" required></label>
<button>Ask</button></form>
<script type="module">
const byId = (id) => document.getElementById(id);
const post = (path, body) => fetch(path, { method: "POST", body: JSON.stringify(body),
  headers: { "Content-Type": "application/json" } });
for (const name of await (await fetch("users")).json()) byId("user").add(new Option(name, name));
byId("user").onchange = () => post("sign-in", { user: byId("user").value });
const say = (kind, text) => {
  const line = Object.assign(document.createElement("li"), { className: kind, textContent: text });
  byId("said").append(line);
};
byId("ask").onsubmit = async (event) => {
  event.preventDefault();
  const question = byId("question").value;
  say("question", question);
  const answer = await post("ask", { question });
  if (!answer.ok) return say("problem", "Sign in first.");
  let rest = "";
  for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + piece).split("\\n");
    rest = lines.pop();
    for (const { kind, text } of lines.map(JSON.parse)) say(kind, text);
  }
};
</script></html>"""

app = FastAPI(openapi_url=None)
signed_in: dict[str, str] = {}  # user by cookie; an app keeps sessions that end, and asks passwords


@app.get("/")
def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@app.get("/users")
def users() -> list[str]:
    return list(CALENDARS)


@app.post("/sign-in")
def sign_in(user: Annotated[str, Body(embed=True)], response: Response) -> dict[str, str]:
    if user not in CALENDARS:
        raise HTTPException(404, "nobody has that name")
    token = secrets.token_urlsafe()
    signed_in[token] = user
    response.set_cookie("session", token, httponly=True, samesite="strict")
    return {"user": user}


@app.post("/ask")
def ask(
    question: Annotated[str, Body(embed=True)], session: Annotated[str, Cookie()] = ""
) -> StreamingResponse:
    user = signed_in.get(session)
    if user is None:
        raise HTTPException(401, "sign in first")
    return StreamingResponse(steps(question, user), media_type="application/x-ndjson")


def steps(question: str, user: str) -> Iterator[str]:
    """Yield what the agent does and says, one JSON object a line."""
    request = {"messages": [("user", question)]}
    for step in agent.stream(request, context=Context(user), stream_mode="values"):
        message = step["messages"][-1]
        for call in getattr(message, "tool_calls", []):
            text = f"{call['name']} {json.dumps(call['args'])}"
            yield json.dumps({"kind": "call", "text": text}) + "\n"
        if message.type in ("ai", "tool") and message.text:
            yield json.dumps({"kind": message.type, "text": message.text}) + "\n"


if __name__ == "__main__":
    print("loading the model …", flush=True)
    chat.load()
    uvicorn.run(app, port=int(sys.argv[1]) if sys.argv[1:] else 8010, log_level="warning")
