"""Whether a prompt is like those of a user's history, without a forward of the base.

What a prompt is about shows in the mean of its tokens' embeddings. It is seen from the everyday
prompts of one language (`everyday_prompts.txt`, where an empty line parts languages), so that what
all prompts share counts for nothing. What is kept of a history is the mean direction of its
prompts, and how far along it everyday prompts and the history's own ones lie.

What a prompt asks for shows in words that nearly all of the history's prompts hold, such as
"headline", and that are not common in their language (`common_words.txt`, a line a language). The
first of them names what is asked for as a rule, later ones what it is about: "a headline for the
following article". Of these words digests are kept.
"""

import base64
import binascii
import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from langchain_cope.engine.checks import is_number, is_whole
from langchain_cope.engine.device import release_thread_pool
from langchain_cope.errors import ModelError

FORMAT = 1
"""Of a stored profile. Another list of everyday prompts, or other arithmetic, needs a new one."""
EVERYDAY = Path(__file__).parent / "everyday_prompts.txt"
COMMON = Path(__file__).parent / "common_words.txt"
MAX_CHARACTERS = 10_000  # of a prompt that are looked at
MAX_PROMPTS = 500  # of a history, the newest
MAX_WIDTH = 16_384  # entries of an embedding, a byte each in a stored profile
LEAST_PROMPTS = 3  # different ones: a single instruction says nothing of what else it is asked for
LEAST_GAP = 0.1  # between the everyday prompts and the median of the history's own
_EVERYDAY_QUANTILE = 0.95  # of the everyday prompts of its language, and of those of all
_OWN_QUANTILE = 0.05  # of the history's prompts
_LEAST_RAMP = 0.05
LEAST_SHARE = 0.9  # of the history's prompts that hold a word which tells what is asked for
LEAST_COMMON = 0.25  # of a prompt's words, in the languages of `common_words.txt`
MAX_WORDS = 8  # such words; of a longer template no single one says what is asked for
_EDGE = 16  # words at either end of a prompt: there it says what it asks for
_WORD = re.compile(r"[^\W\d_]{2,}")
_DIGEST = re.compile(r"[0-9a-f]{12}")
_STEPS = 4  # of the relevance: few, so that what is cached at one of them serves others too


class Everyday:
    """The everyday prompts as one base sees them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._table: Any = model.get_input_embeddings()
        self._tokenizer = tokenizer
        text = EVERYDAY.read_text(encoding="utf-8").strip()
        by_language = [self._means(group.split("\n")) for group in text.split("\n\n")]
        self._centres = torch.stack([group.mean(0) for group in by_language])
        within = torch.cat([group - group.mean(0) for group in by_language if len(group) > 1])
        self._spread = within.std(0).clamp_min(1e-6)
        self._by_language = by_language
        common = [*COMMON.read_text(encoding="utf-8").split(), *_WORD.findall(text.casefold())]
        self.common_words = {_singular(word) for word in common}
        """Words that say nothing of what one history's prompts ask for."""

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return self._centres.shape[1]

    @property
    def num_languages(self) -> int:
        """Groups of prompts."""
        return len(self._by_language)

    def language_of(self, texts: Sequence[str]) -> int:
        """Return the index of the language whose prompts lie nearest to `texts`."""
        away = (self._centres - self._means(texts).mean(0)) / self._spread
        return int(away.norm(dim=-1).argmin())

    def directions(self, texts: Sequence[str], language: int) -> Tensor:
        """Return float32 `(len(texts), width)`: unit vectors, seen from that language's prompts."""
        return self._seen_from(self._means(texts), language)

    def others(self, language: int) -> tuple[Tensor, Tensor]:
        """Return the directions of that language's prompts, and of those of all languages."""
        everyone = torch.cat(self._by_language)
        own = self._by_language[language]
        return self._seen_from(own, language), self._seen_from(everyone, language)

    def _seen_from(self, means: Tensor, language: int) -> Tensor:
        return F.normalize((means - self._centres[language]) / self._spread, dim=-1)

    @torch.inference_mode()
    def _means(self, texts: Sequence[str]) -> Tensor:
        """Return `(len(texts), width)` on the CPU; a text without tokens is 0."""
        device = self._table.weight.device
        rows = []
        for text in texts:
            ids = self._tokenizer.encode(text[:MAX_CHARACTERS], add_special_tokens=False)
            embedded = self._table(torch.tensor(ids, dtype=torch.long, device=device)).float()
            rows.append(embedded.sum(0) / max(1, len(ids)))
        return torch.stack(rows).cpu()


@dataclass(frozen=True)
class PromptProfile:
    """What the prompts of one history have in common."""

    language: int
    """Index of the everyday prompts that it is seen from."""
    centre: bytes
    """Its direction, a signed byte an entry."""
    low: float
    """Cosine with it up to which a prompt is like everyday ones."""
    high: float
    """Cosine from which a prompt is like the history's own."""
    words: tuple[str, ...] = ()
    """Digests of the words that nearly all prompts of the history share, in their order."""

    @classmethod
    def of(cls, everyday: Everyday, prompts: Sequence[str]) -> "PromptProfile | None":
        """Return the profile of `prompts`, oldest first.

        None where they do not stand out from everyday prompts, or are too few to tell.
        """
        texts = list(dict.fromkeys(prompts))[-MAX_PROMPTS:]
        if len(texts) < LEAST_PROMPTS or everyday.width > MAX_WIDTH:
            return None
        language = everyday.language_of(texts)
        directions = everyday.directions(texts, language)
        total = directions.sum(0)
        without_it = F.normalize(total - directions, dim=-1)  # each is judged by the others
        own = (directions * without_it).sum(-1)
        others = (each @ F.normalize(total, dim=0) for each in everyday.others(language))
        low = max(float(each.quantile(_EVERYDAY_QUANTILE)) for each in others)
        if not float(own.median()) - low >= LEAST_GAP:
            return None
        high = max(float(own.quantile(_OWN_QUANTILE)), low + _LEAST_RAMP)
        centre = (total / total.abs().max() * 127).round().to(torch.int8).numpy().tobytes()
        words = _shared_words(texts, everyday.common_words)
        return cls(language, centre, low, high, tuple(_digest(word, centre) for word in words))

    def relevance(self, everyday: Everyday, questions: Sequence[str]) -> float:
        """Return how much a conversation is like the history's prompts: 0, ¼, ½, ¾ or 1.

        Its question that is most like them counts: what follows, such as "Shorter, please.", has
        no wording by which it could be told. With the word that names what the history's prompts
        ask for it is 1, with another word that they share ½ at least. 0 without a question.
        """
        if not questions:
            return 0.0
        by_words = max(map(self._by_words, questions))
        if by_words == 1:
            return by_words
        directions = everyday.directions(questions, self.language)
        cosine = float((directions @ self._direction).max())
        release_thread_pool()  # callers' idle threads would slow the engine's
        share = min(1.0, max(0.0, (cosine - self.low) / (self.high - self.low)))
        return max(by_words, round(share * _STEPS) / _STEPS)

    def _by_words(self, question: str) -> float:
        found = {_digest(word, self.centre) for word in words_of(question)}.intersection(self.words)
        if not found:
            return 0.0
        return 1.0 if self.words[0] in found else 0.5

    @cached_property
    def _direction(self) -> Tensor:
        entries = torch.frombuffer(bytearray(self.centre), dtype=torch.int8)
        return F.normalize(entries.float(), dim=0)

    def to_stored(self) -> dict[str, Any]:
        """Return what JSON keeps of it: numbers and digests, no text."""
        return {
            "format": FORMAT,
            "language": self.language,
            "centre": base64.b64encode(self.centre).decode(),
            "low": self.low,
            "high": self.high,
            "words": list(self.words),
        }

    @classmethod
    def from_stored(cls, stored: object, everyday: Everyday) -> "PromptProfile | None":
        """Return what `to_stored` wrote; None where there is none, or of another format.

        Raises ModelError for what cannot be a profile of this base.
        """
        if stored is None:
            return None
        problem = _problem(stored, everyday)
        if problem:
            raise ModelError(
                f"what the version keeps of its prompts cannot be used: {problem}; "
                "activate another version, or ask with the fixed contrast"
            )
        assert isinstance(stored, Mapping)
        if stored["format"] != FORMAT:
            return None
        centre = base64.b64decode(stored["centre"])
        low, high = float(stored["low"]), float(stored["high"])
        words = tuple(stored.get("words", ()))  # what was published before has none
        return cls(stored["language"], centre, low, high, words)


def _problem(stored: object, everyday: Everyday) -> str:
    """Return why `stored` is no profile; empty where it is one, or one of another format."""
    if not isinstance(stored, Mapping) or not is_whole(stored.get("format"), least=1):
        return "it is no object with a format"
    if stored["format"] != FORMAT:
        return ""
    language, centre = stored.get("language"), stored.get("centre")
    low, high = stored.get("low"), stored.get("high")
    if not (is_whole(language, least=0) and language < everyday.num_languages):
        return "its language is not one of those known"
    if not (is_number(low, least=-1, most=1) and is_number(high, least=-1, most=2)):
        return "its bounds are no cosines"
    if not low < high or not math.isfinite(high - low):
        return "its bounds are in the wrong order"
    if not isinstance(centre, str) or len(centre) > 2 * MAX_WIDTH:
        return "its direction is no short text"
    try:
        entries = base64.b64decode(centre, validate=True)
    except (binascii.Error, ValueError):
        return "its direction is not base64"
    if len(entries) != everyday.width or not any(entries):
        return f"its direction has {len(entries)} entries, the base's embeddings {everyday.width}"
    words = stored.get("words", [])
    if not isinstance(words, list) or len(words) > MAX_WORDS:
        return f"its words are no list of {MAX_WORDS} at most"
    if not all(isinstance(word, str) and _DIGEST.fullmatch(word) for word in words):
        return "its words are no digests"
    return ""


def words_of(text: str) -> list[str]:
    """Return the first and the last words of `text`, each once, folded, without a plural's s."""
    half = MAX_CHARACTERS // 2
    folded = unicodedata.normalize("NFKC", f"{text[:half]} {text[-half:]}").casefold()
    found = _WORD.findall(folded)
    return list(dict.fromkeys(map(_singular, [*found[:_EDGE], *found[-_EDGE:]])))


def _singular(word: str) -> str:
    plural = len(word) > 4 and word.endswith("s") and not word.endswith("ss")
    return word[:-1] if plural else word


def _shared_words(texts: Sequence[str], common: Collection[str]) -> list[str]:
    """Return the words that nearly all of `texts` hold, in order; [] where they tell nothing."""
    places = defaultdict[str, list[int]](list)
    for text in texts:
        for place, word in enumerate(words_of(text)):
            places[word].append(place)
    num_common = sum(len(places[word]) for word in places if word in common)
    if num_common < LEAST_COMMON * sum(map(len, places.values())):
        return []  # a language whose common words are not known
    least = LEAST_SHARE * len(texts)
    shared = [word for word in places if len(places[word]) >= least and word not in common]
    if len(shared) > MAX_WORDS:
        return []
    return sorted(shared, key=lambda word: fmean(places[word]))


def _digest(word: str, key: bytes) -> str:
    """Return what is kept of a word.

    It is no secret: who has the version can try words. The key, the history's direction, only keeps
    lists of ready-made digests from being of use.
    """
    return hashlib.blake2b(word.encode(), digest_size=6, key=key[:64]).hexdigest()


def questions_of(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts of the user's turns in order; of the last turn where none is the user's."""
    asked = [turn for turn in turns if turn["role"] == "user"] or list(turns[-1:])
    return [str(turn["content"]) for turn in asked]
