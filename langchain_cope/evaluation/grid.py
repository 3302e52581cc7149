"""What α and τ do: greedy answers of the users' adapters over a small grid of both.

`answer_grid` lets them answer, each answer once a folder; `measure_grid` makes the figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.engine import Contrast, Request, Sampling
from langchain_cope.evaluation.evaluate import rouge_of_ways
from langchain_cope.evaluation.over_users import Estimate, mean_over_users
from langchain_cope.evaluation.voice import POOL, Silent, VoiceScale
from langchain_cope.training.encode import Encoded, parts_of_reply
from langchain_cope.training.progress import Monitor, Stage

if TYPE_CHECKING:
    from langchain_cope.evaluation.user_job import UserJob
    from langchain_cope.evaluation.users import Comparison

ALPHAS = (0.1, 0.3, 0.5, 0.7)
TAUS = (0.05, 0.1, 0.3)
SETTINGS = (Contrast(0.0), *(Contrast(alpha, tau) for tau in TAUS for alpha in ALPHAS))
"""At α 0 the adapter answers alone, whatever τ is."""
MOST_QUERIES = 2 * POOL  # a user, the newest ones
GRID = "grid.json"


@dataclass(frozen=True)
class Cell:
    """One setting, and its figures over users."""

    alpha: float
    tau: float
    figures: dict[str, Estimate]
    """By measure: `rougeL`, and `voice` and `style` where they have a scale."""


def answer_grid(comparison: "Comparison", monitor: Monitor) -> None:
    """Let the users' last adapters answer their newest queries at every setting.

    What a user's folder holds is not answered again. Raises `InputError` where no way has an
    adapter, and `Cancelled`.
    """
    plan = []
    for job in comparison.jobs:
        known = _known(job)
        missing = [each for each in SETTINGS if _key(comparison, job, each) not in known]
        plan.append((job, known, missing))
    requests = (
        request for job, _, missing in plan for request in _requests(comparison, job, missing)
    )
    total, done = sum(len(missing) for *_, missing in plan), 0
    engine = comparison.trained_engine
    with (
        monitor.stage(Stage.EVALUATE),
        closing(engine.generate_each(requests, monitor.should_stop)) as completions,
    ):
        for job, known, missing in plan:
            for setting in missing:
                texts = [next(completions).text for _ in _queries(job)]
                known[_key(comparison, job, setting)] = texts
                done += 1
                monitor.step_done(done, total)
            write_json(job.folder / GRID, known)


def measure_grid(comparison: "Comparison", voice: Mapping[str, VoiceScale | Silent]) -> list[Cell]:
    """Return the figures of every setting, on the scales that `measure` found."""
    all_known = [_known(job) for job in comparison.jobs]
    names = [job.history.user_id or "the user" for job in comparison.jobs]
    cells = []
    for setting in SETTINGS:
        answers = {
            name: known[_key(comparison, job, setting)]
            for name, job, known in zip(names, comparison.jobs, all_known, strict=True)
        }
        figures = {"rougeL": mean_over_users([_rouge(comparison.jobs, names, answers)])}
        for measure, scale in voice.items():
            score = Silent("") if isinstance(scale, Silent) else scale.score(answers)
            if not isinstance(score, Silent):
                figures[measure] = score.position
        cells.append(Cell(setting.alpha, setting.tau, figures))
    return cells


def _rouge(
    jobs: "Sequence[UserJob]", names: Sequence[str], answers: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    found = {}
    for name, job in zip(names, jobs, strict=True):
        texts = [
            {"reference": example.item.completion, "given": text}
            for example, text in zip(_queries(job), answers[name], strict=True)
        ]
        metrics, _ = rouge_of_ways(texts, ["given"])
        found[name] = metrics["given"]["rougeL"]
    return found


def _requests(
    comparison: "Comparison", job: "UserJob", settings: Sequence[Contrast]
) -> Iterator[Request]:
    engine, base = comparison.trained_engine, comparison.trained_engine.base
    if not settings:
        return
    adapter = engine.load_adapter(comparison.last_adapter(job))
    sampling = Sampling(
        max_tokens=job.recipe.max_new_tokens or 1,
        repetition_penalty=job.recipe.repetition_penalty,
    )
    for setting in settings:
        for example in _queries(job):
            prompt = base.prompt_ids(example.item.messages)
            yield Request(
                prompt,
                adapter=adapter,
                contrast=setting,
                sampling=sampling,
                parts=parts_of_reply(base, prompt),
                offline=True,
            )


def _queries(job: "UserJob") -> list[Encoded]:
    return job.examples[-MOST_QUERIES:]


def _known(job: "UserJob") -> dict[str, list[str]]:
    file = job.folder / GRID
    known: dict[str, list[str]] = read_json(file) if file.exists() else {}
    return known


def _key(comparison: "Comparison", job: "UserJob", setting: Contrast) -> str:
    stage = comparison.last_adapter(job).name
    return f"{job.asked} {stage} {len(_queries(job))} {setting.alpha} {setting.tau}"
