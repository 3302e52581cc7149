import json
from collections.abc import Callable
from pathlib import Path

import pytest


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
    assert {"base", "sft", "dpo", "cope"} <= {row[0] for row in rows if row}
    assert "mean of 2 users" in outcome.stdout
    assert "nothing was published" in outcome.stdout
    assert "[1/2] alice: SFT: started\n" in outcome.stderr
    assert "[2/2] bob [red]\\x1b[2J: NLL " in outcome.stderr
    assert outcome.stdout.count("note: 2 users: the items have no created_at") == 1
    assert not store_folder.exists()


def test_json_holds_every_figure(evaluate: Callable, history: Callable[..., Path]) -> None:
    facts = evaluate(history([user_row("alice"), user_row("bob")]), "--json").json
    assert [user["user_id"] for user in facts["users"]] == ["alice", "bob"]
    for user in facts["users"]:
        assert (user["num_trained"], user["num_queries"]) == (6, 2)
        nll = {way: user["metrics"][way]["nll"] for way in ("base", "sft", "dpo")}
        assert user["nll_change"]["sft"] == pytest.approx(nll["sft"] / nll["base"] - 1)
    means = [
        sum(user["metrics"][way]["nll"] for user in facts["users"]) / 2 for way in ("base", "dpo")
    ]
    assert facts["mean"]["base"]["nll"] == pytest.approx(means[0])
    assert facts["nll_change"]["dpo"] == pytest.approx(means[1] / means[0] - 1)
    assert facts["users_better"]["sft"] in (0, 1, 2)


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
