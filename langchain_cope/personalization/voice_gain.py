"""By how much a training has brought the answers nearer to the user: chrF with held-out texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from langchain_cope.personalization.result import Sample


@dataclass(frozen=True)
class VoiceGain:
    """Means over held-out texts of the chrF, 0 to 1, of answers with what the user wrote."""

    personalized: float
    base: float
    gain: float
    """By how much the personalized answers are more like the user than the base's."""
    error: float
    """The standard error of the gain."""


def voice_gain(samples: Sequence[Sample]) -> VoiceGain | None:
    """Return the gain on the held-out items of a training; None where there are fewer than two."""
    if len(samples) < 2:
        return None
    from langchain_cope.evaluation.likeness import gain, likeness

    own = [sample.reference for sample in samples]
    personalized = likeness(own, [sample.cope for sample in samples])
    base = likeness(own, [sample.base for sample in samples])
    return VoiceGain(fmean(personalized), fmean(base), *gain(personalized, base))
