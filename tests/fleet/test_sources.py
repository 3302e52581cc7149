"""Whose histories there are, in a folder, a file and a Chroma."""

import json
from pathlib import Path

import pytest
from fleet_users import rows_of, write_users

from langchain_cope import ChromaHistory
from langchain_cope.errors import HistoryError, InputError
from langchain_cope.fleet.sources import Only, open_source


def test_a_folder_names_users_by_line_or_by_file(histories: Path) -> None:
    source = open_source(histories)
    assert source.users() == ["carol", "alice", "bob"]
    assert [len(source.read(user).items) for user in source.users()] == [12, 12, 12]


def test_a_user_of_two_files_is_one_user(tmp_path: Path) -> None:
    write_users(tmp_path / "a.jsonl", ["alice"])
    more = [{"user_id": "alice", "prompt": "More?", "completion": "Yes"}]
    (tmp_path / "b.jsonl").write_text(json.dumps(more[0]) + "\n")
    source = open_source(tmp_path)
    assert source.users() == ["alice"]
    assert len(source.read("alice").items) == 13


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_users(file, ["alice"])
    source = open_source(file)
    assert source.users() == ["alice"]
    write_users(file, ["alice"], num_items=20)
    assert len(source.read("alice").items) == 20


def test_a_file_being_written_counts_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "users.jsonl"
    write_users(file, ["alice", "bob"])
    source = open_source(file)
    assert source.users() == ["alice", "bob"]
    whole = file.read_text()
    file.write_text(whole[:-20])  # half of bob
    assert len(source.read("alice").items) == 12
    assert len(source.read("bob").items) == 12
    write_users(file, ["alice"], num_items=20)
    assert len(source.read("alice").items) == 20
    with pytest.raises(HistoryError, match="does no longer"):
        source.read("bob")
    file.unlink()
    with pytest.raises(HistoryError, match=r"users\.jsonl"):
        source.read("alice")


def test_a_chroma_lists_its_users(tmp_path: Path) -> None:
    history = ChromaHistory(tmp_path / "chroma")
    for user in ("alice", "bob"):
        history.add(user, rows_of(user))
    source = open_source(tmp_path / "chroma")
    assert sorted(source.users()) == ["alice", "bob"]
    assert len(source.read("bob").items) == 12


def test_nothing_to_read_is_an_error_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(tmp_path / "missing")
    with pytest.raises(InputError, match="one file a user"):
        open_source(tmp_path)


def test_users_without_a_history_are_problems(histories: Path) -> None:
    source = Only(open_source(histories), ["bob", "dave"], "2 users")
    assert source.users() == ["bob"]
    assert list(source.problems) == ["dave"]
