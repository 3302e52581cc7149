"""Ways compared over users on tiny bases: really trained, resumed, and told apart."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from personal import QUICK
from training.tiny import Heard

from langchain_cope.engine import WEIGHTS, Engine, Request, load_base
from langchain_cope.errors import Cancelled, HistoryError, InputError
from langchain_cope.evaluation import shown_items
from langchain_cope.evaluation.adapter_matrix import score_adapters
from langchain_cope.evaluation.grid import SETTINGS, answer_grid, measure_grid
from langchain_cope.evaluation.measures import measure
from langchain_cope.evaluation.shown_items import NUM_RETRIEVED, OwnItems, Question
from langchain_cope.evaluation.user_job import RESULTS
from langchain_cope.evaluation.users import Comparison, _best
from langchain_cope.evaluation.voice import VoiceScale
from langchain_cope.evaluation.ways import ALL_WAYS, QUICK_WAYS, Shown, ways_named
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.training.progress import Monitor

RECIPE = replace(QUICK, max_new_tokens=6)
WITHOUT_TASK = [way for way in ALL_WAYS if not way.needs_task]


def user(name: str, num_items: int = 5, num_queries: int = 2) -> UserHistory:
    items = [
        Item(
            prompt=f"Say {number} to {('cats', 'dogs')[number % 2]}.",
            completion=f"{name} says {number}, so there.",
        )
        for number in range(num_items + num_queries)
    ]
    return UserHistory(user_id=name, items=items[:num_items], queries=items[num_items:])


@pytest.fixture
def engine(tiny: Callable[..., Path]) -> Engine:
    return Engine.of(load_base(tiny("llama", initializer_range=0.05), device="cpu"))


def test_adapters_that_are_the_same_answer_once(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Request] = []
    generate_each = engine.generate_each

    def overheard(requests: Iterable[Request], *args: object) -> object:
        asked.extend(requests)
        return generate_each(asked, *args)

    monkeypatch.setattr(engine, "generate_each", overheard)
    ways = ways_named(["sft", "dpo", "sft+contrast", "cope"])
    recipe = replace(RECIPE, negatives=None)
    comparison = Comparison(engine, [user("anna")], tmp_path, ways, recipe=recipe)
    comparison.run()
    assert len(asked) == 2 * 2  # with and without contrast, two queries
    (job,) = comparison.jobs
    sft, contrast, dpo, cope = (comparison.answers_of(job, way) for way in comparison.ways)
    assert (sft, contrast) == (dpo, cope)


def test_every_way_answers_every_query(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert")]
    comparison = Comparison(engine, users, tmp_path, WITHOUT_TASK, recipe=RECIPE)
    comparison.run()
    report = measure(comparison)
    names = {way.name for way in WITHOUT_TASK}
    for figures in report.users:
        assert figures.metrics.keys() == names
        assert len(figures.samples) == 2
        assert all(sample.answers.keys() == names for sample in figures.samples)
        with_nll = {name for name, metrics in figures.metrics.items() if "nll" in metrics}
        assert with_nll == {way.name for way in WITHOUT_TASK if way.has_nll}
        assert figures.metrics["dpo"]["nll"] < figures.metrics["base"]["nll"]
        assert figures.metrics["dpo"]["nll"] < figures.metrics["another-dpo"]["nll"]
    mean = report.means["sft"]["nll"]
    of_users = [figures.metrics["sft"]["nll"] for figures in report.users]
    assert mean.value == pytest.approx(sum(of_users) / 2)
    assert report.differences.keys() == {"base", "sft"}
    gain = report.differences["base"]["sft"]["nll"]
    base = report.means["base"]["nll"]
    assert gain.value == pytest.approx(mean.value - base.value)
    assert gain.num_above == 0
    shown = report.users[0].samples[0].answers["cope"]
    assert "".join(text for text, _ in shown.tokens).strip() == shown.text.strip()


def test_finished_work_is_not_done_again(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert")]
    ways = ways_named(["base", "sft"])
    first = Comparison(engine, users, tmp_path, ways, recipe=RECIPE)
    monitor = Heard()
    first.train(first.jobs[0], monitor)
    assert monitor.steps
    first.run()
    before = engine.statistics().tokens
    again, silent = Comparison(engine, users, tmp_path, ways, recipe=RECIPE), Heard()
    again.run(silent)
    assert not silent.steps
    assert engine.statistics().tokens == before
    assert measure(again) == measure(first)


def adapters_in(folder: Path) -> dict[Path, int]:
    """Return the adapters in the users' folders, and when each was written."""
    found = folder.glob("*/*/*/adapter_model.safetensors")
    return {file: file.stat().st_mtime_ns for file in found}


def test_another_history_is_trained_beside_the_first(engine: Engine, tmp_path: Path) -> None:
    ways = ways_named(["base", "sft"])
    first = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE)
    first.run()
    trained = adapters_in(tmp_path)
    assert len(trained) == 1
    longer = user("anna", num_items=6).model_copy(update={"queries": user("anna").queries})
    other = Comparison(engine, [longer], tmp_path, ways, recipe=RECIPE)
    assert not (other.jobs[0].folder / "sft").exists()
    other.run()
    assert trained.items() < adapters_in(tmp_path).items()
    assert len(other.jobs[0].answers) == 3  # the base's once
    again, silent = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE), Heard()
    again.run(silent)
    assert not silent.steps
    assert measure(again).means == measure(first).means


def test_other_queries_train_nothing_anew(engine: Engine, tmp_path: Path) -> None:
    ways, anna = ways_named(["sft", "dpo"]), user("anna", num_queries=4)
    Comparison(engine, [anna], tmp_path, ways, recipe=RECIPE).run()
    trained = adapters_in(tmp_path)
    fewer = anna.model_copy(update={"queries": anna.queries[:2]})
    comparison = Comparison(engine, [fewer], tmp_path, ways, recipe=replace(RECIPE, tau=0.3))
    comparison.run()
    assert adapters_in(tmp_path) == trained
    assert len(measure(comparison).users[0].samples) == 2


def test_a_recipe_with_another_dpo_keeps_sft_and_its_answers(
    engine: Engine, tmp_path: Path
) -> None:
    ways = ways_named(["base", "sft", "dpo"])
    first = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE)
    first.run()
    trained = adapters_in(tmp_path)
    recipe, monitor = replace(RECIPE, negatives=None), Monitor()
    comparison = Comparison(engine, [user("anna")], tmp_path, ways, recipe=recipe)
    for job in comparison.jobs:
        comparison.train(job, monitor)
    assert "sft" not in monitor.timings
    job, before = comparison.jobs[0], first.jobs[0]
    assert job.timings["sft"] == before.timings["sft"]
    weights, of_before = (each.folder / "sft" / WEIGHTS for each in (job, before))
    assert weights.read_bytes() == of_before.read_bytes()
    assert trained.items() < adapters_in(tmp_path).items()
    _, groups = comparison._plan(engine)[0]
    assert [[way.name for way in group] for group in groups] == [["dpo"]]


def test_damaged_results_are_named_and_trained_adapters_stay(
    engine: Engine, tmp_path: Path
) -> None:
    ways = ways_named(["sft"])
    Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE).run()
    (file,) = tmp_path.glob(f"*/{RESULTS}")
    file.write_text('{"format": 2')
    with pytest.raises(InputError, match=f"{RESULTS} is damaged .*: remove it"):
        Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE)
    file.unlink()
    again, silent = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE), Monitor()
    again.run(silent)
    assert "sft" not in silent.timings


def test_another_contrast_trains_nothing_anew(engine: Engine, tmp_path: Path) -> None:
    users, ways = [user("anna")], ways_named(["sft", "sft+contrast"])
    Comparison(engine, users, tmp_path, ways, recipe=RECIPE).run()
    trained = adapters_in(tmp_path)
    for alpha in (0.0, 0.9):
        other = Comparison(engine, users, tmp_path, ways, recipe=replace(RECIPE, alpha=alpha))
        other.run()
        assert adapters_in(tmp_path) == trained
    assert len(other.jobs[0].answers) == 4  # without contrast once, with each of the three


def test_a_stop_keeps_what_is_done(engine: Engine, tmp_path: Path) -> None:
    comparison = Comparison(engine, [user("anna")], tmp_path, ways_named(["sft"]), recipe=RECIPE)
    comparison.train(comparison.jobs[0], Heard())
    comparison.score(comparison.jobs[0], Heard())
    with pytest.raises(Cancelled):
        comparison.answer(Heard(stop=lambda steps: True))
    (file,) = tmp_path.glob(f"*/{RESULTS}")
    kept = json.loads(file.read_text())
    assert (len(kept["nll"]), kept["answers"]) == (1, {})
    folder = comparison.jobs[0].folder
    assert (folder / "sft").is_dir()
    assert not (folder / "dpo").exists()


def test_users_are_trained_on_the_task_adapter(
    engine: Engine, tiny: Callable[..., Path], adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("llama", initializer_range=0.05)
    tasked = Engine.of(load_base(folder, device="cpu", task_adapter=adapter(folder, seed=3)))
    ways = ways_named(["base", "task", "task+retrieved", "sft"])
    comparison = Comparison(
        engine, [user("anna")], tmp_path, ways, task_engine=tasked, recipe=RECIPE
    )
    comparison.run()
    metrics = measure(comparison).users[0].metrics
    sft = tasked.load_adapter(comparison.jobs[0].folder / "sft")
    (example, _) = comparison.jobs[0].examples
    pair = [(example.prompt_ids, example.completion_ids)]
    assert metrics["base"]["nll"] != metrics["task"]["nll"] != metrics["task+retrieved"]["nll"]
    assert float(tasked.score(pair, sft)[0].sum()) > float(tasked.score(pair)[0].sum())
    assert float(tasked.score(pair)[0].sum()) != float(engine.score(pair)[0].sum())


def test_of_samples_the_one_of_the_highest_reward_is_taken(engine: Engine, tmp_path: Path) -> None:
    ways = ways_named(["sft-best4", "sft-best16"])
    comparison = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE)
    comparison.train(comparison.jobs[0], Heard())
    plan = comparison._plan(engine)
    assert [[way.name for way in group] for group in plan[0][1]] == [["sft-best4", "sft-best16"]]
    samples = engine.generate(list(comparison._requests(*plan[0]))[:16])
    rewards = [
        sum(t.log_p_user - t.log_p_base for t in sample.logprobs) / len(sample.logprobs)
        for sample in samples
    ]
    assert len(set(rewards)) > 4
    assert _best(samples[:4]) is samples[rewards.index(max(rewards[:4]))]
    assert _best(samples) is samples[rewards.index(max(rewards))]
    comparison.answer(Heard())
    found = comparison.answers_of(comparison.jobs[0], ways[1])[0]
    assert found.text == _best(samples).text


def test_items_like_the_question_are_retrieved(engine: Engine) -> None:
    topics = ["a red boat", "a tall tree", "the red boat sinks", "rain in May", "my red boat"]
    items = [Item(prompt=f"Write of {topic}.", completion=topic) for topic in topics]
    question = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Write of the red boat."},
    ]
    (prompt,) = OwnItems(engine.base, items, [Question(question, 8)]).prompts(Shown.RETRIEVED)
    assert prompt[0] == question[0]
    assert prompt[-1] == question[-1]
    shown = [message["content"] for message in prompt if message["role"] == "assistant"]
    assert len(shown) == NUM_RETRIEVED
    assert shown[-1] == "the red boat sinks"
    assert set(shown) == {topic for topic in topics if "boat" in topic}


def test_retrieved_items_are_shown_to_the_users_model_alone(engine: Engine, tmp_path: Path) -> None:
    ways = ways_named(["cope", "cope+retrieved"])
    comparison = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE)
    comparison.train(comparison.jobs[0], Heard())
    bare, retrieving = list(comparison._requests(*comparison._plan(engine)[0]))[:2]
    assert retrieving.base_prompt == bare.prompt
    assert len(retrieving.prompt) > len(bare.prompt)
    comparison.answer(Heard())
    assert len(comparison.answers_of(comparison.jobs[0], ways[1])) == 2


def test_half_of_the_bases_layers_are_contrasted_with(
    engine: Engine, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    ways = ways_named(["cope", "dpo+early-exit"])
    comparison = Comparison(engine, [user("anna")], tmp_path, ways, recipe=RECIPE)
    comparison.train(comparison.jobs[0], Heard())
    whole, half = list(comparison._requests(*comparison._plan(engine)[0]))[:2]
    assert (whole.early_exit, half.early_exit) == (None, 1)
    assert half.contrast == whole.contrast
    other = Engine.of(load_base(tiny("gpt2"), device="cpu"))
    with pytest.raises(InputError, match="early-exit: GPT2LMHeadModel cannot be read out"):
        Comparison(other, [user("anna")], tmp_path / "other", ways)


def test_as_many_of_the_newest_are_shown_as_fit(engine: Engine) -> None:
    items = [Item(prompt=f"Say {n}.", completion="word " * 8) for n in range(40)]
    question = [{"role": "user", "content": "Say it."}]
    (prompt,) = OwnItems(engine.base, items, [Question(question, 8)]).prompts(Shown.NEWEST)
    num_shown = sum(message["role"] == "assistant" for message in prompt)
    assert 0 < num_shown < 40
    assert prompt[0]["content"] == f"Say {40 - num_shown}."
    assert len(engine.base.prompt_ids(prompt)) + 8 <= engine.base.context
    older = items[-num_shown - 1]
    more = [*older.messages, {"role": "assistant", "content": older.completion}, *prompt]
    assert len(engine.base.prompt_ids(more)) + 8 > engine.base.context


def test_questions_with_room_for_about_as_many_show_the_same_newest_items(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_items, "ABOUT_AS_MANY", 1.5)  # few fit this base's context
    items = [Item(prompt=f"Say {n}.", completion="word " * 2) for n in range(60)]
    asked = [
        Question([{"role": "user", "content": "Say it. " * length}], 8) for length in (1, 8, 24)
    ]
    most = [OwnItems(engine.base, items, [each]).prompts(Shown.NEWEST)[0] for each in asked]
    assert len(most[0]) > len(most[1]) > 1.5 * len(most[2]) > 1.5
    together = OwnItems(engine.base, items, asked).prompts(Shown.NEWEST)
    assert together[0][:-1] == together[1][:-1]
    assert together[1:] == most[1:]


def test_what_cannot_be_compared_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task: needs a task adapter"):
        Comparison(engine, [user("anna")], tmp_path, ways_named(["task"]))
    with pytest.raises(InputError, match="give two or more"):
        Comparison(engine, [user("anna")], tmp_path, ways_named(["another-cope"]))
    with pytest.raises(InputError, match="two users have the same id, or none"):
        Comparison(engine, [user("anna"), user("anna")], tmp_path, ways_named(["base"]))
    with pytest.raises(HistoryError, match="'anna' has 5 items to train on and 0 queries"):
        Comparison(engine, [user("anna", num_queries=0)], tmp_path, ways_named(["base"]))
    with pytest.raises(InputError, match="no way 'cop': name some of base, "):
        ways_named(["cop"])
    assert {way.name for way in ways_named(QUICK_WAYS)} == set(QUICK_WAYS)


def test_every_adapter_is_scored_on_every_users_texts(engine: Engine, tmp_path: Path) -> None:
    users = [user("anna"), user("bert")]
    ways = ways_named(["sft", "dpo", "another-dpo"])
    comparison = Comparison(engine, users, tmp_path, ways, recipe=RECIPE)
    comparison.run()
    matrix = score_adapters(comparison, Heard())
    for job in comparison.jobs:
        other = comparison.jobs[1 - comparison.jobs.index(job)]
        own, another = (comparison.nll_of(job, way) for way in ways[1:])
        assert comparison.nll_under(job, job, Heard()) == own
        assert comparison.nll_under(job, other, Heard()) == another
    assert matrix.top1.value == matrix.own_above_another.value == 1
    before = engine.statistics().tokens
    again = Comparison(engine, users, tmp_path, ways, recipe=RECIPE)
    assert score_adapters(again, Heard()) == matrix
    assert engine.statistics().tokens == before


def test_the_grid_answers_every_setting_once(engine: Engine, tmp_path: Path) -> None:
    users, ways = [user("anna"), user("bert")], ways_named(["sft", "dpo"])
    comparison = Comparison(engine, users, tmp_path, ways, recipe=RECIPE)
    comparison.run()
    monitor = Heard()
    answer_grid(comparison, monitor)
    assert monitor.steps[-1].step == monitor.steps[-1].total == 2 * len(SETTINGS)
    cells = measure_grid(comparison, measure(comparison).voice)
    assert [(cell.alpha, cell.tau) for cell in cells] == [
        (each.alpha, each.tau) for each in SETTINGS
    ]
    alone = measure(comparison).means["dpo"]["rougeL"]
    assert cells[0].figures["rougeL"].value == pytest.approx(alone.value)
    again, silent = Comparison(engine, users, tmp_path, ways, recipe=RECIPE), Heard()
    answer_grid(again, silent)
    assert not silent.steps
    assert measure_grid(again, {}) == cells


def test_without_an_adapter_there_is_no_grid(engine: Engine, tmp_path: Path) -> None:
    comparison = Comparison(engine, [user("anna")], tmp_path, ways_named(["base"]), recipe=RECIPE)
    with pytest.raises(InputError, match="name sft or cope among the ways"):
        answer_grid(comparison, Heard())


def test_answers_are_placed_between_strangers_and_the_user(engine: Engine, tmp_path: Path) -> None:
    names = ("anna", "bert", "carl", "dora", "emil", "finn")
    users = [user(name * 3, num_items=12, num_queries=5) for name in names]
    comparison = Comparison(engine, users, tmp_path, ways_named(["base"]), recipe=RECIPE)
    comparison.run()
    report = measure(comparison)
    scale = report.voice["voice"]
    assert isinstance(scale, VoiceScale)
    assert scale.auc == 1
    voices = [figures.metrics["base"]["voice"] for figures in report.users]
    assert report.means["base"]["voice"].value == pytest.approx(sum(voices) / 6)
    assert report.means["base"]["voice"].value < 0.5
