"""Many users, many ways: train, score and answer, each user's work kept in one folder.

    train(user) → sft, dpo     score(user) → NLL     answer() → texts of all users in one run

What a user's folder holds is not done again, so that an evaluation goes on where it was stopped.
Read `Comparison`; what is made of the texts is `measures.py`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from langchain_cope.atomic_files import read_json, write_json
from langchain_cope.engine import (
    ADAPTER_ALONE,
    WEIGHTS,
    Adapter,
    Base,
    Completion,
    Engine,
    Message,
    Request,
    Sampling,
    give_back,
)
from langchain_cope.errors import HistoryError, InputError
from langchain_cope.evaluation.comparison import check_has_queries
from langchain_cope.evaluation.evaluate import over_all_tokens
from langchain_cope.evaluation.shown_items import OwnItems
from langchain_cope.evaluation.ways import Shown, Way
from langchain_cope.history.items import Item, UserHistory
from langchain_cope.training.encode import Encoded, encode, fit, parts_of_reply
from langchain_cope.training.pipeline import train_user
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Recipe, RecipeChoice, recipe_for

FORMAT = 1  # of what a user's folder holds
ANSWERS = "answers.json"

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
    examples: list[Encoded]
    """The queries that fit the context."""
    notes: list[str]
    digest: str
    """Of all that the work depends on but the ways."""
    folder: Path
    own: OwnItems
    timings: dict[str, float] = field(default_factory=dict)
    nll: dict[str, float] = field(default_factory=dict)
    """Nats per token, by the key of a way."""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    """One for each example, by the key of a way."""

    def save(self) -> None:
        """Write what is done, whole or not at all."""
        answers = {
            key: [[answer.text, answer.tokens] for answer in texts]
            for key, texts in self.answers.items()
        }
        facts = {"digest": self.digest, "timings": self.timings, "nll": self.nll}
        write_json(self.folder / ANSWERS, {**facts, "notes": self.notes, "answers": answers})

    def load(self) -> None:
        """Read what was done before; empty the folder where it was of another input."""
        file = self.folder / ANSWERS
        facts = read_json(file) if file.exists() else {}
        if facts.get("digest") != self.digest:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(mode=0o700, parents=True)
            self.save()
            return
        self.timings, self.nll, self.notes = facts["timings"], facts["nll"], facts["notes"]
        for key, texts in facts["answers"].items():
            self.answers[key] = [
                Answer(text, [(word, reward) for word, reward in tokens]) for text, tokens in texts
            ]

    @property
    def adapter_bytes(self) -> int:
        """Size of the weights of the last adapter that was trained; 0 without one."""
        for stage in (Stage.DPO, Stage.SFT):
            file = self.folder / stage.file / WEIGHTS
            if file.exists():
                return file.stat().st_size
        return 0


class Comparison:
    """Compares ways of answering over the users of a file. Publishes nothing."""

    def __init__(
        self,
        engine: Engine,
        users: Sequence[UserHistory],
        folder: str | os.PathLike[str],
        ways: Sequence[Way],
        *,
        task_engine: Engine | None = None,
        recipe: RecipeChoice = None,
    ) -> None:
        """Read what was done before in `folder`, and check the users.

        Args:
            engine: Of the base without a task adapter.
            users: Each is trained on `items` and compared on `queries`.
            folder: Where each user's work is kept. It holds what users wrote: keep it private.
            ways: What is compared.
            task_engine: Of the same base with the task adapter; users are then trained on it.
            recipe: None: `Recipe.for_model`.

        Raises:
            HistoryError: Items or queries are missing, or none of them fits the context.
            InputError: A way needs a task adapter, or another user, and there is none.
        """
        self.ways = tuple(ways)
        self._plain = engine
        self._trained = task_engine or engine
        if any(way.needs_task for way in ways) and task_engine is None:
            names = ", ".join(way.name for way in ways if way.needs_task)
            raise InputError(f"{names}: needs a task adapter (--task-adapter FOLDER)")
        if any(way.of_another for way in ways) and len(users) < 2:
            raise InputError("another user's adapter needs another user: give two or more")
        self.jobs = [self._job(user, Path(folder), recipe) for user in users]
        for job in self.jobs:
            job.load()

    def run(self, monitor: Monitor | None = None) -> None:
        """Do all that is not done yet. Raises `Cancelled` where `monitor` asks for a stop."""
        monitor = monitor or Monitor()
        for job in self.jobs:
            self.train(job, monitor)
        for job in self.jobs:
            self.score(job, monitor)
        self.answer(monitor)

    def train(self, job: UserJob, monitor: Monitor) -> None:
        """Train the adapters that the ways need. Raises what `train_user` raises."""
        stages = {way.adapter for way in self.ways} - {None}
        if not stages or all((job.folder / stage.file).exists() for stage in stages if stage):
            return
        last = Stage.DPO if Stage.DPO in stages else Stage.SFT
        training = train_user(
            self._trained, job.history.items, job.recipe, job.folder, monitor, last=last
        )
        job.notes = list(dict.fromkeys([*job.notes, *training.notes]))
        for stage in (Stage.SFT, Stage.NEGATIVES, Stage.DPO):
            if stage.value in monitor.timings:  # taken: the next user's are told apart
                job.timings[stage.value] = monitor.timings.pop(stage.value)
        job.save()

    def score(self, job: UserJob, monitor: Monitor) -> None:
        """Measure the NLL of the ways that have one."""
        for way in self.ways:
            key = self._key(job, way)
            if way.has_nll and key not in job.nll:
                engine = self._engine(way)
                pairs = [self._sequence(job, way, example) for example in job.examples]
                adapter = self._adapter(job, way)
                log_probs = engine.score(pairs, adapter, monitor.should_stop)
                job.nll[key] = over_all_tokens([of_item.tolist() for of_item in log_probs])
                job.save()

    def answer(self, monitor: Monitor) -> None:
        """Let the ways answer: all users in one run of each engine."""
        with monitor.stage(Stage.EVALUATE):
            engines = [self._plain]
            if self._trained is not self._plain:
                engines.append(self._trained)
            plans = [(engine, self._plan(engine)) for engine in engines]
            total = sum(len(job.examples) for _, plan in plans for job, _ in plan)
            done = 0
            for engine, plan in plans:
                done = self._answer_on(engine, plan, monitor, done, total)
                give_back(engine.base.device)

    @property
    def trained_engine(self) -> Engine:
        """The engine of the base that users are trained on."""
        return self._trained

    def last_adapter(self, job: UserJob) -> Path:
        """Return the folder of the last adapter that was trained for the user.

        Raises `InputError` where there is none, as none of the ways needs one.
        """
        for stage in (Stage.DPO, Stage.SFT):
            if (job.folder / stage.file).exists():
                return job.folder / stage.file
        raise InputError("no way has an adapter to look at: name sft or cope among the ways")

    def nll_under(self, job: UserJob, owner: UserJob, monitor: Monitor) -> float:
        """Return the NLL of a user's queries under the last adapter of `owner`, scored once."""
        folder = self.last_adapter(owner)
        key = _digest(job.digest, owner.digest, folder.name)
        if key not in job.nll:
            pairs = [(example.prompt_ids, example.completion_ids) for example in job.examples]
            adapter = self._trained.load_adapter(folder)
            log_probs = self._trained.score(pairs, adapter, monitor.should_stop)
            job.nll[key] = over_all_tokens([of_item.tolist() for of_item in log_probs])
        return job.nll[key]

    def nll_of(self, job: UserJob, way: Way) -> float | None:
        """Return what `score` measured; None for a way that has none."""
        return job.nll[self._key(job, way)] if way.has_nll else None

    def answers_of(self, job: UserJob, way: Way) -> list[Answer]:
        """Return what `answer` found."""
        return job.answers[self._key(job, way)]

    def _job(self, user: UserHistory, folder: Path, choice: RecipeChoice) -> UserJob:
        check_has_queries(user, f"user {user.user_id!r:.80}")
        base = self._trained.base
        recipe = recipe_for(choice, base, user.items)
        if recipe.max_new_tokens is None:
            trained, _ = fit(base, user.items, recipe.max_length, recipe.max_words)
            longest = max((len(example.completion_ids) for example in trained), default=1)
            recipe = replace(recipe, max_new_tokens=longest)
        examples, notes = fit(base, user.queries, recipe.max_length, recipe.max_words)
        if not examples:
            raise HistoryError(
                f"user {user.user_id!r:.80}: none of {len(user.queries)} queries can be judged: "
                f"{'; '.join(notes)}"
            )
        name = hashlib.sha256((user.user_id or "").encode("utf-8", "surrogatepass")).hexdigest()
        return UserJob(
            history=user,
            recipe=recipe,
            examples=examples,
            notes=[*user.notes, *notes],
            digest=_digest(
                FORMAT,
                _identity(base),
                {**recipe.as_dict(), "alpha": None, "tau": None},  # nothing is trained by them
                *(_texts(items) for items in (user.items, user.queries)),
            ),
            folder=folder / name[:32],
            own=OwnItems(base, user.items),
        )

    def _engine(self, way: Way) -> Engine:
        on_trained = way.needs_task or way.adapter is not None
        return self._trained if on_trained else self._plain

    def _owner(self, job: UserJob, way: Way) -> UserJob:
        """Return whose adapter answers: the job's own, or the next user's."""
        if not way.of_another:
            return job
        return self.jobs[(self.jobs.index(job) + 1) % len(self.jobs)]

    def _adapter(self, job: UserJob, way: Way) -> Adapter | None:
        folder = self._adapter_folder(job, way)
        return None if folder is None else self._trained.load_adapter(folder)

    def _adapter_folder(self, job: UserJob, way: Way) -> Path | None:
        if way.adapter is None:
            return None
        return self._owner(job, way).folder / way.adapter.file

    def _key(self, job: UserJob, way: Way) -> str:
        """Return what stands for a way in a user's file: equal where the work is the same."""
        engine = self._engine(way)
        contrast = [job.recipe.alpha, job.recipe.tau] if way.contrastive else []
        return _digest(asdict(way), _identity(engine.base), self._owner(job, way).digest, contrast)

    def _prompt(self, job: UserJob, way: Way, example: Encoded) -> list[Message]:
        if way.shown is Shown.NOTHING:
            return example.item.messages
        answer = max(job.recipe.max_new_tokens or 0, len(example.completion_ids))
        return job.own.prompt(example.item.messages, way.shown, answer)

    def _sequence(self, job: UserJob, way: Way, example: Encoded) -> tuple[list[int], list[int]]:
        """Return the prompt, and what the user wrote, as token ids."""
        if way.shown is Shown.NOTHING:
            return example.prompt_ids, example.completion_ids
        messages = self._prompt(job, way, example)
        prompt, _ = encode(self._trained.base, messages, example.item.completion)
        return prompt, example.completion_ids

    def _plan(self, engine: Engine) -> list[tuple[UserJob, list[list[Way]]]]:
        """Return for each user the ways that have not answered yet, in groups of equal samples."""
        plan = []
        for job in self.jobs:
            groups: dict[Way, list[Way]] = {}
            for way in self.ways:
                if self._engine(way) is engine and self._key(job, way) not in job.answers:
                    alike = replace(way, name="", samples=2) if way.samples > 1 else way
                    groups.setdefault(alike, []).append(way)
            if groups:
                plan.append((job, list(groups.values())))
        return plan

    def _answer_on(
        self,
        engine: Engine,
        plan: list[tuple[UserJob, list[list[Way]]]],
        monitor: Monitor,
        done: int,
        total: int,
    ) -> int:
        requests = (request for job, groups in plan for request in self._requests(job, groups))
        with closing(engine.generate_each(requests, monitor.should_stop)) as completions:
            for job, groups in plan:
                found: dict[str, list[Answer]] = {}
                for _ in job.examples:
                    for group in groups:
                        most = max(way.samples for way in group)
                        samples = [next(completions) for _ in range(most)]
                        for way in group:
                            chosen = _best(samples[: way.samples])
                            answer = _answer(engine.base, chosen)
                            found.setdefault(self._key(job, way), []).append(answer)
                    done += 1
                    monitor.step_done(done, total)
                job.answers.update(found)
                job.save()
        return done

    def _requests(self, job: UserJob, groups: list[list[Way]]) -> Iterator[Request]:
        base = self._trained.base
        folders = {group[0]: self._adapter_folder(job, group[0]) for group in groups}
        adapters = {
            folder: self._trained.load_adapter(folder) for folder in folders.values() if folder
        }
        for example in job.examples:
            for group in groups:
                way = group[0]
                bare = base.prompt_ids(example.item.messages)
                prompt = base.prompt_ids(self._prompt(job, way, example))
                most = max(way.samples for way in group)
                for number in range(most):
                    yield Request(
                        prompt,
                        base_prompt=bare if way.contrastive and prompt != bare else None,
                        adapter=adapters[folder] if (folder := folders[way]) else None,
                        contrast=job.recipe.contrast if way.contrastive else ADAPTER_ALONE,
                        sampling=_sampling(job.recipe, example, number, is_sample=most > 1),
                        parts=parts_of_reply(base, prompt),
                        logprobs=way.contrastive or most > 1,
                        offline=True,
                    )


def _sampling(recipe: Recipe, example: Encoded, number: int, *, is_sample: bool) -> Sampling:
    greedy = Sampling(
        max_tokens=recipe.max_new_tokens or 1, repetition_penalty=recipe.repetition_penalty
    )
    if not is_sample:
        return greedy
    seed = int(_digest(recipe.seed, example.index, number)[:15], 16)
    settings = recipe.negatives
    return replace(greedy, temperature=settings.temperature, top_p=settings.top_p, seed=seed)


def _best(samples: Sequence[Completion]) -> Completion:
    """Return the sample of the highest reward: the mean over tokens of log p_user − log p_base."""
    if len(samples) == 1:
        return samples[0]
    return max(samples, key=_reward)


def _reward(completion: Completion) -> float:
    tokens = completion.logprobs
    return sum(token.log_p_user - token.log_p_base for token in tokens) / max(1, len(tokens))


def _answer(base: Base, completion: Completion) -> Answer:
    tokens = [
        (token.text, round(token.log_p_user - token.log_p_base, 3))
        for token in completion.logprobs
        if token.token_id not in base.hidden_ids
    ]
    is_whole = "".join(text for text, _ in tokens).strip() == completion.text.strip()
    return Answer(completion.text, tokens if is_whole else [])


def _identity(base: Base) -> dict[str, str]:
    return {**base.fingerprint(), "dtype": str(base.dtype)}


def _texts(items: Sequence[Item]) -> list[list[object]]:
    return [[item.messages, item.completion, item.rejected] for item in items]


def _digest(*parts: Mapping[str, Any] | Sequence[Any] | int) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
