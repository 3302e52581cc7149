"""What is made of the texts of a `Comparison`: figures of each way, per user and over users.

`measure` is the whole of it. Means and differences need scikit-learn (extra `evaluate`); without it
each user's figures stand, and the plain means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from langchain_cope.errors import InputError
from langchain_cope.evaluation.adapter_matrix import AdapterMatrix
from langchain_cope.evaluation.evaluate import rouge_of_ways
from langchain_cope.evaluation.grid import Cell
from langchain_cope.evaluation.meteor import WordNetMissing, mean_meteor
from langchain_cope.evaluation.over_users import (
    Difference,
    Estimate,
    difference,
    mean_over_users,
    require_scikit_learn,
)
from langchain_cope.evaluation.repetition import copy_rates, distinct, mean_num_words
from langchain_cope.evaluation.user_job import Answer, UserJob
from langchain_cope.evaluation.users import Comparison
from langchain_cope.evaluation.voice import Silent, View, VoiceScale, voice_scale
from langchain_cope.evaluation.ways import REFERENCES, Way

VIEWS = {"voice": View.FULL, "style": View.STYLE}
Figures = dict[str, dict[str, float]]
"""Figures by the name of a way, then of a measure."""


@dataclass(frozen=True)
class Sample:
    """One query, and what each way answered."""

    prompt: str
    reference: str
    """What the user wrote."""
    answers: dict[str, Answer]
    """By the name of the way."""


@dataclass(frozen=True)
class UserFigures:
    """One user's part of a report."""

    name: str
    """The user's id; "the user" in a file that names none."""
    metrics: Figures
    timings: dict[str, float]
    """Seconds of each stage of the training, by its name."""
    num_trained: int
    num_queries: int
    adapter_bytes: int
    """Size of the final adapter's weights file; 0 where nothing was trained."""
    notes: list[str]
    samples: list[Sample]


@dataclass(frozen=True)
class Report:
    """All figures of a comparison."""

    ways: tuple[Way, ...]
    users: list[UserFigures]
    means: dict[str, dict[str, Estimate]]
    """By way, then measure: the mean over users who have it."""
    differences: dict[str, dict[str, dict[str, Difference]]]
    """By reference, way and measure: how far the way lies above the reference, user by user."""
    voice: dict[str, VoiceScale | Silent]
    """The scales of `voice` and `style`, or why there is none."""
    notes: list[str] = field(default_factory=list)
    grid: list[Cell] = field(default_factory=list)
    """What α and τ do, where `answer_grid` was run."""
    matrix: AdapterMatrix | None = None
    """Every adapter on every user's texts, where `score_adapters` was run."""


def measure(comparison: Comparison) -> Report:
    """Return the figures of a comparison that has run."""
    users, notes = [], []
    for job in comparison.jobs:
        figures, more = _figures_of(comparison, job)
        users.append(figures)
        notes += more
    try:
        require_scikit_learn()
    except InputError as error:
        voice: dict[str, VoiceScale | Silent] = {
            name: Silent("scikit-learn is not installed") for name in VIEWS
        }
        means = _plain_means(comparison.ways, users)
        notes.append(str(error))
        return Report(comparison.ways, users, means, {}, voice, list(dict.fromkeys(notes)))
    voice = _voice(comparison, users)
    means = {
        way.name: {
            name: mean_over_users([values]) for name, values in _by_measure(way, users).items()
        }
        for way in comparison.ways
    }
    differences = _differences(comparison.ways, users)
    return Report(comparison.ways, users, means, differences, voice, list(dict.fromkeys(notes)))


def _figures_of(comparison: Comparison, job: UserJob) -> tuple[UserFigures, list[str]]:
    """Return the figures of one user, those of the voice apart, and what could not be had."""
    ways = comparison.ways
    answers = {way.name: comparison.answers_of(job, way) for way in ways}
    items = [example.item for example in job.examples]
    texts = [
        {
            "reference": item.completion,
            **{name: given[index].text for name, given in answers.items()},
        }
        for index, item in enumerate(items)
    ]
    metrics, notes = rouge_of_ways(texts, list(answers))
    prompts = ["\n".join(message["content"] for message in item.messages) for item in items]
    history = [item.completion for item in job.history.items]
    references = [item.completion for item in items]
    for way in ways:
        figures, given = metrics[way.name], [answer.text for answer in answers[way.name]]
        nll = comparison.nll_of(job, way)
        if nll is not None:
            figures["nll"] = nll
        try:
            figures["meteor"] = mean_meteor(references, given)
        except WordNetMissing as error:
            notes.append(str(error))
        figures |= _repetition(given, prompts, history)
    samples = [
        Sample(
            prompt=str(item.messages[-1]["content"]),
            reference=item.completion,
            answers={name: given[index] for name, given in answers.items()},
        )
        for index, item in enumerate(items)
    ]
    figures_of_user = UserFigures(
        name=job.history.user_id or "the user",
        metrics=metrics,
        timings=job.timings,
        num_trained=len(job.history.items),
        num_queries=len(items),
        adapter_bytes=job.adapter_bytes,
        notes=job.notes,
        samples=samples,
    )
    return figures_of_user, notes


def _repetition(
    answers: Sequence[str], prompts: Sequence[str], history: Sequence[str]
) -> dict[str, float]:
    rates = copy_rates(answers, prompts, history)
    values = {
        "copied": rates.from_history if rates else None,
        "distinct1": distinct(answers, 1),
        "distinct2": distinct(answers, 2),
        "words": mean_num_words(answers),
    }
    return {name: value for name, value in values.items() if value is not None}


def _voice(comparison: Comparison, users: Sequence[UserFigures]) -> dict[str, VoiceScale | Silent]:
    """Return the scale of each view, and put each user's place on it into the user's figures."""
    histories = {
        user.name: [item.completion for item in job.history.items]
        for user, job in zip(users, comparison.jobs, strict=True)
    }
    own = {user.name: [sample.reference for sample in user.samples] for user in users}
    scales = {name: voice_scale(histories, own, view) for name, view in VIEWS.items()}
    for name, scale in scales.items():
        if isinstance(scale, Silent):
            continue
        for way in comparison.ways:
            score = scale.score(
                {user.name: [s.answers[way.name].text for s in user.samples] for user in users}
            )
            if isinstance(score, Silent):
                continue
            for user in users:
                if user.name in score.of_user:
                    user.metrics[way.name][name] = score.of_user[user.name]
    return scales


def _by_measure(way: Way, users: Sequence[UserFigures]) -> Mapping[str, dict[str, float]]:
    """Return each user's figure, by measure: of the users who have it."""
    values: dict[str, dict[str, float]] = {}
    for user in users:
        for name, value in user.metrics[way.name].items():
            values.setdefault(name, {})[user.name] = value
    return values


def _plain_means(
    ways: Sequence[Way], users: Sequence[UserFigures]
) -> dict[str, dict[str, Estimate]]:
    return {
        way.name: {
            name: Estimate(sum(values.values()) / len(values), None, len(values))
            for name, values in _by_measure(way, users).items()
        }
        for way in ways
    }


def _differences(
    ways: Sequence[Way], users: Sequence[UserFigures]
) -> dict[str, dict[str, dict[str, Difference]]]:
    by_way = {way.name: _by_measure(way, users) for way in ways}
    return {
        reference.name: {
            name: {
                measure: difference([values[measure]], [old])
                for measure, old in by_way[reference.name].items()
                if values.get(measure, {}).keys() & old.keys()
            }
            for name, values in by_way.items()
            if name != reference.name
        }
        for reference in REFERENCES
        if reference.name in by_way
    }
