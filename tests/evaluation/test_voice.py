"""On texts made by rule: each user has words to write about and a manner to write them in."""

import random
from collections.abc import Callable

import pytest

from langchain_cope.evaluation.voice import Silent, Texts, View, VoiceScale, voice_scale

USERS = ["ann", "bob", "cem", "dua", "eve", "fay", "gil", "hal"]
MARKS = ["!", "?", "…", ";", " -", " /", ":", " ~"]  # each user's own, for most of the sentences
COMMON = ["ba", "da", "ga", "ka", "la", "ma", "na", "ta"]  # each user has a favourite
LATIN = "aeioustrnlmdpkgb"
ALPHABETS = {
    "Latin": LATIN,
    "Cyrillic": "аеиоустрнлмдпкгб",
    "Arabic": "اويعسترنلمدبكجفق",
    "Hindi": "अआइईउसतरनलमदपकगब",
}


def words_about(user: int, alphabet: str = LATIN) -> list[str]:
    """Return 20 words that nobody else writes about."""
    rng = random.Random(user)
    return ["".join(rng.choices(alphabet, k=7)) for _ in range(20)]


def write(
    number: int, topic: int, manner: int, *, seed: int, alphabet: str = LATIN, strength: float = 0.4
) -> list[str]:
    """Return texts about what `topic` writes about, in the manner of `manner`.

    `strength` is how often the own mark ends a sentence and the favourite word is chosen.
    """
    rng = random.Random(f"{topic} {manner} {seed}")
    spell = str.maketrans(LATIN, alphabet)
    about = words_about(topic, alphabet)

    def sentence() -> str:
        chosen = []
        for _ in range(5):
            is_own = rng.random() < strength
            common = COMMON[manner] if is_own else rng.choice(COMMON)
            chosen += [common.translate(spell), rng.choice(about)]
        mark = MARKS[manner] if rng.random() < strength else rng.choice([".", *MARKS])
        return " ".join(chosen) + mark

    return [" ".join(sentence() for _ in range(3)) for _ in range(number)]


def texts(
    number: int, topic: Callable[[int], int], manner: Callable[[int], int], **kwargs: object
) -> dict[str, list[str]]:
    return {
        user: write(number, topic(index), manner(index), **kwargs)  # type: ignore[arg-type]
        for index, user in enumerate(USERS)
    }


def same(user: int) -> int:
    return user


def another(user: int) -> int:
    return (user + 3) % len(USERS)


HISTORIES = texts(30, same, same, seed=1)
OWN = texts(10, same, same, seed=2)


def scale_of(histories: Texts, own: Texts, view: View) -> VoiceScale:
    scale = voice_scale(histories, own, view)
    assert isinstance(scale, VoiceScale), scale
    return scale


SCALES = {view: scale_of(HISTORIES, OWN, view) for view in View}


def position(view: View, answers: Texts) -> float:
    score = SCALES[view].score(answers)
    assert not isinstance(score, Silent), score
    return score.position.value


@pytest.mark.parametrize("view", View)
def test_own_words_are_at_one_and_strangers_at_nought(view: View) -> None:
    assert SCALES[view].auc > 0.99
    assert position(view, OWN) == pytest.approx(1)
    assert position(view, texts(10, same, same, seed=3)) == pytest.approx(1, abs=0.15)
    assert position(view, texts(10, another, another, seed=3)) == pytest.approx(0, abs=0.15)


def test_style_hears_the_manner_and_not_the_topic() -> None:
    own_topic = texts(10, same, another, seed=3)
    own_manner = texts(10, another, same, seed=3)
    assert position(View.FULL, own_topic) > 0.7
    assert abs(position(View.STYLE, own_topic)) < 0.15
    assert position(View.FULL, own_manner) < 0.3
    assert position(View.STYLE, own_manner) > 0.85


@pytest.mark.parametrize("view", View)
def test_half_own_half_strange_lies_between(view: View) -> None:
    strange = texts(5, another, another, seed=4)
    mixed = {
        user: [text for pair in zip(OWN[user][:5], strange[user], strict=True) for text in pair]
        for user in USERS
    }
    assert 0.25 < position(view, mixed) < 0.75


def test_more_of_the_manner_than_the_user_has_is_above_one() -> None:
    caricature = texts(10, same, same, seed=3, strength=0.95)
    assert position(View.STYLE, caricature) > 1.1


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
def test_style_is_heard_in_scripts_with_spaces(alphabet: str) -> None:
    made = [texts(n, same, same, seed=n, alphabet=alphabet) for n in (30, 10)]
    scale = scale_of(made[0], made[1], View.STYLE)
    score = scale.score(texts(10, another, same, seed=3, alphabet=alphabet))
    assert not isinstance(score, Silent)
    assert score.position.value > 0.8


def test_without_spaces_style_is_silent_and_the_rest_speaks() -> None:
    han = "".join(chr(0x4E00 + 7 * index) for index in range(16))
    made = [texts(n, same, same, seed=n, alphabet=han) for n in (30, 10)]
    assert voice_scale(made[0], made[1], View.STYLE) == Silent(
        "no word boundaries: the script writes no spaces between words"
    )
    assert scale_of(made[0], made[1], View.FULL).auc > 0.99


def test_some_of_the_users_are_scored_on_their_own_scale() -> None:
    few = {user: OWN[user] for user in USERS[:3]}
    score = SCALES[View.FULL].score({**few, "stranger": ["who?"], USERS[4]: []})
    assert not isinstance(score, Silent)
    assert score.position.value == pytest.approx(1)
    assert list(score.of_user) == USERS[:3]
    assert sum(score.of_user.values()) / 3 == pytest.approx(score.position.value)


def test_answers_that_say_nothing_are_between_nobody() -> None:
    assert position(View.FULL, dict.fromkeys(USERS, [""] * 10)) == pytest.approx(0, abs=0.15)
    assert SCALES[View.FULL].score({"stranger": ["who?"]}) == Silent(
        "nobody on the scale has answers"
    )


def test_too_few_users_or_texts_are_silent_with_the_numbers() -> None:
    few_users = {user: HISTORIES[user] for user in USERS[:4]}
    reason = "4 users have 10 history texts and 5 held-out texts, and 5 are needed"
    assert voice_scale(few_users, OWN, View.FULL) == Silent(reason)
    few_texts = {user: OWN[user][:4] if user in USERS[4:] else OWN[user] for user in USERS}
    assert voice_scale(HISTORIES, few_texts, View.FULL) == Silent(reason)
    assert scale_of(HISTORIES, {**OWN, "ann": []}, View.FULL).left_out == ["ann"]


def test_users_of_one_voice_are_silent_but_for_chance() -> None:
    num_silent = 0
    for file in range(0, 2000, 100):
        histories = {user: write(20, 0, 0, seed=file + i) for i, user in enumerate(USERS)}
        own = {user: write(10, 0, 0, seed=file + i + 50) for i, user in enumerate(USERS)}
        result = voice_scale(histories, own, View.FULL)
        if isinstance(result, Silent):
            assert "8 users cannot be told apart" in result.reason
            num_silent += 1
    assert num_silent >= 17  # of 20, of which one may speak by chance


def test_texts_of_a_sign_or_two_are_silent() -> None:
    ok = dict.fromkeys(USERS, ["ok"] * 20)
    assert voice_scale(ok, ok, View.STYLE) == Silent(
        "no history text has 4 characters in this view"
    )


def test_the_newest_texts_make_the_profile() -> None:
    before = texts(60, another, another, seed=5)
    moved = {user: [*before[user], *write(60, i, i, seed=6)] for i, user in enumerate(USERS)}
    scale = scale_of(moved, OWN, View.FULL)
    assert sum(scale.ceiling.values()) > 0.95 * sum(SCALES[View.FULL].ceiling.values())
