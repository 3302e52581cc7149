"""How near a training has brought the answers to the user: one number, and what it is of."""

from typing import Any

from langchain_cope.personalization.voice_gain import voice_gain
from langchain_cope.personalize import PersonalizeResult


def voice_score(result: PersonalizeResult) -> dict[str, Any]:
    """Return `voice`, by how much answers are more like the user's own texts than the base's are.

    Measured as chrF, 0 to 1, on the held-out texts, whose answers are the training's samples;
    `voice_note` says of what. `voice` is None where there are fewer than two.
    """
    found = voice_gain(result.samples)
    if found is None:
        return {"voice": None, "voice_note": "there are fewer than two held-out texts"}
    note = (
        f"chrF {found.personalized:.3f} with your {len(result.samples)} held-out texts, the base's "
        f"{found.base:.3f}; standard error of the difference {found.error:.3f}"
    )
    return {"voice": round(found.gain, 4), "voice_note": note}
