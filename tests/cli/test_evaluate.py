import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

HOSTILE = "<script>alert(1)</script>"


def user_row(name: str, num_items: int = 6, num_queries: int = 2) -> dict:
    items = [
        {"prompt": f"Say {n}.", "completion": f"{name} says {n}, friend."}
        for n in range(num_items + num_queries)
    ]
    return {"user_id": name, "history": items[:num_items], "queries": items[num_items:]}


@pytest.fixture
def evaluate(cope_lc: Callable, tiny: Callable[..., Path]) -> Callable:
    """Evaluates on the tiny Llama."""
    return lambda file, *words: cope_lc("evaluate", file, "--model", tiny(), *words)


def test_users_are_compared_side_by_side_and_nothing_is_published(
    evaluate: Callable, history: Callable[..., Path], store_folder: Path
) -> None:
    file = history([user_row("alice"), user_row("bob [red]\x1b[2J"), user_row("carol")])
    outcome = evaluate(file, "--limit", 2)
    assert outcome.code == 0, outcome.stderr
    assert "\x1b" not in outcome.stdout + outcome.stderr
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert [row[0] for row in rows[2:4]] == ["alice", "bob"]
    assert {"base", "base+retrieved", "sft", "dpo", "cope"} <= {row[0] for row in rows if row}
    assert "mean of 2 users" in outcome.stdout
    assert "against base" in outcome.stdout
    assert "note: no style score: 0 users have" in outcome.stdout
    assert "nothing was published" in outcome.stdout
    assert "[1/2] alice: SFT: started\n" in outcome.stderr
    assert "left for the others\n" in outcome.stderr
    assert "[2/2] bob [red]\\x1b[2J: NLL " in outcome.stderr
    assert outcome.stdout.count("note: 2 users: the items have no created_at") == 1
    assert not store_folder.exists()


def test_json_holds_every_figure(evaluate: Callable, history: Callable[..., Path]) -> None:
    names = ["alice", "bob", "carol"]
    facts = evaluate(history([user_row(name) for name in names]), "--json").json
    assert [user["user_id"] for user in facts["users"]] == names
    for user in facts["users"]:
        assert (user["num_trained"], user["num_queries"]) == (6, 2)
        nll = {way: user["metrics"][way]["nll"] for way in ("base", "sft", "dpo")}
        assert user["nll_change"]["sft"] == pytest.approx(nll["sft"] / nll["base"] - 1)
    means = [
        sum(user["metrics"][way]["nll"] for user in facts["users"]) / 3 for way in ("base", "dpo")
    ]
    assert facts["mean"]["base"]["nll"] == pytest.approx(means[0])
    assert facts["nll_change"]["dpo"] == pytest.approx(means[1] / means[0] - 1)
    assert facts["users_better"]["sft"] in (0, 1, 2, 3)
    low, high = facts["intervals"]["base"]["nll"]
    assert low <= means[0] <= high
    assert facts["differences"]["base"]["dpo"]["nll"]["value"] == pytest.approx(means[1] - means[0])


def test_chosen_ways_go_on_in_a_job_folder(
    evaluate: Callable, history: Callable[..., Path], tmp_path: Path
) -> None:
    file, jobs = history([user_row("alice")]), tmp_path / "jobs"
    first = evaluate(file, "--ways", "base,sft", "--job-dir", jobs, "--json")
    assert first.json["ways"] == ["base", "sft"]
    assert "SFT: started" in first.stderr
    assert "DPO" not in first.stderr
    again = evaluate(file, "--ways", "base,sft,sft+contrast", "--job-dir", jobs, "--json")
    assert again.json["ways"] == ["base", "sft", "sft+contrast"]
    assert "SFT: started" not in again.stderr
    assert again.json["mean"]["sft"] == first.json["mean"]["sft"]


def test_without_scikit_learn_the_plain_figures_stand(
    evaluate: Callable, history: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    file = history([user_row("alice"), user_row("bob")])
    facts = evaluate(file, "--json").json
    assert facts["ways"] == ["base", "base+retrieved", "sft", "dpo", "cope"]
    assert facts["intervals"]["base"]["nll"] is None
    assert not facts["differences"]
    assert [note for note in facts["notes"] if "scikit-learn" in note]


def test_json_holds_the_grid_and_the_matrix(
    evaluate: Callable, history: Callable[..., Path], tmp_path: Path
) -> None:
    words = (history([user_row("alice"), user_row("bob")]), "--ways", "sft", "--job-dir", tmp_path)
    facts = evaluate(*words, "--grid", "--matrix", "--json").json
    assert len(facts["grid"]) == 13
    assert facts["grid"][0]["figures"]["rougeL"]["num_users"] == 2
    assert 0 <= facts["matrix"]["top1"]["value"] <= 1
    plain = evaluate(*words, "--json").json
    assert (plain["grid"], plain["matrix"]) == ([], None)


def test_views_that_would_be_empty_are_refused_before_training(
    evaluate: Callable, history: Callable[..., Path]
) -> None:
    file = history([user_row("alice")])
    outcome = evaluate(file, "--ways", "base", "--grid")
    assert (outcome.code, "no way has an adapter" in outcome.stderr) == (2, True)
    assert "SFT" not in outcome.stderr
    outcome = evaluate(file, "--matrix")
    assert (outcome.code, "two users or more" in outcome.stderr) == (2, True)


def test_a_report_that_cannot_be_written_is_refused_before_training(
    evaluate: Callable, history: Callable[..., Path], tmp_path: Path
) -> None:
    file = history([user_row("alice")])
    for report, told in ((tmp_path, "is a folder"), (tmp_path / "no" / "it.html", "no folder")):
        outcome = evaluate(file, "--report", report)
        assert (outcome.code, told in outcome.error) == (2, True)
        assert "SFT" not in outcome.stderr


def test_figures_are_shown_before_the_report_is_written(
    evaluate: Callable, history: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = evaluate(history([user_row("alice")]), "--ways", "base", "--report", "/dev/full")
    assert outcome.code == 1
    assert "mean of 1 user" in outcome.stdout


def test_a_way_that_is_not_there_is_refused(
    evaluate: Callable, history: Callable[..., Path]
) -> None:
    outcome = evaluate(history([user_row("alice")]), "--ways", "base,best")
    assert outcome.code == 2
    assert "there is no way 'best': name some of base, " in outcome.error


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_page_in_which_texts_are_text(
    evaluate: Callable, history: Callable[..., Path], tmp_path: Path
) -> None:
    row = user_row("alice")
    row["queries"][1] = {"prompt": HOSTILE, "completion": f"{HOSTILE} she wrote"}
    page_file = tmp_path / "report.html"
    words = ("--report", page_file, "--ways", "base,cope", "--grid", "--matrix")
    outcome = evaluate(history([row, user_row(HOSTILE, 9)]), *words)
    assert outcome.code == 0, outcome.stderr
    assert "a user's own adapter is the likeliest of all 2 on" in outcome.stdout
    page = page_file.read_text(encoding="utf-8")
    tags = Tags(page)
    assert {"table", "svg", "circle", "details"} <= set(tags.names)
    assert "script" not in tags.names
    assert not tags.addresses
    assert "&lt;script&gt;alert(1)&lt;/script&gt; she wrote" in page
    assert ' nats">' in page
    assert page.count('class="heat"') == 13  # settings of α and τ
    assert "Gain of cope over base" in page
    assert "of the users (chance 50%)" in page


def test_users_are_compared_on_a_task_adapter(
    cope_lc: Callable,
    evaluate: Callable,
    history: Callable[..., Path],
    tmp_path: Path,
    tiny: Callable[..., Path],
) -> None:
    rows = [user_row("alice", 10), user_row("bob", 10)]
    file = history([{**row, "shareable": True} for row in rows])
    trained = cope_lc(
        "task-adapter", file, "--model", tiny(), "--out", tmp_path / "task", "--always", "--json"
    )
    assert trained.code == 0, trained.stderr
    assert trained.json["num_users"] == 2
    assert "SFT: done in" in trained.stderr
    leaking = [{**row, "queries": row["history"][:2]} for row in rows]
    outcome = evaluate(
        history(leaking), "--task-adapter", tmp_path / "task", "--ways", "base,task", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    mean = outcome.json["mean"]
    assert mean["task"]["nll"] != mean["base"]["nll"]
    (note,) = [note for note in outcome.json["notes"] if "task adapter" in note]
    assert "was trained on 4 of the 4 queries" in note


def test_users_who_did_not_agree_make_no_task_adapter(
    cope_lc: Callable, history: Callable[..., Path], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    file = history([user_row("alice"), user_row("bob")])
    outcome = cope_lc("task-adapter", file, "--model", tiny(), "--out", tmp_path / "task")
    assert outcome.code == 2
    assert "0 of 2 users can be used" in outcome.error
    assert not (tmp_path / "task").exists()


def test_a_user_who_cannot_be_judged_is_found_before_the_first_training(
    evaluate: Callable, history: Callable[..., Path]
) -> None:
    outcome = evaluate(history([user_row("alice"), user_row("bob", num_queries=0)]))
    assert outcome.code == 2
    assert "user 2 ('bob') has 6 items to train on and 0 queries" in outcome.error


def test_a_broken_line_is_named(evaluate: Callable, tmp_path: Path) -> None:
    file = tmp_path / "users.jsonl"
    file.write_text(json.dumps(user_row("alice")) + "\n{broken\n")
    outcome = evaluate(file)
    assert outcome.code == 2
    assert "users.jsonl:2: broken JSON" in outcome.error


LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"
)
SOLAR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### User:\n{{ m['content'] }}\n\n"
    "{% else %}### Assistant:\n{{ m['content'] }}<|im_end|>\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


@pytest.mark.parametrize(
    ("family", "changes"),
    [  # their shapes, and how they write turns
        ("llama", {"template": LLAMA_2, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
        ("mistral", {"template": LLAMA_2, "sliding_window": None, "rope_theta": 1e6}),
        ("llama", {"template": SOLAR, "num_hidden_layers": 4, "rms_norm_eps": 1e-5}),
    ],
    ids=["Llama-2", "Mistral", "Solar"],
)
def test_the_papers_recipe_runs_on_its_families_and_files(
    cope_lc: Callable,
    history: Callable[..., Path],
    tiny: Callable[..., Path],
    tmp_path: Path,
    family: str,
    changes: dict,
) -> None:
    model = tiny(family, context=512, **changes)
    question = "Generate a headline for the following article: "
    lines = [
        {
            "user_id": name,
            "shareable": True,
            "profile": [
                {"id": n, "text": f"News {n}.", "title": f"{name} on {n}"} for n in range(6)
            ],
            "query": [{"input": f"{question}News {n}.", "gold": f"{name} on {n}"} for n in (6, 7)],
        }
        for name in ("7", "8")
    ]
    file, task = history(lines), tmp_path / "task"
    words = ("--model", model, "--device", "cpu", "--dtype", "float32")
    made = cope_lc("task-adapter", file, *words, "--out", task, "--always", "--json")
    assert made.code == 0, made.stderr
    outcome = cope_lc("evaluate", file, *words, "--task-adapter", task, "--paper", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["ways"] == ["base", "base+retrieved", "task", "sft", "dpo", "cope"]
    assert [user["num_trained"] for user in outcome.json["users"]] == [6, 6]
    assert outcome.json["mean"]["cope"].keys() >= {"rouge1", "rougeL"}
