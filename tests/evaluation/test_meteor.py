"""On a WordNet of one synset, in the files that Debian's package has, and on the real one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from langchain_cope.evaluation import meteor
from langchain_cope.evaluation.meteor import WordNetMissing, find_wordnet, mean_meteor

LICENSE = "  1 This is WordNet 3.0 Copyright 2006\n"
SYNSET = "06 n 02 sofa 0 couch 0 000 | a seat for two or more  \n"
DEBIAN_HAS_IT = (meteor.DEBIANS / "data.noun").exists()


@pytest.fixture(autouse=True)
def _only_debians(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import nltk.data

    monkeypatch.setattr(nltk.data, "path", [])
    find_wordnet.cache_clear()
    yield
    if find_wordnet.cache_info().currsize:
        for file in find_wordnet()._data_file_map.values():
            file.close()
    find_wordnet.cache_clear()


@pytest.fixture
def one_synset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"data.{part}", f"index.{part}"):
            (tmp_path / name).write_text(LICENSE)
        (tmp_path / f"{part}.exc").write_text("")
    offset = f"{len(LICENSE):08}"
    (tmp_path / "data.noun").write_text(f"{LICENSE}{offset} {SYNSET}")
    index = "".join(f"{word} n 1 0 1 0 {offset}  \n" for word in ("couch", "sofa"))
    (tmp_path / "index.noun").write_text(LICENSE + index)
    (tmp_path / "cntlist.rev").write_text("")
    monkeypatch.setattr(meteor, "DEBIANS", tmp_path)


# METEOR is F · (1 − 0.5 · (chunks / matches)³), where F = 10 · P · R / (R + 9 · P).
@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("A sofa.", 1 - 0.5 / 2**3),
        ("a couch", 1 - 0.5 / 2**3),
        ("the sofas", 0.5 * 0.5),  # a stem, and half of the words
        ("sofa a", 1 - 0.5),  # two chunks of two matches
        ("one table", 0.0),
    ],
)
@pytest.mark.usefixtures("one_synset")
def test_synonyms_and_stems_match(answer: str, score: float) -> None:
    assert mean_meteor(["a sofa"], [answer]) == pytest.approx(score)


@pytest.mark.usefixtures("one_synset")
def test_it_is_the_mean_over_pairs() -> None:
    assert mean_meteor(["a sofa", "a sofa"], ["sofa a", "none"]) == pytest.approx(0.25)


def test_without_wordnet_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meteor, "DEBIANS", tmp_path)
    with pytest.raises(WordNetMissing, match="apt-get install wordnet-base"):
        mean_meteor(["a"], ["a"])


@pytest.mark.skipif(not DEBIAN_HAS_IT, reason="needs Debian's wordnet-base")
def test_the_real_one_gives_the_value_of_nltk() -> None:
    answer = "It is a guide to action which ensures that the military always obeys the commands of"
    reference = "It is a guide to action that ensures that the military will forever heed Party"
    score = mean_meteor([f"{reference} commands"], [f"{answer} the party"])
    assert score == pytest.approx(0.6944, abs=0.00005)
    assert mean_meteor(["a red car"], ["a red auto"]) == pytest.approx(1 - 0.5 / 3**3)
