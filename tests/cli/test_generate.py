import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapter_store import AdapterStore
from langchain_cope.engine import Contrast


@pytest.fixture
def generate(cope_lc: Callable, tiny: Callable[..., Path]) -> Callable:
    """Asks the tiny Llama, with short answers."""
    return lambda *words, **options: cope_lc(
        "generate", *words, "--model", tiny(), "--max-tokens", 8, **options
    )


def test_a_user_and_the_base_answer_differently(generate: Callable, publish: Callable) -> None:
    publish("alice")
    base, alice = generate("Say something."), generate("Say something.", "--user", "alice")
    assert (base.code, alice.code) == (0, 0)
    assert base.stdout.endswith("\n")
    assert base.stdout != alice.stdout
    assert alice.stdout == generate("-", "--user", "alice", stdin="Say something.").stdout


def test_json_holds_the_answer_and_how_it_came_about(generate: Callable, publish: Callable) -> None:
    version = publish("alice", alpha=0.3, tau=0.2)
    facts = generate("Say something.", "--user", "alice", "--json", "--explain").json
    assert facts["text"].strip() == generate("Say something.", "--user", "alice").stdout.strip()
    assert facts["user_id"] == "alice"
    assert facts["adapter_version"] == version.version
    assert facts["adapter_digest"] == version.digest
    assert (facts["alpha"], facts["tau"]) == (0.3, 0.2)
    assert 0 <= facts["contrast_changed"] <= 1
    assert facts["usage"]["output_tokens"] == 8
    for token in facts["logprobs"]:
        assert token["reward"] == pytest.approx(token["log_p_user"] - 0.3 * token["log_p_base"])
    chosen = ("--user", "alice", "--alpha", 0, "--tau", 0.5)
    facts = generate("Say something.", *chosen, "--json").json
    assert (facts["alpha"], facts["tau"]) == (0, 0.5)


def test_a_named_version_answers_rather_than_the_active_one(
    generate: Callable, publish: Callable
) -> None:
    first, second = publish("alice"), publish("alice", seed=2)
    for version in (first, second):
        facts = generate("Hi", "--user", "alice", "--version", version.version, "--json").json
        assert facts["adapter_version"] == version.version


def test_sampling_is_repeatable_with_a_seed(generate: Callable) -> None:
    def answer(seed: int) -> str:
        return str(generate("Hi", "--temperature", 1.5, "--seed", seed).stdout)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_explain_shows_a_row_a_token(generate: Callable, publish: Callable) -> None:
    publish("alice")
    shown = generate("Say something.", "--user", "alice", "--explain")
    assert shown.code == 0
    table = shown.stdout.partition("log p user")[2]
    assert len([line for line in table.splitlines() if line.count(".") >= 4]) == 8
    assert "reward = log p user − α · log p base" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_explain_without_a_user_is_a_wrong_call(generate: Callable) -> None:
    outcome = generate("Say something.", "--explain")
    assert outcome.code == 2
    assert "--user" in outcome.error


@pytest.mark.parametrize(
    "words",
    [
        ["--alpha", "-0.1"],
        ["--alpha", "nan"],
        ["--alpha", "inf"],
        ["--tau", "0"],
        ["--tau", "1.01"],
        ["--tau", "nan"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--max-tokens", "0"],
        ["--seed", "-1"],
    ],
)
def test_an_option_out_of_range_is_refused_by_name(cope_lc: Callable, words: list[str]) -> None:
    for command in (["generate", "Hi"], ["chat"]):
        outcome = cope_lc(*command, *words)
        assert outcome.code == 2
        assert words[0] in outcome.error


@pytest.mark.parametrize(("name", "value"), [("alpha", -0.1), ("tau", 1.01)])
def test_the_contrast_is_checked_by_the_engine_s_own_rule(
    cope_lc: Callable, name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        Contrast(**{name: value})
    outcome = cope_lc("generate", "Hi", f"--{name}", value)
    assert f"Invalid value for '--{name}': {refused.value}" in outcome.error


def test_no_prompt_is_a_wrong_call(generate: Callable) -> None:
    for prompt, stdin in [("", ""), ("  ", ""), ("-", ""), ("-", b"\xff\xfe"), ("\udcff", "")]:
        outcome = generate(prompt, stdin=stdin)
        assert outcome.code == 2, prompt
        assert "PROMPT" in outcome.error


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(generate: Callable) -> None:
    outcome = generate("word " * 300)
    assert outcome.code == 2
    assert "the model's context holds 256" in outcome.error


def test_a_user_without_an_adapter_is_told_that_the_base_answers(generate: Callable) -> None:
    alone = generate("Hi", "--max-tokens", 8)
    outcome = generate("Hi", "--max-tokens", 8, "--user", "bob")
    assert (outcome.code, outcome.stdout) == (0, alone.stdout)
    assert "note: bob has no adapter yet: the base answered" in outcome.stderr


def test_a_version_that_is_not_there_is_an_error(generate: Callable, publish: Callable) -> None:
    publish("alice")
    outcome = generate("Hi", "--user", "alice", "--version", "20260131T235959Z-0123456789ab")
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.error.startswith("error: user ")


@pytest.mark.parametrize(
    ("user", "why"), [("", "empty"), ("x" * 10_000, "too long"), ("a\0b", "NUL")]
)
def test_an_impossible_user_id_is_refused(generate: Callable, user: str, why: str) -> None:
    outcome = generate("Hi", "--user", user)
    assert outcome.code == 2
    assert why in outcome.error
    assert len(outcome.error) < 300


def test_an_adapter_of_another_base_is_refused_by_what_differs(
    generate: Callable, publish: Callable, tiny: Callable[..., Path]
) -> None:
    publish("alice", family="qwen2")
    outcome = generate("Hi", "--user", "alice")
    assert outcome.code == 1
    assert "another base model" in outcome.error
    assert "weights" in outcome.error


def test_a_damaged_adapter_is_refused(
    generate: Callable, publish: Callable, store: AdapterStore
) -> None:
    weights = store.fetch_dir(publish("alice", seed=3)) / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    outcome = generate("Hi", "--user", "alice", "--json")
    assert outcome.code == 1
    assert "adapter_model.safetensors" in outcome.error
    assert outcome.stdout == ""


def test_an_unknown_model_or_device_is_a_wrong_call(cope_lc: Callable) -> None:
    for words in (["--model", "./nowhere"], ["--device", "abacus"], ["--dtype", "int3"]):
        outcome = cope_lc("generate", "Hi", *words)
        assert outcome.code == 2, outcome
        assert words[1] in outcome.error


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(
    cope_lc: Callable, publish: Callable, tiny: Callable[..., Path]
) -> None:
    publish("alice")
    wild: list[object] = ["--user", "alice", "--model", tiny(), "--max-tokens", 100]
    wild += ["--temperature", 100, "--tau", 0.0001, "--seed", 1]
    assert _controls(cope_lc("generate", "Hi", *wild, "--json").json["text"])
    for outcome in (
        cope_lc("generate", "Hi", *wild),
        cope_lc("generate", "Hi", *wild, "--explain"),
        cope_lc("chat", *wild, stdin="Hi\n"),
    ):
        assert outcome.code == 0, outcome
        assert not _controls(outcome.stdout)
        assert "\\x" in outcome.stdout


def _controls(text: str) -> list[str]:
    return [char for char in text if unicodedata.category(char) == "Cc" and char not in "\n\t"]


def test_a_base_without_a_chat_template_is_told_in_one_line(
    cope_lc: Callable, tiny: Callable[..., Path]
) -> None:
    outcome = cope_lc("generate", "Hi", "--model", tiny(template=None), "--max-tokens", 400)
    assert outcome.code == 0
    assert outcome.stderr.splitlines()[0].startswith("warning: ")
    assert "has no chat template" in outcome.stderr


def test_scale_and_contrast_are_options(generate: Callable, publish: Callable) -> None:
    publish("alice")
    chosen = ("--user", "alice", "--adapter-scale", 0.5)
    facts = generate("Say something.", *chosen, "--json").json
    assert (facts["adapter_scale"], facts["contrast"]) == (0.5, "adaptive")
    assert facts["mean_divergence"] > 0
    base = generate("Say something.")
    assert generate("Say something.", "--user", "alice", "--adapter-scale", 0).stdout == base.stdout
    assert generate("Say something.", "--adapter-scale", -1).code == 2


def test_on_a_prompt_unlike_the_history_the_base_answers_and_says_so(
    generate: Callable, publish: Callable, of_headlines: dict[str, Any]
) -> None:
    publish("alice", metadata=of_headlines)
    prompt = "Add 12 and 7."
    unlike = generate(prompt, "--user", "alice")
    assert unlike.stdout == generate(prompt).stdout
    assert "note: unlike the user's history, so the base answered" in unlike.stderr
    fixed = generate(prompt, "--user", "alice", "--contrast", "fixed")
    assert fixed.stdout != unlike.stdout
    for answer in (fixed, generate("A headline on mud", "--user", "alice")):
        assert "unlike" not in answer.stderr


def test_own_items_of_a_history_file_are_shown(
    generate: Callable, publish: Callable, tmp_path: Path
) -> None:
    publish("alice")
    file = tmp_path / "alice.jsonl"
    file.write_text(
        '{"prompt": "Which fox?", "completion": "Red."}\n{"prompt": "A", "completion": "B"}'
    )
    chosen = ("--user", "alice", "--history", file, "--json")
    with_items = generate("The fox?", "--retrieve", 2, *chosen).json
    without = generate("The fox?", *chosen).json
    assert (with_items["retrieved"], without["retrieved"]) == (1, 0)
    assert with_items["text"] != without["text"]
    missing = generate("The fox?", "--user", "alice", "--retrieve", 2)
    assert missing.code == 2
    assert "--history" in missing.error
