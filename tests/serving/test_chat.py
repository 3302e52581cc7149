"""Chat completions over HTTP."""

from typing import Any

from serving.conftest import Running


def test_a_users_key_is_answered_in_the_users_voice(server: Running) -> None:
    alice, bob = server.ask("alice").json(), server.ask("bob").json()
    assert alice["choices"][0]["message"]["content"] != bob["choices"][0]["message"]["content"]
