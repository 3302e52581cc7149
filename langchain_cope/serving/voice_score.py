"""How near a training has brought the answers to the user, for people: one number, or why none."""

from typing import Any

from langchain_cope.errors import CopeError
from langchain_cope.history.items import UserHistory
from langchain_cope.personalize import PersonalizeResult


def voice_score(history: UserHistory, result: PersonalizeResult) -> dict[str, Any]:
    """Return `voice`, on the way from the base's words (0) to the user's own (1), and a note.

    It is measured on the held-out texts, whose answers are the training's samples: `voice` is None,
    and `voice_note` says why, where there are too few of them or they show no manner.
    """
    held_out = {sample.reference for sample in result.samples}
    learnt = [item.completion for item in history.items if item.completion not in held_out]
    try:
        from langchain_cope.evaluation.own_voice import own_voice
        from langchain_cope.evaluation.voice import Silent

        scale = own_voice(
            learnt,
            [sample.reference for sample in result.samples],
            [sample.base for sample in result.samples],
        )
    except (CopeError, ImportError) as error:  # scikit-learn is not installed
        return {"voice": None, "voice_note": str(error)}
    if isinstance(scale, Silent):
        return {"voice": None, "voice_note": scale.reason}
    answers = scale.likeness([sample.cope for sample in result.samples])
    score = (answers - scale.floor) / (scale.ceiling - scale.floor)
    return {"voice": round(score, 3), "voice_note": f"of {len(result.samples)} held-out texts"}
