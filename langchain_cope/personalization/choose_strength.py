"""How strongly a user's adapter is to act: chosen by a few held-out items that judge nothing.

`choose_strength` is the whole of it. Likelihood is the guard: a strength that makes the user's own
texts clearly less likely than the adapter alone does is out. Of the rest that one is chosen whose
answers are most like what the user wrote (`evaluation/likeness.py`). Few items say little, so what
they say is weighed against what is believed of users of the base (`strength.py`).
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from langchain_cope.evaluation.ways import COPE
from langchain_cope.history.items import Item
from langchain_cope.personalization.held_out import LEAST_DIVIDED
from langchain_cope.personalization.result import Recommendation
from langchain_cope.strength import (
    Candidate,
    Strength,
    StrengthPrior,
    strength_for,
    strength_prior,
)
from langchain_cope.text import count
from langchain_cope.training.progress import Monitor, Stage

if TYPE_CHECKING:
    from langchain_cope.engine import Adapter, Engine, Request
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.encode import Encoded
    from langchain_cope.training.pipeline import TrainingResult
    from langchain_cope.training.recipe import Recipe

TOLERANCE = 0.25
"""Nats a token by which a strength may make own texts less likely than the adapter alone does."""
LEAST_ERROR = 0.01  # of a gain: answers that happen to be the same are no certainty


@dataclass(frozen=True)
class Trial:
    """An adapter, tried at several strengths on the same items."""

    engine: "Engine"
    adapter: "Adapter"
    examples: "Sequence[Encoded]"
    recipe: "Recipe"
    """As used."""
    monitor: Monitor
    """Hears of answers, in a stage, and may stop them with `Cancelled`."""
    known: "Mapping[Strength, list[str]]" = field(default_factory=dict)
    """Answers to all items that there are already."""

    def losses(self, strengths: Sequence[Strength]) -> dict[Strength, float]:
        """Return by how many nats a token each strength makes texts less likely than the adapter.

        The mean over the tokens of a text, then over texts. Tokens outside of the plausible head
        keep the adapter's own probability (`Engine.score_contrasted`).
        """
        sequences = [(example.prompt_ids, example.completion_ids) for example in self.examples]
        alone = Strength(alpha=0.0)
        nll = {}
        for scale in sorted({one.adapter_scale for one in (alone, *strengths)}):
            of_scale = [one for one in (alone, *strengths) if one.adapter_scale == scale]
            scores = self.engine.score_contrasted(
                sequences,
                self.adapter.scaled(scale),
                [one.contrast for one in of_scale],
                self.monitor.should_stop,
            )
            for row, strength in enumerate(of_scale):
                nll[strength] = -fmean(float(of_item[row].mean()) for of_item in scores)
        return {strength: nll[strength] - nll[alone] for strength in strengths}

    def answers(self, strengths: Sequence[Strength]) -> dict[Strength, list[str]]:
        """Return the greedy answers to all items at each strength; what is known is not asked."""
        asked = [strength for strength in strengths if strength not in self.known]
        requests = (
            self._request(example, strength) for strength in asked for example in self.examples
        )
        answers = {one: self.known[one] for one in strengths if one in self.known}
        each = self.engine.generate_each(requests, self.monitor.should_stop)
        with closing(each) as completions:
            for number, strength in enumerate(asked, start=1):
                answers[strength] = [next(completions).text for _ in self.examples]
                self.monitor.step_done(number, len(asked))
        return answers

    def _request(self, example: "Encoded", strength: Strength) -> "Request":
        from langchain_cope.engine import Request, Sampling
        from langchain_cope.training.encode import parts_of_reply

        prompt = self.engine.base.prompt_ids(example.item.messages)
        longest = max(len(example.completion_ids) for example in self.examples)
        return Request(
            prompt,
            adapter=self.adapter,
            adapter_scale=strength.adapter_scale,
            contrast=strength.contrast,
            sampling=Sampling(
                max_tokens=self.recipe.max_new_tokens or longest,
                repetition_penalty=self.recipe.repetition_penalty,
            ),
            parts=parts_of_reply(self.engine.base, prompt),
            offline=True,
        )


def recommend(
    engine: "Engine",
    training: "TrainingResult",
    adapter: str,
    items: Sequence[Item],
    evaluation: "Evaluation",
    monitor: Monitor,
) -> Recommendation:
    """Return what the version is to recommend.

    The choice is a stage. What an interrupted run left in the folder is not chosen again.

    Args:
        engine: of the base.
        training: what was trained.
        adapter: the stage of it that is to be published.
        items: what to choose by, as `choose_strength` has it.
        evaluation: of these items.
        monitor: hears of answers, and may stop them with `Cancelled`.
    """
    from langchain_cope.atomic_files import read_json, write_json

    file = training.folder / Stage.STRENGTH.file
    if not file.exists():
        with monitor.stage(Stage.STRENGTH):
            trial = trial_of(engine, training, adapter, items, evaluation, monitor)
            write_json(file, choose_strength(trial).model_dump())
    return Recommendation.model_validate(read_json(file))


def trial_of(
    engine: "Engine",
    training: "TrainingResult",
    adapter: str,
    items: Sequence[Item],
    evaluation: "Evaluation",
    monitor: Monitor,
) -> Trial:
    """Return a trial of what a training left; it knows the answers of the evaluation of `items`."""
    from langchain_cope.training.encode import fit

    recipe = training.recipe
    examples, _ = fit(engine.base, items, recipe.max_length, recipe.max_words)
    loaded = engine.load_adapter(training.folder / Stage(adapter).file)
    known = _answered(engine, training, adapter, evaluation)
    return Trial(engine, loaded, examples, recipe, monitor, known)


def _answered(
    engine: "Engine", training: "TrainingResult", adapter: str, evaluation: "Evaluation"
) -> dict[Strength, list[str]]:
    """Return what the evaluation has of the adapter's answers, by the strength of each."""
    from langchain_cope.training.pipeline import trained_by

    def of(way: str) -> list[str]:
        return [texts[way] for texts in evaluation.texts]

    known = {Strength(alpha=0.0): of(adapter)}
    of_cope = COPE.adapter and trained_by(training.folder, COPE.adapter)
    if trained_by(training.folder, Stage(adapter)) == of_cope:
        recipe = training.recipe
        known[strength_for(engine.base.fingerprint(), recipe.alpha, recipe.tau)] = of(COPE.name)
    return known


def choose_strength(trial: Trial) -> Recommendation:
    """Return how strongly an adapter is to act.

    Args:
        trial: of items that trained nothing, and judge nothing; of none where all have to judge. An
            α or τ of its recipe's own is taken as it is.

    Raises:
        Cancelled: the trial's monitor asked for a stop.
    """
    base, recipe, num_texts = trial.engine.base, trial.recipe, len(trial.examples)
    fingerprint = base.fingerprint()
    if recipe.alpha is not None or recipe.tau is not None:
        strength = strength_for(fingerprint, recipe.alpha, recipe.tau)
        return recommendation(strength, "as the recipe has it")
    prior = strength_prior(fingerprint)
    usual = f"usual for {base.name}" if prior.is_measured else "the paper's"
    if not num_texts:
        why = f"{usual}: below {LEAST_DIVIDED} held-out texts all of them judge the adapter"
        return recommendation(prior.usual, why)
    allowed = _guarded(trial, prior)
    if allowed.usual != prior.usual:
        usual = f"weaker than {usual}, which makes the user's own texts too unlikely"
    better = pick(allowed, _gains(trial, allowed))
    by = f"by {count(num_texts, 'held-out text')}"
    if better is None:
        why = (
            f"{usual}: {by} no other strength's answers are more like the user's own texts, by "
            "more than the standard error"
        )
        return recommendation(allowed.usual, why, num_texts)
    why = (
        f"{by} its answers are more like the user's own texts than those of {allowed.usual}, by "
        f"{better.mean:.3f} chrF, with a standard error of {better.sd:.3f}"
    )
    return recommendation(better.strength, why, num_texts)


def recommendation(strength: Strength, why: str, num_texts: int = 0) -> Recommendation:
    """Return the recommendation of a strength."""
    return Recommendation(**asdict(strength), why=why, num_texts=num_texts)


def pick(prior: StrengthPrior, gains: Mapping[Strength, tuple[float, float]]) -> Candidate | None:
    """Return the strength that is to replace the usual one, with what is believed of its gain.

    A gain measured as m with the standard error s, of users whose true gains have the mean μ and
    the standard deviation ω, is believed to be (m/s² + μ/ω²) / (1/s² + 1/ω²), with an error of
    1 / √(1/s² + 1/ω²). It is the strength that is believed to gain most, of those whose gain is
    above its error; None where none is. To take any gain would change nearly everybody's strength
    by chance, and was measured to gain nothing.

    Args:
        prior: what is usual, and its candidates.
        gains: how much more like the user than the usual one, and the standard error.
    """
    believed = [
        _believed(candidate, *gains[candidate.strength])
        for candidate in prior.candidates
        if candidate.strength in gains
    ]
    sure = [one for one in believed if one.mean > one.sd]
    return max(sure, key=lambda one: one.mean, default=None)


def _believed(candidate: Candidate, gain: float, error: float) -> Candidate:
    if candidate.sd == 0:  # as all users
        return candidate
    of_user, of_users = max(error, LEAST_ERROR) ** -2, candidate.sd**-2
    mean = (gain * of_user + candidate.mean * of_users) / (of_user + of_users)
    return Candidate(candidate.strength, mean, (of_user + of_users) ** -0.5)


def _guarded(trial: Trial, prior: StrengthPrior) -> StrengthPrior:
    """Return the prior without the strengths that make the user's own texts too unlikely.

    Where the usual one is among them, the strongest weaker one that is not stands in for it.
    """
    losses = trial.losses([prior.usual, *(one.strength for one in prior.candidates)])
    kept = tuple(one for one in prior.candidates if losses[one.strength] <= TOLERANCE)
    usual = prior.usual
    if losses[usual] > TOLERANCE:
        weaker = [one.strength for one in kept if one.strength.alpha < usual.alpha]
        usual = weaker[-1] if weaker else Strength(alpha=0.0, tau=usual.tau)
    return StrengthPrior(usual, kept, prior.is_measured)


def _gains(trial: Trial, prior: StrengthPrior) -> dict[Strength, tuple[float, float]]:
    """Return each candidate's gain over the usual strength, and its error."""
    from langchain_cope.evaluation.likeness import gain, likeness

    own = [example.item.completion for example in trial.examples]
    strengths = dict.fromkeys([prior.usual, *(one.strength for one in prior.candidates)])
    like = {
        strength: likeness(own, answers)
        for strength, answers in trial.answers(list(strengths)).items()
    }
    return {strength: gain(like[strength], like[prior.usual]) for strength in strengths}
