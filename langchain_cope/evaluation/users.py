"""Many users, many ways: train, score and answer, each user's work kept in one folder.

    train(user) → sft, dpo     score(user) → NLL     answer() → texts of all users in one run

What a user's folder holds (`user_job.py`) is not done again, so that an evaluation goes on where it
was stopped. Read `Comparison`; what is made of the texts is `measures.py`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from langchain_cope.engine import (
    ADAPTER_ALONE,
    Adapter,
    Base,
    Completion,
    Engine,
    Request,
    Sampling,
    give_back,
)
from langchain_cope.errors import HistoryError, InputError
from langchain_cope.evaluation.comparison import check_has_queries
from langchain_cope.evaluation.evaluate import over_all_tokens
from langchain_cope.evaluation.shown_items import ABOUT_AS_MANY, OwnItems, Question
from langchain_cope.evaluation.user_job import Answer, UserJob, digest_of, home_of, identity_of
from langchain_cope.evaluation.ways import Shown, Way
from langchain_cope.history.items import UserHistory
from langchain_cope.strength import Strength, strength_for
from langchain_cope.training.encode import Encoded, encode, fit, parts_of_reply, usual_length
from langchain_cope.training.pipeline import train_user, trained_by
from langchain_cope.training.progress import Monitor, Stage
from langchain_cope.training.recipe import Negatives, Recipe, RecipeChoice, recipe_for


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
            InputError: A way needs a task adapter, or another user, and there is none; two users
                have one id; or what was done before cannot be read.
        """
        self.ways = tuple(ways)
        self._plain = engine
        self._trained = task_engine or engine
        if any(way.needs_task for way in ways) and task_engine is None:
            names = ", ".join(way.name for way in ways if way.needs_task)
            raise InputError(f"{names}: needs a task adapter (--task-adapter FOLDER)")
        if any(way.early_exit for way in ways) and not self._trained.num_exits:
            names = ", ".join(way.name for way in ways if way.early_exit)
            raise InputError(
                f"{names}: {type(engine.base.model).__name__} cannot be read out after half of its "
                "layers: name the other ways (--ways)"
            )
        if any(way.of_another for way in ways) and len(users) < 2:
            raise InputError("another user's adapter needs another user: give two or more")
        if len({user.user_id for user in users}) < len(users):
            raise InputError("two users have the same id, or none: give each an id of their own")
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
        job.prepare_training()
        last = Stage.DPO if Stage.DPO in stages else Stage.SFT
        training = train_user(
            self._trained, job.history.items, job.recipe, job.folder, monitor, last=last
        )
        for stage in (Stage.SFT, Stage.NEGATIVES, Stage.DPO):
            if stage.value in monitor.timings:  # taken: the next user's are told apart
                job.timings[stage.value] = monitor.timings.pop(stage.value)
        job.save_training(training.notes)

    def score(self, job: UserJob, monitor: Monitor) -> None:
        """Measure the NLL of the ways that have one."""
        for way in self.ways:
            key = self._key(job, way)
            if way.has_nll and key not in job.nll:
                engine = self._engine(way)
                pairs = self._sequences(job, way)
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
        return job.folder / self._last_stage(job).file

    def _last_stage(self, job: UserJob) -> Stage:
        for stage in (Stage.DPO, Stage.SFT):
            if (job.folder / stage.file).exists():
                return stage
        raise InputError("no way has an adapter to look at: name sft or cope among the ways")

    def nll_under(self, job: UserJob, owner: UserJob, monitor: Monitor) -> float:
        """Return the NLL of a user's queries under the last adapter of `owner`, scored once."""
        stage = self._last_stage(owner)
        key = digest_of(job.asked, owner.trained_by(stage))
        if key not in job.nll:
            pairs = [(example.prompt_ids, example.completion_ids) for example in job.examples]
            adapter = self._trained.load_adapter(owner.folder / stage.file)
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
            recipe = replace(recipe, max_new_tokens=usual_length(trained))
        examples, notes = fit(base, user.queries, recipe.max_length, recipe.max_words)
        if not examples:
            raise HistoryError(
                f"user {user.user_id!r:.80}: none of {len(user.queries)} queries can be judged: "
                f"{'; '.join(notes)}"
            )
        longest = recipe.max_new_tokens or 0
        questions = [
            Question(example.item.messages, max(longest, len(example.completion_ids)))
            for example in examples
        ]
        return UserJob(
            history=user,
            recipe=recipe,
            examples=examples,
            base=identity_of(base),
            home=home_of(folder, user),
            own=OwnItems(base, user.items, questions),
            notes=[*user.notes, *notes],
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

    def _trained_by(self, job: UserJob, way: Way) -> Stage | None:
        if way.adapter is None:
            return None
        return trained_by(self._owner(job, way).folder, way.adapter)

    def _key(self, job: UserJob, way: Way) -> str:
        """Return what stands for a way in a user's file: equal where the work is the same."""
        strength = asdict(self._strength(job)) if way.contrastive else None
        shown = {
            Shown.NOTHING: None,
            Shown.RETRIEVED: job.shown,
            Shown.NEWEST: [job.shown, ABOUT_AS_MANY],
        }
        return digest_of(
            asdict(way),
            identity_of(self._engine(way).base),
            job.asked,
            shown[way.shown],
            self._owner(job, way).trained_by(way.adapter) if way.adapter else None,
            strength,
        )

    def _strength(self, job: UserJob) -> Strength:
        """Return how strongly adapters act in contrastive ways: by the recipe, else as usual."""
        fingerprint = self._trained.base.fingerprint()
        return strength_for(fingerprint, job.recipe.alpha, job.recipe.tau)

    def _sequences(self, job: UserJob, way: Way) -> list[tuple[list[int], list[int]]]:
        """Return each prompt, and what the user wrote, as token ids."""
        if way.shown is Shown.NOTHING:
            return [(example.prompt_ids, example.completion_ids) for example in job.examples]
        return [
            (encode(self._trained.base, prompt, example.item.completion)[0], example.completion_ids)
            for prompt, example in zip(job.own.prompts(way.shown), job.examples, strict=True)
        ]

    def _plan(self, engine: Engine) -> list[tuple[UserJob, list[list[Way]]]]:
        """Return for each user the ways that have not answered yet, in groups that are asked alike.

        Those are of equal samples, and of one adapter: where DPO was skipped it left SFT's.
        """
        plan = []
        for job in self.jobs:
            groups: dict[Way, list[Way]] = {}
            for way in self.ways:
                if self._engine(way) is engine and self._key(job, way) not in job.answers:
                    alike = replace(
                        way,
                        name="",
                        adapter=self._trained_by(job, way),
                        samples=min(2, way.samples),
                    )
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
        base, strength = self._trained.base, self._strength(job)
        folders = {group[0]: self._adapter_folder(job, group[0]) for group in groups}
        adapters = {
            folder: self._trained.load_adapter(folder) for folder in folders.values() if folder
        }
        prompts = {group[0]: job.own.prompts(group[0].shown) for group in groups}
        for index, example in enumerate(job.examples):
            for group in groups:
                way = group[0]
                bare = base.prompt_ids(example.item.messages)
                prompt = base.prompt_ids(prompts[way][index])
                most = max(way.samples for way in group)
                for number in range(most):
                    yield Request(
                        prompt,
                        base_prompt=bare if way.contrastive and prompt != bare else None,
                        adapter=adapters[folder] if (folder := folders[way]) else None,
                        adapter_scale=strength.adapter_scale if way.contrastive else 1.0,
                        contrast=strength.contrast if way.contrastive else ADAPTER_ALONE,
                        sampling=_sampling(job.recipe, example, number, is_sample=most > 1),
                        parts=parts_of_reply(base, prompt),
                        logprobs=way.contrastive or most > 1,
                        early_exit=self._trained.num_exits // 2 if way.early_exit else None,
                        offline=True,
                    )


def _sampling(recipe: Recipe, example: Encoded, number: int, *, is_sample: bool) -> Sampling:
    greedy = Sampling(
        max_tokens=recipe.max_new_tokens or 1, repetition_penalty=recipe.repetition_penalty
    )
    if not is_sample:
        return greedy
    seed = int(digest_of(recipe.seed, example.index, number)[:15], 16)
    settings = recipe.negatives or Negatives()
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
