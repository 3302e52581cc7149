"""The gate, and what is written behind it: a version goes to the store where it is better than what is active there."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapter_store import AdapterStore, AdapterVersion
from adapter_store.errors import (
    AdapterNotFoundError,
    BaseModelMismatchError,
    IntegrityError,
    PublishConflictError,
)
from langchain_cope.errors import Cancelled, ModelError
from langchain_cope.history import Item
from langchain_cope.personalization import held_out

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.encode import Example
    from langchain_cope.training.pipeline import TrainingResult

REASON_CHARACTERS = 200  # of why it was published, kept in the user's history
PUBLISH_TRIES = 3  # when someone else publishes for the same user meanwhile


@dataclass(frozen=True)
class Outcome:
    """What the gate said."""

    version: AdapterVersion | None
    """None where it refused."""
    reason: str
    published_now: bool = False
    """False also where this job had published it before it was interrupted."""
    replaced: str | None = None
    """What was active before, where it was published now."""


@dataclass(frozen=True)
class Publisher:
    """Judges what one training made, and publishes it."""

    store: AdapterStore
    user: str
    engine: "Engine"
    training: "TrainingResult"
    evaluation: "Evaluation"
    trained: Sequence[Item]
    judged: Sequence[Item]
    examples: "Sequence[Example]"
    """``judged`` as the training chain takes them."""
    instruction: str | None
    """Kept in the version's metadata."""
    gate: Literal["improve", "always"]
    min_gain: float
    job: str | None
    """A version published under this key came of this very training."""
    data_seq: int
    """Where the store's log of the user stood before the history was read: what was erased since is not published."""
    should_stop: Callable[[], bool]

    def publish_if_better(self) -> Outcome:
        """Raises ``Cancelled``, ``UserErasedError``, ``PublishConflictError`` and other errors of the store."""
        if (earlier := self._published_earlier()) is not None:
            return Outcome(
                earlier, f"published as {earlier.version} just before the job was interrupted"
            )
        for _ in range(PUBLISH_TRIES):
            active = self.store.active(self.user)
            better, reason = self._judge(active)
            if not better:
                return Outcome(None, reason)
            if self.should_stop():
                raise Cancelled("stopped on request before publishing; nothing was published")
            try:
                return Outcome(
                    self._publish(active, reason), reason, published_now=True, replaced=active
                )
            except PublishConflictError:
                continue  # someone published meanwhile: judge against that one
        raise PublishConflictError(
            f"user {self.user!r} was published by others {PUBLISH_TRIES} times while this version was; personalize again"
        )

    def withdraw(self, outcome: Outcome) -> None:
        """Take back what was published now, and make active again what was before, unless somebody has come since."""
        if outcome.version is None or not outcome.published_now:
            return
        if outcome.replaced is not None:
            # Somebody published or activated since, or what was before is no longer kept.
            with suppress(PublishConflictError, AdapterNotFoundError):
                self.store.activate(
                    self.user, outcome.replaced, expected_active=outcome.version.version
                )
        self.store.delete_version(self.user, outcome.version.version)

    def _published_earlier(self) -> AdapterVersion | None:
        if self.job is None:
            return None
        return next(
            (v for v in self.store.versions(self.user) if v.idempotency_key == self.job), None
        )

    def _judge(self, active: str | None) -> tuple[bool, str]:
        """Whether to publish, and why."""
        new = self.evaluation.metrics["dpo"]["nll"]
        if self.gate == "always":
            base = self.evaluation.metrics["base"]["nll"]
            return (
                True,
                f"published as asked (gate 'always'): held-out NLL {new:.4f} nats a token against {base:.4f} of the base",
            )
        old, against = self._reference(active)
        numbers = f"held-out NLL {new:.4f} nats a token against {old:.4f} of {against}"
        needed = f" by more than {self.min_gain:g}" if self.min_gain else ""
        if new < old - self.min_gain:
            return True, f"better{needed}: {numbers}"
        return False, f"not better{needed}: {numbers}; what is active stays as it is"

    def _reference(self, active: str | None) -> tuple[float, str]:
        """The NLL to beat, and whose it is."""
        from langchain_cope.evaluation.evaluate import mean_nll

        base_nll = self.evaluation.metrics["base"]["nll"]
        if active is None:
            return base_nll, "the base"
        try:
            version = self.store.resolve(self.user, active, base=self.engine.base.fingerprint())
        except BaseModelMismatchError:
            return base_nll, f"the base (the active version {active} was trained on another base)"
        except AdapterNotFoundError:
            return base_nll, "the base"  # deleted a moment ago
        seen = held_out.overlap(version.metadata.get("trained_on"), self.judged)
        if seen:
            return (
                base_nll,
                f"the base (the active version {active} was trained on {seen} of the held-out items)",
            )
        try:
            adapter = self.engine.load_adapter(self.store.fetch_dir(version))
        except (
            IntegrityError,
            ModelError,
        ) as error:  # a damaged version must not keep its user from a new one
            return base_nll, f"the base (the active version {active} cannot be used: {error})"
        nll = mean_nll(self.engine, self.examples, self.training.recipe, adapter, self.should_stop)
        return nll, f"the active version {active}"

    def _publish(self, active: str | None, reason: str) -> AdapterVersion:
        recipe = self.training.recipe
        return self.store.publish(
            self.user,
            self.training.dpo,
            base=self.engine.base.fingerprint(),
            metrics=self.evaluation.metrics,
            alpha=recipe.alpha,
            tau=recipe.tau,
            metadata={
                "instruction": self.instruction,
                "num_trained": len(self.trained),
                "num_held_out": len(self.judged),
                "recipe": recipe.as_dict(),
                "trained_on": held_out.mark(self.trained),
            },
            idempotency_key=self.job,
            expected_active=active,
            data_seq=self.data_seq,
            reason=reason[:REASON_CHARACTERS].encode("utf-8", "replace").decode(),
        )
