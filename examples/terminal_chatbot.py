"""A chatbot that records what you type, learns to write as you do, and shows the difference.

Run: python examples/terminal_chatbot.py YOUR_NAME [FILE with texts of yours]
Try: python examples/terminal_chatbot.py robin examples/data/user.jsonl

What you write is kept in the folder chatbot-history, your adapter in the default adapter store.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from adapter_store import AdapterNotFoundError, AdapterStoreError
from langchain_cope import (
    ChatCoPe,
    ChromaHistory,
    PersonalizeUser,
    RecordedChatHistory,
    forget,
    read_history,
)
from langchain_cope.errors import CopeError
from langchain_cope.stores import open_store

COMMANDS = ("me", "base", "both", "alpha", "good", "fix", "personalize", "undo", "forget", "help")
NOTHING_LEARNT = "Nothing was learnt yet, so both voices are the base's. /personalize learns."
TURNS = 1  # of a conversation: smollm2 copies its earlier answers; give a larger base more


class Talk(BaseChatMessageHistory):
    """One conversation, in memory."""

    def __init__(self) -> None:
        self.messages: list[BaseMessage] = []

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Add what was said."""
        self.messages.extend(messages)

    def clear(self) -> None:
        """Begin anew."""
        self.messages.clear()


class Chatbot:
    """One user's conversations. Each command is the method of its name."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.model = ChatCoPe(max_tokens=60)
        self.store = open_store(None)
        self.history = ChromaHistory("chatbot-history")
        self.voices: tuple[str | None, ...] = (None, user)
        self.contrast: float | None = None
        self.begin()

    def begin(self) -> None:
        """Begin a new conversation."""
        number = self.history.count(self.user)
        self.talk = RecordedChatHistory(
            Talk(), self.history, user_id=self.user, session_id=str(number)
        )

    def say(self, text: str) -> None:
        """Answer in every voice asked for; the conversation goes on from the last answer."""
        if len(self.talk.messages) >= 2 * TURNS:
            self.begin()
        question = HumanMessage(text)
        for voice in self.voices:
            answer = self.answer([*self.talk.messages, question], voice)
        self.talk.add_messages([question, AIMessage(answer)])

    def answer(self, messages: list[BaseMessage], voice: str | None) -> str:
        """Print an answer as it comes, and return it."""
        print(f"{voice or 'base'}: ", end="", flush=True)
        answer = ""
        for chunk in self.model.stream(messages, user_id=voice, alpha=self.contrast):
            answer += chunk.text
            print(chunk.text, end="", flush=True)
        print("" if answer.endswith("\n") else "\n", end="")
        return answer

    def me(self, _: str) -> None:
        """Answer as you would."""
        self.voices = (self.user,)
        if self.store.active(self.user) is None:
            print(NOTHING_LEARNT)

    def base(self, _: str) -> None:
        """Answer as the model does without what it learnt."""
        self.voices = (None,)

    def both(self, _: str) -> None:
        """Answer both ways, one after the other."""
        self.voices = (None, self.user)

    def alpha(self, number: str) -> None:
        """Contrast your model with the base by this much: 0.3, or 0 for no contrast."""
        with suppress(ValueError):
            if float(number) >= 0:
                self.contrast = float(number)
                return
        raise ValueError(f"a number of at least 0 is needed, as in /alpha 0.3, not {number!r}")

    def good(self, _: str) -> None:
        """Learn the last answer: it is what you would have written."""
        question, answer = self.last_answer()
        self.history.add(self.user, [{"prompt": question, "answer": answer, "score": 1}])
        print("noted")

    def fix(self, text: str) -> None:
        """Learn this text instead of the last answer, as what you would have written."""
        question, answer = self.last_answer()
        if not text:
            raise ValueError("write the text behind /fix")
        edit = {"prompt": question, "answer": answer, "score": 0, "correction": text}
        self.history.add(self.user, [edit])
        print("noted")

    def last_answer(self) -> tuple[list[BaseMessage], BaseMessage]:
        """Return the last answer, and the messages before it."""
        if not self.talk.messages:
            raise ValueError("there is no answer yet: write something first")
        *question, answer = self.talk.messages
        return question, answer

    def personalize(self, _: str) -> None:
        """Learn from all that was recorded."""
        print("learning; this takes minutes, and Ctrl-C stops it", flush=True)
        learn = PersonalizeUser(store=self.store, history=self.history)
        result = learn.invoke({"user_id": self.user}, {"callbacks": [Progress()]})
        print(f"\n{'learnt' if result.published else 'kept as it was'}: {result.reason}")
        for sample in result.samples[-3:]:
            print(f"\nyou wrote: {sample.reference}")
            print(f"base: {sample.base}\n{self.user}: {sample.cope}")

    def undo(self, _: str) -> None:
        """Go back to what was learnt before the last time."""
        learnt_last = self.store.resolve(self.user).version
        try:
            print(f"back to {self.store.rollback(self.user).version}")
        except AdapterNotFoundError:  # it was the first
            self.store.delete_version(self.user, learnt_last)
            print("back to the base")

    def forget(self, _: str) -> None:
        """Remove everything that is kept of you."""
        print(forget(self.user, store=self.store, history=self.history))
        self.begin()

    def help(self, _: str) -> None:
        """Show this; Ctrl-D ends."""
        for name in COMMANDS:
            print(f"/{name:12} {getattr(self, name).__doc__}")


class Progress(BaseCallbackHandler):
    """Shows how far a training is, on one line."""

    def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
        """Show one step."""
        line = f"{data['stage']}: {data['step']} of {data['total']}"
        print(f"\r{line:40}", end="", flush=True)


def lines() -> Iterator[str]:
    """Yield what is typed, until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\nCtrl-D ends")
        except EOFError:
            print()
            return


def main(user: str = "me", file: str | None = None) -> None:
    """Answer line after line; a line with a slash is a command."""
    bot = Chatbot(user)
    if file is not None:
        bot.history.add(user, read_history(file, user_id=user).items)
    print("loading the model …", flush=True)
    bot.model.load()
    print(f"{bot.history.count(user)} texts of {user} are recorded. /help shows the commands.")
    if bot.store.active(user) is None:
        print(NOTHING_LEARNT)
    for line in map(str.strip, lines()):
        command, _, argument = line.partition(" ")
        try:
            if command[1:] in COMMANDS and command[0] == "/":
                getattr(bot, command[1:])(argument)
            elif line.startswith("/"):
                print(f"there is no {command}; these are there:")
                bot.help(argument)
            elif line:
                bot.say(line)
        except KeyboardInterrupt:  # of an answer, or a training
            print("\nstopped")
        except (CopeError, AdapterStoreError, ValueError) as error:
            print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
