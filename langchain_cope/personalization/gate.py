"""The gate: a version is published where the verdict on it is good enough, else nothing is."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapter_store import AdapterStore, AdapterVersion
from adapter_store.errors import (
    AdapterNotFoundError,
    BaseModelMismatchError,
    IntegrityError,
    PublishConflictError,
)
from langchain_cope.errors import Cancelled, ModelError
from langchain_cope.evaluation.ways import BASE, DPO, SFT
from langchain_cope.history.items import Item
from langchain_cope.personalization.certainty import Prior, prior_of
from langchain_cope.personalization.evidence import NO_EVIDENCE, Evidence, gather, units_of
from langchain_cope.personalization.held_out import count_trained_on, fingerprint_items
from langchain_cope.personalization.result import Recommendation, Verdict
from langchain_cope.personalization.verdict import Reference, choose_adapter, judge
from langchain_cope.strength import RECOMMENDED
from langchain_cope.training.progress import Monitor

if TYPE_CHECKING:
    from langchain_cope.engine import Adapter, Engine
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.pipeline import TrainingResult

JUDGED_AGAINST = "judged_against"
"""In a version's metadata: what was active when it was judged, None for nothing."""
REASON_CHARACTERS = 200  # of why it was published, kept in the user's history
LIKELIER_THAN_NOT = 0.5  # how sure of beating the active version, which is proven itself
PUBLISH_TRIES = 3  # when another process publishes for the same user meanwhile


@dataclass(frozen=True)
class Outcome:
    """What the gate decided."""

    version: AdapterVersion | None
    """The version published; None where the gate refused."""
    reason: str
    verdict: Verdict | None = None
    """None where this job had published it before it was interrupted."""
    published_now: bool = False
    """False also where this job had published it before it was interrupted."""
    replaced: str | None = None
    """The version that was active before, where one was published now."""


def published_under(store: AdapterStore, user: str, job_key: str) -> AdapterVersion | None:
    """Return the user's version, or the candidate, that came of the training of that key."""
    waiting = store.candidate(user)
    kept = [*store.versions(user), *([waiting] if waiting else [])]
    return next((one for one in kept if one.idempotency_key == job_key), None)


def better_adapter(evaluation: "Evaluation") -> str:
    """Return the name of the better one of both adapters: that one is judged."""
    return choose_adapter(evaluation.item_nll, [SFT.name, DPO.name])


@dataclass(frozen=True)
class Publisher:
    """Judges the result of one training, and publishes it."""

    store: AdapterStore
    user: str
    engine: "Engine"
    training: "TrainingResult"
    evaluation: "Evaluation"
    """Of `held_out`."""
    adapter: str
    """The stage that trained the adapter to be judged."""
    recommended: Recommendation
    """How strongly it is to act; published with it."""
    fault: str | None
    """What is wrong with its answers at that strength, None for nothing."""
    trained: Sequence[Item]
    held_out: Sequence[Item]
    """Those that judge."""
    num_items: int
    """All of the history's, with those that judge nothing."""
    instruction: str | None
    """Kept in the version's metadata."""
    gate: Literal["improve", "always"]
    min_gain: float
    """Nats per token by which every reference must be beaten."""
    reference_adapter: str | os.PathLike[str] | None
    """A peft folder that must be beaten too."""
    job_key: str
    """A version published under this key came of this very training."""
    data_seq: int
    """Where the store's log of the user stood before the history was read.

    What was erased since is not published.
    """
    monitor: Monitor
    """Asked whether to stop, before publishing and while the active version is scored."""
    candidate: bool = False
    """Whether a version that passes only waits in the store, for `AdapterStore.accept`."""

    def publish_if_better(self) -> Outcome:
        """Publish the adapter where the gate lets it pass, and return what the gate decided.

        Raises `Cancelled`, and `UserErasedError`, `PublishConflictError` and other errors of the
        store.
        """
        earlier = self._published_earlier()
        if earlier is not None:
            reason = f"published as {earlier.version} just before the job was interrupted"
            return Outcome(earlier, reason)
        for _ in range(PUBLISH_TRIES):
            active = self.store.active(self.user)
            verdict = self._judge(active)
            if not verdict.published:
                return Outcome(None, verdict.reason, verdict)
            if self.monitor.should_stop():
                raise Cancelled("stopped on request before publishing; nothing was published")
            try:
                version = self._publish(active, verdict)
            except PublishConflictError:
                continue  # another process published meanwhile: judge against that version
            return Outcome(version, verdict.reason, verdict, published_now=True, replaced=active)
        raise PublishConflictError(
            f"other processes published for user {self.user!r} {PUBLISH_TRIES} times while this "
            "version was about to be: personalize again"
        )

    def withdraw(self, outcome: Outcome) -> None:
        """Take back what was published now, and make active again what was before.

        Another version that became active since stays active.
        """
        if outcome.version is None or not outcome.published_now:
            return
        version = outcome.version.version
        if outcome.replaced is not None:
            # Another version became active since, or the one before is no longer kept.
            with suppress(PublishConflictError, AdapterNotFoundError):
                self.store.activate(self.user, outcome.replaced, expected_active=version)
        self.store.delete_version(self.user, version)

    def _published_earlier(self) -> AdapterVersion | None:
        return published_under(self.store, self.user, self.job_key)

    def _judge(self, active: str | None) -> Verdict:
        """Return the verdict on the better one of both adapters."""
        item_nll, name = self.evaluation.item_nll, self.adapter
        prior = prior_of(self.engine.base.fingerprint())
        references, note = self._references(active)
        verdict = judge(
            name,
            item_nll[name],
            references,
            units_of([self.held_out[index] for index in self.evaluation.indices]),
            NO_EVIDENCE if self.gate == "always" else self._evidence(prior),
            prior,
            self.min_gain,
            self.num_items,
            self.fault,
        )
        reason = f"{verdict.reason} ({note})" if note else verdict.reason
        if self.gate == "always":
            reason = f"published as asked (gate 'always'): {verdict.sentence}"
            reason += f"; but {self.fault}" if self.fault else ""
            return verdict.model_copy(update={"published": True, "reason": reason, "advice": None})
        return verdict.model_copy(update={"reason": reason})

    def _evidence(self, prior: Prior) -> Evidence:
        from langchain_cope.atomic_files import read_json
        from langchain_cope.training.first_sight import FIRST_SIGHT

        return gather(
            self.engine,
            self.trained,
            self.held_out,
            self.training.recipe,
            read_json(self.training.folder / FIRST_SIGHT),
            self.evaluation.item_nll[BASE.name],
            prior,
            self.monitor.should_stop,
        )

    def _references(self, active: str | None) -> tuple[list[Reference], str]:
        """Return what has to be beaten, and why the active version is not among it, if so."""
        references = [Reference("the base", self.evaluation.item_nll[BASE.name], is_base=True)]
        if self.reference_adapter is not None:
            other = self.engine.load_adapter(Path(self.reference_adapter).expanduser())
            references.append(Reference("the reference adapter", self._item_nll(other)))
        if active is None:
            return references, ""
        try:
            version = self.store.resolve(self.user, active, base=self.engine.base.fingerprint())
        except BaseModelMismatchError:
            return references, f"the active version {active} was trained on another base"
        except AdapterNotFoundError:
            return references, ""  # deleted a moment ago
        num_seen = count_trained_on(version.metadata.get("trained_on"), self.held_out)
        if num_seen:
            return references, (
                f"the active version {active} was trained on {num_seen} of the held-out items"
            )
        try:
            adapter = self.engine.load_adapter(self.store.fetch_dir(version))
        except (IntegrityError, ModelError) as error:
            # A damaged version must not keep its user from a new one.
            return references, f"the active version {active} cannot be used: {error}"
        nll = self._item_nll(adapter)
        references.append(Reference(f"the active version {active}", nll, LIKELIER_THAN_NOT))
        return references, ""

    def _item_nll(self, adapter: "Adapter") -> list[float]:
        from langchain_cope.evaluation.evaluate import item_nll

        recipe, should_stop = self.training.recipe, self.monitor.should_stop
        return item_nll(self.engine, self.held_out, recipe, adapter, should_stop)

    def _prompts(self) -> dict[str, Any] | None:
        """Return what the trained prompts have in common, without text; None where it is little."""
        from langchain_cope.engine import PromptProfile, questions_of

        asked = [questions_of(item.messages)[-1] for item in self.trained]
        profile = PromptProfile.of(self.engine.base.everyday, asked)
        return None if profile is None else profile.to_stored()

    def _publish(self, active: str | None, verdict: Verdict) -> AdapterVersion:
        recipe = self.training.recipe
        adapter = self.training.sft if verdict.adapter == SFT.name else self.training.dpo
        task_adapter = self.engine.base.task_adapter
        return self.store.publish(
            self.user,
            adapter,
            base=self.engine.base.fingerprint(),
            metrics=self.evaluation.metrics,
            alpha=self.recommended.alpha,
            tau=self.recommended.tau,
            metadata={
                "instruction": self.instruction,
                "num_trained": len(self.trained),
                "num_held_out": len(self.held_out),
                "recipe": recipe.as_dict(),
                "task_adapter": task_adapter.name if task_adapter else None,
                "dtype": str(self.engine.base.dtype).removeprefix("torch."),
                "trained_on": fingerprint_items(self.trained),
                "prompts": self._prompts(),
                "verdict": verdict.model_dump(),
                JUDGED_AGAINST: active,
                RECOMMENDED: self.recommended.model_dump(),
            },
            candidate=self.candidate,
            idempotency_key=self.job_key,
            expected_active=active,
            data_seq=self.data_seq,
            reason=verdict.reason[:REASON_CHARACTERS].encode("utf-8", "replace").decode(),
        )
