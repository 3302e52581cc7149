"""What a trace may show of a user."""

import hashlib

import pytest

from langchain_cope.tracing import TracedError, traced_error, traced_user


def test_a_user_is_plain_hashed_or_omitted() -> None:
    assert traced_user("alice", "plain") == "alice"
    assert traced_user("alice", "hashed") == hashlib.sha256(b"alice").hexdigest()[:16]
    assert traced_user("alice", "omitted") is None


def test_no_user_is_shown_as_none() -> None:
    assert {traced_user(None, how) for how in ("plain", "hashed", "omitted")} == {None}


@pytest.mark.parametrize("user", ["日本語 🙂", "a" * 10_000, "\ud800"])
def test_any_string_can_be_hashed(user: str) -> None:
    assert len(traced_user(user, "hashed") or "") == 16


def test_an_errors_message_is_shown_only_where_users_are_plain() -> None:
    error = ValueError("alice is not known")
    assert traced_error(error, "plain") is error
    shown = traced_error(error, "hashed")
    assert isinstance(shown, TracedError)
    assert shown.error is error
    assert "ValueError" in str(shown)
    assert "alice" not in repr(shown)
