"""One user's part of a comparison, and what is kept of it.

    USER/results.json               likelihoods and answers, each under a digest of all it rests on
    USER/SFT-REST/sft, dpo, …       adapters, under digests of what trained them

So another recipe, history or way finds what it can use, and nothing that was trained is removed.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.engine import WEIGHTS, Base
from langchain_cope.errors import InputError
from langchain_cope.evaluation.shown_items import OwnItems
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.training.encode import Encoded
from langchain_cope.training.pipeline import copy_folder
from langchain_cope.training.progress import Stage
from langchain_cope.training.recipe import Negatives, Recipe

FORMAT = 2  # of what a user's folder holds; what another one left is passed over
RESULTS = "results.json"
TRAINING = "training.json"  # beside the adapters: seconds of each stage, and notes
_DIGITS = 16  # of a digest in a folder's name

Token = tuple[str, float]
"""A token's text, and log p_user − log p_base of it, in nats."""


@dataclass(frozen=True)
class Answer:
    """What one way answered to one item."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    """Of ways that compute both models; empty for the others."""


@dataclass(eq=False)
class UserJob:
    """One user's part of the work, and what is done of it."""

    history: UserHistory
    recipe: Recipe
    """As used: `max_new_tokens` is filled in."""
    examples: list[Encoded]
    """The queries that fit the context."""
    base: dict[str, str]
    """What tells the base that the user is trained on from others."""
    home: Path
    """The user's own folder."""
    own: OwnItems
    notes: list[str]
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage of the training."""
    nll: dict[str, float] = field(default_factory=dict)
    """Nats per token, by a digest of what they rest on."""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """One for each example, likewise."""

    @property
    def folder(self) -> Path:
        """Where the adapters of this recipe and history lie."""
        sft, dpo = self.trained_by(Stage.SFT), self.trained_by(Stage.DPO)
        return self.home / f"{sft[:_DIGITS]}-{dpo[:_DIGITS]}"

    def trained_by(self, stage: Stage) -> str:
        """Return a digest of all that the adapter of SFT or of DPO rests on."""
        return self._digest_of_dpo if stage is Stage.DPO else self._digest_of_sft

    @cached_property
    def asked(self) -> str:
        """A digest of the queries, and of how they are asked but for the way."""
        recipe = self.recipe
        sampled = recipe.negatives or Negatives()
        return digest_of(
            FORMAT,
            _texts(self.history.queries),
            [recipe.max_length, recipe.max_words, recipe.max_new_tokens],
            [recipe.repetition_penalty, sampled.temperature, sampled.top_p, recipe.seed],
        )

    @cached_property
    def shown(self) -> str:
        """A digest of the items that ways may show."""
        return digest_of(_texts(self.history.items))

    @cached_property
    def _digest_of_sft(self) -> str:
        recipe = self.recipe.as_dict()
        names = ("sft", "max_length", "max_words", "seed")
        return digest_of(FORMAT, self.base, {name: recipe[name] for name in names}, self.shown)

    @cached_property
    def _digest_of_dpo(self) -> str:
        recipe = self.recipe.as_dict()
        names = ("negatives", "dpo", "max_new_tokens")
        rejected = [item.rejected for item in self.history.items]
        return digest_of(self._digest_of_sft, {name: recipe[name] for name in names}, rejected)

    def load(self) -> None:
        """Read what was done before. Raises InputError where that cannot be read."""
        training = _read(self.folder / TRAINING)
        self.timings = training.get("timings", {})
        self.notes = list(dict.fromkeys([*self.notes, *training.get("notes", [])]))
        results = _read(self.home / RESULTS)
        self.nll = results.get("nll", {})
        for key, texts in results.get("answers", {}).items():
            self.answers[key] = [
                Answer(text, [(word, reward) for word, reward in tokens]) for text, tokens in texts
            ]

    def save(self) -> None:
        """Write likelihoods and answers, whole or not at all."""
        answers = {
            key: [[answer.text, answer.tokens] for answer in texts]
            for key, texts in self.answers.items()
        }
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.home / RESULTS, {"format": FORMAT, "nll": self.nll, "answers": answers})

    def save_training(self, notes: Sequence[str]) -> None:
        """Write what is told of the training."""
        self.notes = list(dict.fromkeys([*self.notes, *notes]))
        facts = {"format": FORMAT, "timings": self.timings, "notes": list(notes)}
        write_json(self.folder / TRAINING, facts)

    def prepare_training(self) -> None:
        """Make the folder of the adapters, with that of SFT where another training left the same.

        Trainings that differ in what comes after SFT alone share it.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self.folder / Stage.SFT.file
        if target.exists():
            return
        for other in sorted(self.home.glob(f"{self.trained_by(Stage.SFT)[:_DIGITS]}-*")):
            if (other / Stage.SFT.file).exists():
                copy_folder(other / Stage.SFT.file, target)
                seconds = _read(other / TRAINING).get("timings", {}).get(Stage.SFT.value)
                if seconds is not None:
                    self.timings[Stage.SFT.value] = seconds
                return

    @property
    def adapter_bytes(self) -> int:
        """Size of the weights of the last adapter that was trained; 0 without one."""
        for stage in (Stage.DPO, Stage.SFT):
            file = self.folder / stage.file / WEIGHTS
            if file.exists():
                return file.stat().st_size
        return 0


def home_of(folder: Path, user: UserHistory) -> Path:
    """Return the folder of a user in the folder of a comparison."""
    name = hashlib.sha256((user.user_id or "").encode("utf-8", "surrogatepass")).hexdigest()
    return folder / name[:32]


def identity_of(base: Base) -> dict[str, str]:
    """Return what tells a base from others, its precision included."""
    return {**base.fingerprint(), "dtype": str(base.dtype)}


def digest_of(*parts: Any) -> str:
    """Return a digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _texts(items: Sequence[Item]) -> list[list[object]]:
    return [[item.messages, item.completion] for item in items]


def _read(file: Path) -> dict[str, Any]:
    """Return what `write_json` wrote in this format; nothing where it is not there."""
    if not file.exists():
        return {}
    try:
        facts = read_json(file)
        if not isinstance(facts, dict):
            raise TypeError(f"it holds {type(facts).__name__}, not an object")
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{file} is damaged ({error}): remove it, and what it held is done again"
        ) from None
    return facts if facts.get("format") == FORMAT else {}
