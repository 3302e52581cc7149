"""The verdict on one training: whether it helps the user, how sure that is, and in one sentence.

Two kinds of history have to be told from a user's own. One whose answers are shuffled among the
prompts still teaches words and tone, and beats any reference by them; but the base itself finds
its texts no likelier after their own prompts than after others'. One of other people teaches what
all of them have in common: whoever has an adapter of others can name it as a second reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from langchain_cope.personalization.certainty import (
    Prior,
    certainty,
    in_sds,
    items_needed,
    skewness,
)
from langchain_cope.personalization.evidence import Evidence, mean_of_each
from langchain_cope.personalization.held_out import items_for
from langchain_cope.personalization.result import Verdict
from langchain_cope.text import count

SURE = 0.9  # of helping, to be published
PAIRED = 0.95  # how sure that texts fit their own prompts best; most histories exceed it by far


@dataclass(frozen=True)
class Reference:
    """Something that the adapter has to beat."""

    name: str
    """As it stands after "than with"."""
    nll: Sequence[float]
    """Of each held-out item, nats a token."""
    level: float = SURE
    """How sure we must be that it is beaten."""
    is_base: bool = False
    """Whether first sights, which are against the base, say something about it."""


def choose_adapter(item_nll: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Return which of `names` has the lowest mean NLL an item; of equal ones the first."""
    return min(names, key=lambda name: fmean(item_nll[name]))


def judge(
    adapter: str,
    nll: Sequence[float],
    references: Sequence[Reference],
    units: Sequence[object],
    evidence: Evidence,
    prior: Prior,
    min_gain: float = 0.0,
    num_items: int = 0,
    fault: str | None = None,
) -> Verdict:
    """Return the verdict on an adapter.

    Args:
        adapter: the stage that trained it.
        nll: of each held-out item under the adapter, nats a token.
        references: all of them have to be beaten.
        units: of each held-out item what it counts with: equal ones count as one.
        evidence: what the base says of the items.
        prior: of this base.
        min_gain: nats a token by which each reference has to be beaten.
        num_items: of the whole history: advice asks for more than these.
        fault: what is wrong with its answers, None for nothing.
    """
    comparisons = [
        _compare(reference, nll, units, evidence, prior, min_gain) for reference in references
    ]
    hardest = min(comparisons, key=lambda one: (one.passed, one.probability - one.reference.level))
    weakest = max((one for one in comparisons if one.counts), key=lambda one: one.p_value)
    mispaired = is_mispaired(evidence, prior)
    passed = hardest.passed and not mispaired and fault is None
    reason, advice = hardest.sentence(), None
    if mispaired:
        reason += (
            "; but the texts that were trained on fit the prompts of other items as well as their "
            "own, as if they were shuffled"
        )
        advice = (
            "check that each prompt stands beside the text that answers it; replies that would "
            "fit any prompt, as many in chats do, belong into a .txt, one a line, without prompts"
        )
    elif fault is not None:
        reason += f"; but {fault}"
        advice = (
            "longer texts, or texts that differ more from each other; without training, the base "
            "can be shown some of them beside each question (`retrieve`)"
        )
    elif not passed:
        reason += f"; {hardest.why_not(min_gain)}"
        advice = hardest.advice(prior, num_items)
    return Verdict(
        published=passed,
        sentence=hardest.sentence(),
        probability=hardest.probability,
        num_texts=len(hardest.gains),
        num_better=hardest.num_better,
        mean_gain=hardest.mean,
        reference=hardest.reference.name,
        adapter=adapter,
        reason=reason,
        p_value=1.0 if mispaired or fault is not None else weakest.p_value,
        mean_in_sds=in_sds(weakest.gains),
        skewness=skewness(weakest.gains),
        advice=advice,
    )


def is_mispaired(evidence: Evidence, prior: Prior) -> bool:
    """Return whether the trained texts have nothing to do with their prompts.

    Only a base that reads prompts can tell: one that is known to, or does so on the held-out items.
    """
    sceptical = Prior(0.0, 1.0, prior.reads_prompts)
    trained = evidence.trained_pairing
    if len(trained) < 2 or certainty(trained, sceptical) >= PAIRED:
        return False
    return prior.reads_prompts or certainty(evidence.held_out_pairing, sceptical) >= SURE


@dataclass(frozen=True)
class _Comparison:
    reference: Reference
    gains: list[float]
    probability: float
    passed: bool
    p_value: float
    """The chance of such gains where there is nothing to gain, without any belief beforehand."""

    @property
    def counts(self) -> bool:
        """Whether beating the reference is what makes an adapter worth having.

        The active version was proven when it was published.
        """
        return self.reference.level >= SURE

    @property
    def mean(self) -> float:
        return fmean(self.gains)

    @property
    def num_better(self) -> int:
        return sum(gain > 0 for gain in self.gains)

    def sentence(self) -> str:
        by = f"by {self.mean:.3g} nats a token on average"
        if self.mean < 0:
            by = f"but on average all are {-self.mean:.3g} nats a token less likely"
        return (
            f"{self.num_better} of {count(len(self.gains), 'newest text')} "
            f"{'is' if self.num_better == 1 else 'are'} likelier with it than with "
            f"{self.reference.name}, {by}; {percent(self.probability)} sure it helps"
        )

    def why_not(self, min_gain: float) -> str:
        if self.probability >= self.reference.level:
            return f"a gain of more than {min_gain:g} was asked for"
        return f"{percent(self.reference.level)} are needed; what is active stays as it is"

    def advice(self, prior: Prior, num_items: int) -> str:
        needed = items_needed(self.gains, prior.sceptical, SURE)
        if needed is None:
            return (
                "more texts, or prompts that say what each text answers: in these there is nothing "
                f"yet that {self.reference.name} would not know"
            )
        return (
            f"more texts: about {items_for(needed, num_items)} in all would do, "
            "if they gain as much as these"
        )


def _compare(
    reference: Reference,
    nll: Sequence[float],
    units: Sequence[object],
    evidence: Evidence,
    prior: Prior,
    min_gain: float,
) -> _Comparison:
    of_items = [before - after for before, after in zip(reference.nll, nll, strict=True)]
    gains = mean_of_each(units, of_items)
    belief = prior.sceptical
    if reference.is_base:
        # First sights are of the items that were trained on, which may be another person's: they
        # say how much is believed beforehand, between nothing and the prior, and decide nothing.
        belief = prior.leaning(2 * certainty(evidence.first_sights, prior.sceptical) - 1)
    probability = certainty(gains, belief)
    passed = probability >= reference.level and fmean(gains) > min_gain
    p_value = 1 - certainty(gains, prior.sceptical)
    return _Comparison(reference, gains, probability, passed, p_value)


def percent(probability: float) -> str:
    """Return a probability for people: rounded down, so that it never says more than is known."""
    return f"{min(99, int(100 * probability))} %"
