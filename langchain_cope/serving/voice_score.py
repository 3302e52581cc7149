"""How near a training has brought the answers to the user: one number, and what it is of."""

from statistics import fmean
from typing import Any

from langchain_cope.personalize import PersonalizeResult


def voice_score(result: PersonalizeResult) -> dict[str, Any]:
    """Return `voice`, by how much answers are more like the user's own texts than the base's are.

    Measured as chrF, 0 to 1, on the held-out texts, whose answers are the training's samples;
    `voice_note` says of what. `voice` is None where there are fewer than two.
    """
    if len(result.samples) < 2:
        return {"voice": None, "voice_note": "there are fewer than two held-out texts"}
    from langchain_cope.evaluation.likeness import gain, likeness

    own = [sample.reference for sample in result.samples]
    answers = likeness(own, [sample.cope for sample in result.samples])
    of_base = likeness(own, [sample.base for sample in result.samples])
    mean, error = gain(answers, of_base)
    note = (
        f"chrF {fmean(answers):.3f} with your {len(own)} held-out texts, the base's "
        f"{fmean(of_base):.3f}; standard error of the difference {error:.3f}"
    )
    return {"voice": round(mean, 4), "voice_note": note}
