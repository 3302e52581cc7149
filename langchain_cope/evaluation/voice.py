"""How far answers lie between strangers' words and the user's own: 0 and 1 on one scale.

Texts are compared by their runs of four characters (TF-IDF): an answer's with the profile of every
user of the file, which is all that the user's history holds. How far the own profile stands out
among all of them is put on a scale: the users' own held-out words are at 1, other users' are at 0,
and above 1 is caricature. Needs scikit-learn (extra `evaluate`).

Read `voice_scale`, then `VoiceScale.score`. `docs/evaluation.md` says how well it tells people
apart, and what it does not tell.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_cope.evaluation.over_users import (
    Estimate,
    difference,
    ratio,
    require_scikit_learn,
)
from langchain_cope.evaluation.style import mask_for, share_unspaced

if TYPE_CHECKING:
    from numpy.typing import NDArray

Texts = Mapping[str, Sequence[str]]
"""The texts of each user, by user id."""

MIN_USERS = 5  # with fewer, no test over users can reach `MAX_P`
MIN_HISTORY = 10  # texts that make a profile
POOL = 5  # held-out texts that are judged together: one alone is too short
RUN = 4  # characters in a row that are compared
MAX_PROFILE = 60  # newest history texts in a profile
MAX_UNSPACED = 0.2  # share of the letters
MAX_P = 0.05  # one-sided: that own words stand out more than others' by chance


class View(StrEnum):
    """What of a text is looked at."""

    FULL = "full"
    """All of it. What it is about tells most."""
    STYLE = "style"
    """Function words, punctuation and the shapes of all other words."""


@dataclass(frozen=True)
class Silent:
    """No score, and why."""

    reason: str


@dataclass(frozen=True)
class VoiceScore:
    """Where answers lie between strangers' words (0) and the users' own (1)."""

    position: Estimate
    """Of all users together."""
    of_user: dict[str, float]
    """Each user's; their mean is `position`. Noisy: a few pools each."""


@dataclass(frozen=True)
class VoiceScale:
    """The scale of one file of users in one view; `voice_scale` builds it."""

    view: View
    floor: dict[str, float]
    """Per user: how far other users' held-out words stand out as this user's, in z."""
    ceiling: dict[str, float]
    """Per user: how far the user's own held-out words do."""
    auc: float
    """How well z tells own from others' held-out words: 0.5 is chance, 1 is always."""
    left_out: list[str]
    """Users with too few texts."""
    _profiles: "_Profiles" = field(repr=False, compare=False)

    def score(self, answers: Texts) -> VoiceScore | Silent:
        """Return where `answers` lie: of some or all users of the scale, others are left out.

        0 and 1 are where others' and own words lie of the users that `answers` has.
        """
        users = [user for user in self.ceiling if answers.get(user)]
        if not users:
            return Silent("nobody on the scale has answers")
        z = {user: self._profiles.own_z(user, answers[user]) for user in users}
        above = {user: z[user] - self.floor[user] for user in users}
        span = {user: self.ceiling[user] - self.floor[user] for user in users}
        position = ratio([above], [span])
        if position is None or sum(span.values()) <= 0:
            return Silent("the own words of the users with answers are no nearer than strangers'")
        mean_floor = sum(self.floor[user] for user in users) / len(users)
        mean_span = sum(span.values()) / len(users)
        of_user = {user: (z[user] - mean_floor) / mean_span for user in users}
        return VoiceScore(position, of_user)


def voice_scale(histories: Texts, own: Texts, view: View) -> VoiceScale | Silent:
    """Return the scale of a file of users, or why there is none.

    Args:
        histories: Texts that each user wrote, oldest first: the newest 60 make the profile.
        own: Held-out texts that each user wrote later, in the order of the answers to come.
        view: What of the texts is looked at.

    Raises:
        InputError: scikit-learn is not installed.
    """
    require_scikit_learn()
    users = [
        user
        for user, history in histories.items()
        if len(history) >= MIN_HISTORY and len(own.get(user, ())) >= POOL
    ]
    if len(users) < MIN_USERS:
        return Silent(
            f"{len(users)} users have {MIN_HISTORY} history texts and {POOL} held-out texts, "
            f"and {MIN_USERS} are needed"
        )
    newest = {user: histories[user][-MAX_PROFILE:] for user in users}
    if view is View.STYLE and share_unspaced(_all(newest)) > MAX_UNSPACED:
        return Silent("no word boundaries: the script writes no spaces between words")
    see = mask_for(newest.values()) if view is View.STYLE else str
    if not any(len(see(text)) >= RUN for text in _all(newest)):
        return Silent(f"no history text has {RUN} characters in this view")
    scale = _scale(_Profiles(newest, see), own, view, left_out=sorted(histories.keys() - newest))
    gap = difference([scale.ceiling], [scale.floor])
    p = gap.p / 2 if gap.value > 0 else 1.0
    if p > MAX_P:
        return Silent(
            f"these {len(users)} users cannot be told apart in this view "
            f"(AUC {scale.auc:.2f}, p {p:.2f})"
        )
    return scale


def _scale(profiles: "_Profiles", own: Texts, view: View, left_out: list[str]) -> VoiceScale:
    """Return the scale on which own words and others' are marked, for the users of `profiles`."""
    users = list(profiles.column)
    pools = [profiles.z(own[user]) for user in users]
    of_user = np.array([rows.mean(axis=0) for rows in pools])  # whose words, as whose
    ceiling = np.diagonal(of_user)
    floor = (of_user.sum(axis=0) - ceiling) / (len(users) - 1)
    return VoiceScale(
        view=view,
        floor=dict(zip(users, floor.tolist(), strict=True)),
        ceiling=dict(zip(users, ceiling.tolist(), strict=True)),
        auc=_auc(pools),
        left_out=left_out,
        _profiles=profiles,
    )


class _Profiles:
    """What every user's history looks like, each text seen as `see` returns it."""

    def __init__(self, histories: Texts, see: Callable[[str], str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.column = {user: index for index, user in enumerate(histories)}
        self._see = see
        self._vectorizer = TfidfVectorizer(analyzer=runs_of, sublinear_tf=True)
        self._vectorizer.fit(map(self._see, _all(histories)))
        self._of_users = self._vectors(histories.values())

    def own_z(self, user: str, texts: Sequence[str]) -> float:
        """Return how far the profile of `user` stands out, the mean over pools of `texts`."""
        return float(self.z(texts)[:, self.column[user]].mean())

    def z(self, texts: Sequence[str]) -> "NDArray[np.float64]":
        """Return z, shape (pools, users), of each pool's likeness among all profiles."""
        num_pools = max(1, round(len(texts) / POOL))
        pools = np.array_split(np.arange(len(texts)), num_pools)
        likeness = self._vectors([[texts[i] for i in pool] for pool in pools]) @ self._of_users.T
        rows: NDArray[np.float64] = likeness.toarray()
        spread = rows.std(axis=1, keepdims=True)
        deviation = rows - rows.mean(axis=1, keepdims=True)
        z = np.zeros_like(rows)
        np.divide(deviation, spread, out=z, where=spread > 0)
        return z

    def _vectors(self, groups: Iterable[Sequence[str]]) -> Any:
        """Return a vector of length 1 for each group of texts, a sparse matrix."""
        return self._vectorizer.transform("\n".join(map(self._see, texts)) for texts in groups)


def runs_of(text: str) -> list[str]:
    """Return the runs of four characters: case and line breaks are a part of a voice."""
    return [text[start : start + RUN] for start in range(len(text) - RUN + 1)]


def _auc(pools: "Sequence[NDArray[np.float64]]") -> float:
    """Return the AUC of z, given for each user that user's pools, shape (pools, users)."""
    from sklearn.metrics import roc_auc_score

    is_own = [np.eye(len(pools))[[index] * len(rows)] for index, rows in enumerate(pools)]
    return float(roc_auc_score(np.vstack(is_own).ravel(), np.vstack(pools).ravel()))


def _all(texts: Texts) -> Iterable[str]:
    return (text for of_user in texts.values() for text in of_user)
