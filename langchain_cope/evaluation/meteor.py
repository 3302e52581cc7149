"""METEOR for English, by NLTK, where WordNet's data are installed; nothing is downloaded.

Words are those of `words.py`: without punctuation, in any case.
"""

import io
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_cope._environment import a_home
from langchain_cope.errors import CopeError
from langchain_cope.evaluation.words import words

if TYPE_CHECKING:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

DEBIANS = Path("/usr/share/wordnet")
NUM_LEXICOGRAPHER_FILES = 45  # in WordNet 3.0


class WordNetMissing(CopeError):  # noqa: N818
    """WordNet's data are not installed."""

    def __init__(self) -> None:
        super().__init__(
            "METEOR needs WordNet, which is not installed: apt-get install wordnet-base, "
            "or python -m nltk.downloader wordnet"
        )


def mean_meteor(references: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean METEOR, 0 to 1, over pairs of texts. Raises `WordNetMissing`."""
    with a_home():  # nltk does not load without
        from nltk.translate.meteor_score import single_meteor_score

        wordnet = find_wordnet()
    scores = [
        single_meteor_score(words(reference), words(answer), wordnet=wordnet)
        for reference, answer in zip(references, answers, strict=True)
    ]
    return float(sum(scores) / len(scores))


@cache
def find_wordnet() -> "WordNetCorpusReader":
    """Return WordNet from NLTK's own data, else from Debian's package. Raises `WordNetMissing`."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        if not (DEBIANS / "data.noun").exists():
            raise WordNetMissing from None
        return read_debians_wordnet(DEBIANS)
    return wordnet


def read_debians_wordnet(folder: Path) -> "WordNetCorpusReader":
    """Return WordNet from a folder as Debian's `wordnet-base` lays it out.

    NLTK reads two more files as it opens WordNet, which that package does not have and METEOR does
    not need: the names of the lexicographers' files, and the numbers of senses.
    """
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # NLTK reads nothing from elsewhere

    class DebiansWordNet(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{i} - 0\n" for i in range(NUM_LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Map nothing: other languages are bound to another version's numbers."""

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The multilingual functions are not available")
        return DebiansWordNet(str(folder), omw_reader=None)
