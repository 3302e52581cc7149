import json

import pytest
from cope_lc.output import Output

FACTS = {"user_id": "alice", "nll": float("nan")}


def test_a_program_gets_the_facts_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).show(FACTS, "alice is here")
    assert json.loads(capsys.readouterr().out) == {"user_id": "alice", "nll": None}


def test_people_get_a_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).show(FACTS, "alice is here")
    assert capsys.readouterr().out == "alice is here\n"


def test_people_get_what_a_function_prints(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).show(FACTS, lambda: print("a table"))
    assert capsys.readouterr().out == "a table\n"


def test_a_program_gets_nothing_but_json(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).show({}, lambda: print("a table"))
    assert capsys.readouterr().out == "{}\n"
