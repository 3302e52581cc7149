"""Options of an engine: the former name of `prefill_pause`, and the one form of refusals."""

import copy
import dataclasses
import inspect
import pickle

import pytest
from pydantic import TypeAdapter, ValidationError

from langchain_cope.engine import EngineOptions, check_option


def test_stall_is_taken_for_prefill_pause() -> None:
    options = EngineOptions(stall=0.3)  # type: ignore[call-arg]
    assert options.prefill_pause == options.stall == 0.3
    assert EngineOptions().stall == 0.1


def test_options_by_either_name_are_equal_and_look_the_same() -> None:
    former, present = EngineOptions(stall=0.3), EngineOptions(prefill_pause=0.3)  # type: ignore[call-arg]
    assert former == present
    assert hash(former) == hash(present)
    assert repr(former) == repr(present)
    assert "prefill_pause=0.3" in repr(former)
    assert "stall" not in repr(former)


def test_only_prefill_pause_is_a_field() -> None:
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    assert "prefill_pause" in names
    assert "stall" not in names
    assert list(inspect.signature(EngineOptions).parameters) == names


def test_copies_keep_a_pause_given_as_stall() -> None:
    options = EngineOptions(stall=0.3)  # type: ignore[call-arg]
    assert dataclasses.replace(options, max_rows=8) == EngineOptions(8, prefill_pause=0.3)
    assert dataclasses.replace(options, prefill_pause=0.5).stall == 0.5
    assert copy.deepcopy(options) == pickle.loads(pickle.dumps(options)) == options


def test_stall_wins_where_both_names_are_given() -> None:
    both = EngineOptions(stall=0.3, prefill_pause=0.2)  # type: ignore[call-arg]
    assert both.prefill_pause == 0.3
    assert dataclasses.replace(EngineOptions(), stall=0.3) == both  # type: ignore[call-arg]


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="max_row"):
        EngineOptions(max_row=8)  # type: ignore[call-arg]


def test_a_mapping_may_have_either_name() -> None:
    read = TypeAdapter(EngineOptions).validate_python
    assert read({"stall": 0.3}) == read({"prefill_pause": 0.3}) == EngineOptions(prefill_pause=0.3)
    with pytest.raises(ValidationError, match="prefill_pause must be seconds > 0"):
        read({"stall": 0})


def test_a_refusal_names_option_value_and_expectation() -> None:
    check_option("size", 3, "an integer ≥ 1", True)
    with pytest.raises(ValueError, match=r"^size must be an integer ≥ 1, not 0$"):
        check_option("size", 0, "an integer ≥ 1", False)
    with pytest.raises(ValueError, match=r"^size must be an integer ≥ 1, not 0: give more$"):
        check_option("size", 0, "an integer ≥ 1", False, hint="give more")
