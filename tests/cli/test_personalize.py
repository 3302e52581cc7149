import contextlib
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store import AdapterStore

PROGRESS = re.compile(
    r"(history|base model|SFT|negatives|DPO|evaluation|strength|gate): "
    r"(started|done in .*|\d+ of \d+.*)"
)
AsNobody = Callable[..., contextlib.AbstractContextManager[Path]]


def started_stages(stderr: str) -> list[str]:
    lines = [line for line in stderr.splitlines() if line.endswith(": started")]
    return [line.partition(":")[0] for line in lines]


@pytest.fixture
def personalize(cope_lc: Callable, tiny: Callable[..., Path]) -> Callable:
    """Personalizes on the tiny Llama."""
    return lambda file, *words, **options: cope_lc(
        "personalize", file, "--model", tiny(), *words, **options
    )


def test_a_history_is_learnt_published_and_shown(
    personalize: Callable, history: Callable[..., Path], store: AdapterStore, cope_lc: Callable
) -> None:
    outcome = personalize(history(), "--user", "alice", "--always")
    assert outcome.code == 0, outcome.stderr
    version = store.resolve("alice")
    text = outcome.stdout
    assert text.startswith("alice: 8 items, 6 to train on, the newest 2 held out to judge by\n")
    assert f"published {version.version} for alice" in text
    assert "Say number 0." in text
    for row in ("base", "sft", "dpo", "cope"):
        assert re.search(rf"^{row} ", text, re.MULTILINE), row
    learnt, voices = text.split("{+…+}: words that the base did not write")
    assert learnt.count("the user wrote") == 3
    for number in (6, 7):
        answers = rf"prompt +… {number}\. *\nthe user wrote +It is {number}, friend\. *\nbase .*"
        assert re.search(rf"^{answers}\npersonalized +\S", voices, re.MULTILINE | re.DOTALL)
    [base] = re.findall(r"next: cope-lc chat --user alice --model (\S+)\n$", text)
    assert cope_lc("chat", "--user", "alice", "--model", base, stdin="").code == 0
    stages = started_stages(outcome.stderr)
    assert stages == [
        "history",
        "base model",
        "SFT",
        "negatives",
        "DPO",
        "evaluation",
        "strength",
        "gate",
    ]
    assert all(stage in text.partition("time: ")[2] for stage in stages)


def test_a_process_prints_one_json_object_and_no_noise_of_libraries(
    process: Callable, history: Callable[..., Path], tiny: Callable[..., Path], store: AdapterStore
) -> None:
    items = [{"prompt": f"p{n}", "completion": f"c{n} ü"} for n in range(6)]
    rows = [{"user_id": "alice", "history": items}]
    run = process("personalize", history(rows), "--model", tiny(), "--always", "--json")
    printed, said = run.communicate(timeout=100)
    assert run.returncode == 0, said
    assert not [line for line in said.splitlines() if not PROGRESS.fullmatch(line)]
    facts = json.loads(printed)
    assert facts["user_id"] == "alice"
    assert facts["published"] is True
    assert facts["version"] == store.active("alice")
    assert facts["reason"]
    assert facts["metrics"].keys() == {"base", "sft", "dpo", "cope"}
    assert facts["metrics"]["cope"].keys() == {"rouge1", "rougeL"}
    assert {"sft", "negatives", "dpo", "evaluate"} <= facts["timings"].keys()
    assert facts["num_held_out"] == 2
    assert [sample["reference"] for sample in facts["samples"]] == ["c4 ü", "c5 ü"]


def test_a_refusal_of_the_gate_is_no_error(
    personalize: Callable, history: Callable[..., Path], store: AdapterStore
) -> None:
    before = personalize(history(), "--user", "alice", "--always", "--json").json
    # Same seed, same adapter: no better than what is active.
    outcome = personalize(history(), "--user", "alice")
    assert outcome.code == 0, outcome.stderr
    assert "not published: alice keeps what is active" in outcome.stdout
    assert f"likelier with it than with the active version {before['version']}" in outcome.stdout
    assert "what would help: more texts" in outcome.stdout
    assert outcome.stdout.count("\npersonalized ") == 2  # both voices are shown all the same
    assert "--always" in outcome.stdout.splitlines()[-1]
    assert store.active("alice") == before["version"]


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (RuntimeError("the disk burnt"), "(--job-dir) goes on after that"),
        (KeyboardInterrupt(), "stopped; nothing was published; what was finished is kept in"),
    ],
    ids=["an error", "Ctrl-C"],
)
def test_the_same_command_goes_on_from_its_job_folder(
    personalize: Callable,
    history: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
    said: str,
) -> None:
    def broken(*_: object) -> None:
        raise end

    words = ("--user", "alice", "--always", "--paper", "--job-dir", tmp_path / "jobs")
    with monkeypatch.context() as patch:
        patch.setattr("langchain_cope.training.dpo.train_dpo", broken)
        outcome = personalize(history(), *words)
    assert outcome.code == 1
    assert said in outcome.stderr
    outcome = personalize(history(), *words)
    assert outcome.code == 0, outcome.stderr
    stages = started_stages(outcome.stderr)
    assert stages == ["history", "base model", "DPO", "evaluation", "strength", "gate"]
    assert "note: done before and not run again: sft, negatives" in outcome.stdout
    assert list((tmp_path / "jobs").iterdir()) == []


def test_seed_and_paper_choose_the_recipe(
    personalize: Callable, history: Callable[..., Path]
) -> None:
    words = ("--user", "alice", "--always", "--json", "--seed", "3")
    scaled = personalize(history(), *words).json["recipe"]
    paper = personalize(history(), *words, "--paper").json["recipe"]
    assert (scaled["seed"], scaled["sft"]["learning_rate"]) == (3, 1.5e-3)
    assert (paper["seed"], paper["sft"]["learning_rate"]) == (3, 1e-4)


def test_several_files_and_standard_input_are_one_history(
    cope_lc: Callable, tmp_path: Path, store_folder: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "created_at": 2020}\n' * 2)
    (tmp_path / "b.txt").write_text("b\nc\n")
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    words = ["--user", "alice", "--dry-run", "--json"]
    outcome = cope_lc("personalize", *files, "-", *words, stdin="d\ne\n")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["num_items"] == 5
    assert [sample["completion"] for sample in outcome.json["samples"]] == ["a", "b", "c"]
    (tmp_path / "chat.txt").write_text("12/24/23, 9:01 PM - Ann: hello\n")
    refused = cope_lc("personalize", *files, tmp_path / "chat.txt", *words)
    assert refused.code == 2
    assert "chat.txt: looks like an exported chat" in refused.error


def test_dry_run_needs_no_model_and_touches_no_store(
    cope_lc: Callable, history: Callable[..., Path], store_folder: Path
) -> None:
    words = ["personalize", history(), "--user", "alice", "--model", "no-such-model", "--dry-run"]
    outcome = cope_lc(*words)
    assert outcome.code == 0
    assert outcome.stderr == ""
    assert "8 items, 6 to train on" in outcome.stdout
    assert outcome.stdout.count("the user wrote") == 3
    assert "nothing was trained or published" in outcome.stdout
    facts = cope_lc(*words, "--json").json
    assert (facts["num_items"], facts["num_trained"], facts["num_held_out"]) == (8, 6, 2)
    assert not store_folder.exists()


def test_preview_names_the_format_the_target_and_the_pairs_with_samples(
    cope_lc: Callable, history: Callable[..., Path], store_folder: Path
) -> None:
    pairs = [
        {"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"{n}!"} for n in range(6)
    ]
    file = history(pairs)
    words = ["personalize", file, "--user", "alice", "--model", "no-such-model", "--preview"]
    outcome = cope_lc(*words)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "found: chosen and rejected (6 rows); 6 preference pairs for DPO\n" in outcome.stdout
    assert re.search(r"the user wrote +It is 0\. *\nrejected +0! *\n", outcome.stdout)
    facts = cope_lc(*words, "--json").json
    assert facts["formats"] == {"chosen and rejected": 6}
    assert (facts["target"], facts["num_pairs"]) == (None, 6)
    assert facts["samples"][0]["rejected"] == ["0!"]
    turns = [
        {"type": "human", "content": "Well, hello."},
        {"type": "ai", "content": "How may I help?"},
    ]
    chats = [
        {"messages": [{**turns[0], "content": f"Well, hello {n}."}, turns[1]]} for n in range(6)
    ]
    outcome = cope_lc("personalize", history(chats), "--user", "alice", "--preview")
    assert "found: LangChain messages (6 rows); learnt are the user's turns\n" in outcome.stdout
    assert "note: the user's turns are learnt, as is usual for LangChain messages" in outcome.stdout
    assert outcome.stdout.endswith(
        "nothing was trained or published; leave out --preview to do so\n"
    )
    assert not store_folder.exists()


def test_pairs_are_trained_on_and_published(
    personalize: Callable, history: Callable[..., Path], store: AdapterStore
) -> None:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"Say {n}."}]},
            "preferred_output": [{"role": "assistant", "content": f"It is {n}, friend."}],
            "non_preferred_output": [{"role": "assistant", "content": f"{n}!"}],
        }
        for n in range(6)
    ]
    outcome = personalize(history(rows), "--user", "alice", "--always")
    assert outcome.code == 0, outcome.stderr
    assert store.active("alice")
    assert "note: 4 pairs of a chosen and a rejected answer were given" in outcome.stdout


def test_the_target_decides_whose_turns_are_learnt(
    cope_lc: Callable, history: Callable[..., Path]
) -> None:
    turns = [
        {"role": "user", "content": "Well, hello."},
        {"role": "assistant", "content": "How may I help?"},
    ]
    rows = [
        {"messages": [{**turns[0], "content": f"Well, hello {n}."}, turns[1]]} for n in range(6)
    ]
    file = history(rows)
    for target, said in [("assistant", "How may I help?"), ("user", "Well, hello 0.")]:
        words = ("--target", target, "--dry-run", "--json")
        facts = cope_lc("personalize", file, "--user", "a", *words).json
        assert facts["samples"][0]["completion"] == said


def test_a_fixed_instruction_is_kept_in_the_version(
    personalize: Callable, tmp_path: Path, store: AdapterStore
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"Text number {n}, friend.\n" for n in range(6)))
    words = ("--instruction", "Write on.", "--always", "--json")
    assert personalize(file, "--user", "a", *words).code == 0
    assert store.resolve("a").metadata["instruction"] == "Write on."
    assert personalize(file, "--user", "b", "--always", "--json").code == 0
    assert store.resolve("b").metadata["instruction"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "the file is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "user.jsonl:2: broken JSON"),
        ('{"prompt": "a", "completion": "b"}\n[1]\n', "user.jsonl:2: expected an object"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}\n', "user.jsonl:2: "),
        ('{"prompt": "a", "completion": "  "}\n', "user.jsonl:1: completion is blank"),
        ('{"messages": [{"role": "user", "content": "hi"}]}\n', "user.jsonl:1: no assistant turn"),
        (b"\xff\xfea\x00", "not UTF-8"),
        ('{"prompt": "a", "completion": "b"}\n' * 9, "at least 5 are needed"),
        (
            "".join(f'{{"prompt": "a", "completion": "b{n}"}}\n' for n in range(4)),
            "at least 5 are needed",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_its_place(
    cope_lc: Callable, tmp_path: Path, store_folder: Path, content: str | bytes | None, said: str
) -> None:
    file = tmp_path / "user.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for extra in ([], ["--dry-run"], ["--json"]):
        outcome = cope_lc("personalize", file, "--user", "alice", *extra)
        assert outcome.code == 2
        assert said in outcome.error
        assert outcome.stdout == ""
    assert not store_folder.exists()


def test_a_file_that_names_no_user_or_several_needs_user(
    cope_lc: Callable, history: Callable[..., Path]
) -> None:
    for rows in (8, [{"user_id": name, "prompt": "p", "completion": "c"} for name in "ab"]):
        outcome = cope_lc("personalize", history(rows))
        assert outcome.code == 2
        assert "--user" in outcome.error


@pytest.mark.parametrize(
    ("user", "why"), [("", "empty"), ("x" * 10_000, "too long"), ("a\0b", "NUL")]
)
def test_an_impossible_user_id_is_refused_before_training(
    personalize: Callable, history: Callable[..., Path], user: str, why: str
) -> None:
    outcome = personalize(history(), "--user", user)
    assert outcome.code == 2
    assert why in outcome.stderr.splitlines()[-1]
    assert "SFT" not in outcome.stderr


@pytest.mark.parametrize("user", ["../x 🙂", "\x1b]0;title\x07[bold]"])
def test_hostile_ids_and_texts_are_learnt_but_not_printed(
    personalize: Callable, history: Callable[..., Path], store: AdapterStore, user: str
) -> None:
    rows = [
        {"prompt": f"\x1b[31m[red]{n}", "completion": f"\x1b[2J\x9b{n} [/red]"} for n in range(6)
    ]
    outcome = personalize(history(rows), "--user", user, "--always")
    assert outcome.code == 0, outcome.stderr
    assert store.active(user)
    assert not set("\x1b\x07\x9b") & set(outcome.stdout + outcome.stderr)
    assert "\\x1b[31m[red]0" in outcome.stdout


def test_an_unknown_model_is_a_wrong_call(cope_lc: Callable, history: Callable[..., Path]) -> None:
    for model in ("nobody/no-such-model", "./no/such/folder"):
        outcome = cope_lc("personalize", history(), "--user", "alice", "--model", model, "--json")
        assert outcome.code == 2
        assert model in outcome.stderr.splitlines()[-1]
        assert "Traceback" not in outcome.stderr


def test_an_item_longer_than_the_context_is_cut_and_that_is_said(
    personalize: Callable, history: Callable[..., Path]
) -> None:
    rows = [
        {"prompt": f"{n} " + "word " * 400, "completion": f"It is {n}, friend."} for n in range(6)
    ]
    outcome = personalize(history(rows), "--user", "alice", "--always")
    assert outcome.code == 0, outcome.stderr
    assert re.search(r"^note: .*cut", outcome.stdout, re.MULTILINE)


def test_a_store_that_cannot_be_written_is_found_before_training(
    personalize: Callable,
    history: Callable[..., Path],
    tiny: Callable[..., Path],
    read_only: AsNobody,
) -> None:
    file, _ = history(), tiny()
    with read_only(file) as folder:
        outcome = personalize(folder / file.name, "--user", "alice", "--store", folder / "store")
    assert outcome.code == 1
    assert "permission denied" in outcome.stderr.splitlines()[-1]
    assert "SFT" not in outcome.stderr


def test_ctrl_c_in_the_middle_publishes_nothing_and_leaves_nothing(
    process: Callable,
    history: Callable[..., Path],
    tiny: Callable[..., Path],
    store: AdapterStore,
    tmp_path: Path,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ["personalize", history(600), "--user", "alice", "--model", tiny(), "--json"]
    run = process(*words, env={"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"})
    said: list[str] = []
    for line in run.stderr:
        said.append(line)
        if line == "SFT: started\n":
            assert list(scratch.glob("cope-*"))
            run.send_signal(signal.SIGINT)
    assert run.wait(60) == 1
    assert said[-1] == "stopped; nothing was published\n"
    assert not [line for line in said[:-1] if not PROGRESS.fullmatch(line.rstrip("\n"))]
    assert run.stdout.read() == ""
    assert list(scratch.iterdir()) == []
    assert store.versions("alice") == []
    run.stdout.close()
    run.stderr.close()
