"""The ledger outlives a crash at any byte, and tells one fleet from the next."""

from pathlib import Path

import pytest

from langchain_cope.errors import InputError
from langchain_cope.fleet.ledger import Ledger
from langchain_cope.fleet.tasks import Outcome, State


def test_a_ledger_cut_at_any_byte_opens_and_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    with Ledger(whole) as ledger:
        ledger.begin("a", 3)
        assert ledger.settle("a", Outcome(State.CANDIDATE, version="v"))
        ledger.begin("b", 0)
    data = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        with Ledger(cut) as ledger:
            ledger.begin("c", 1)
        with Ledger(cut) as ledger:
            assert ledger.data_seq("c") == 1
            is_settled = data[:end].count(b"\n") >= 2
            assert (ledger.outcome("a") is not None) == is_settled


def test_two_failures_settle_a_user_and_a_wait_none(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert not ledger.settle("a", Outcome(State.UNAVAILABLE))
        assert not ledger.settle("a", Outcome(State.STOPPED))
        assert not ledger.settle("a", Outcome(State.FAILED, "first"))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.settle("a", Outcome(State.FAILED, "second"))
        assert ledger.outcome("a") == Outcome(State.FAILED, "second")


def test_a_finished_fleet_leaves_only_what_was_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.begin("a", 1)
        ledger.settle("a", Outcome(State.REFUSED, key="k"))
        ledger.begin("b", 1)
        ledger.settle("b", Outcome(State.FAILED))
        ledger.finish()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.known("a") == {"k"}
        assert ledger.outcome("a") is ledger.data_seq("a") is None
        assert not ledger.settle("b", Outcome(State.FAILED))


def test_a_line_that_a_full_disk_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system limits no file's size")
    file = tmp_path / "ledger.jsonl"
    with Ledger(file) as ledger:
        ledger.begin("a", 1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
        try:
            with pytest.raises(OSError, match="No space left"):
                ledger.settle("a", Outcome(State.REFUSED))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert ledger.outcome("a") is None
        ledger.begin("b", 2)
    with Ledger(file) as ledger:
        assert (ledger.data_seq("a"), ledger.data_seq("b")) == (1, 2)


def test_users_of_another_fleet_are_not_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    settings = {"model": "a", "store": "s3://key:secret@bucket"}
    with Ledger(file) as ledger:
        ledger.start(settings)
        ledger.start({**settings, "model": "b"})  # nobody is done yet
        ledger.settle("a", Outcome(State.CANDIDATE))
    with Ledger(file) as ledger:
        with pytest.raises(InputError, match="unfinished fleet with another model: finish"):
            ledger.start(settings)
        ledger.start({**settings, "model": "b"})
        ledger.finish()
        ledger.start(settings)
    assert "secret" not in file.read_text()


def test_another_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text('{"event": "begun", "user": "a", "data_seq": 1}\n{"prompt": "…"}\n')
    with pytest.raises(InputError, match="jsonl:2: not a line of a fleet's ledger"):
        Ledger(file)
