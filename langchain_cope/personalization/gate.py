"""The gate: a version is published where it is better than the active one, else nothing is."""

from collections.abc import Sequence
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
from langchain_cope.evaluation.ways import BASE, DPO
from langchain_cope.history.items import Item
from langchain_cope.personalization.held_out import count_trained_on, fingerprint_items
from langchain_cope.training.progress import Monitor

if TYPE_CHECKING:
    from langchain_cope.engine import Engine
    from langchain_cope.evaluation.evaluate import Evaluation
    from langchain_cope.training.pipeline import TrainingResult

REASON_CHARACTERS = 200  # of why it was published, kept in the user's history
PUBLISH_TRIES = 3  # when another process publishes for the same user meanwhile


@dataclass(frozen=True)
class Outcome:
    """What the gate decided."""

    version: AdapterVersion | None
    """The version published; None where the gate refused."""
    reason: str
    published_now: bool = False
    """False also where this job had published it before it was interrupted."""
    replaced: str | None = None
    """The version that was active before, where one was published now."""


@dataclass(frozen=True)
class Publisher:
    """Judges the result of one training, and publishes it."""

    store: AdapterStore
    user: str
    engine: "Engine"
    training: "TrainingResult"
    evaluation: "Evaluation"
    trained: Sequence[Item]
    held_out: Sequence[Item]
    instruction: str | None
    """Kept in the version's metadata."""
    gate: Literal["improve", "always"]
    min_gain: float
    """Nats per token by which the new version must be better."""
    job_key: str
    """A version published under this key came of this very training."""
    data_seq: int
    """Where the store's log of the user stood before the history was read.

    What was erased since is not published.
    """
    monitor: Monitor
    """Asked whether to stop, before publishing and while the active version is scored."""

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
            is_better, reason = self._judge(active)
            if not is_better:
                return Outcome(None, reason)
            if self.monitor.should_stop():
                raise Cancelled("stopped on request before publishing; nothing was published")
            try:
                version = self._publish(active, reason)
            except PublishConflictError:
                continue  # another process published meanwhile: judge against that version
            return Outcome(version, reason, published_now=True, replaced=active)
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
        for version in self.store.versions(self.user):
            if version.idempotency_key == self.job_key:
                return version
        return None

    def _judge(self, active: str | None) -> tuple[bool, str]:
        """Return whether to publish, and why."""
        new = self.evaluation.metrics[DPO.name]["nll"]
        if self.gate == "always":
            base = self.evaluation.metrics[BASE.name]["nll"]
            return True, (
                f"published as asked (gate 'always'): held-out NLL {new:.4f} nats a token "
                f"against {base:.4f} of the base"
            )
        old, rival = self._reference(active)
        numbers = f"held-out NLL {new:.4f} nats a token against {old:.4f} of {rival}"
        by_how_much = f" by more than {self.min_gain:g}" if self.min_gain else ""
        if new < old - self.min_gain:
            return True, f"better{by_how_much}: {numbers}"
        return False, f"not better{by_how_much}: {numbers}; what is active stays as it is"

    def _reference(self, active: str | None) -> tuple[float, str]:
        """Return the NLL to beat, and which model it is of."""
        from langchain_cope.evaluation.evaluate import mean_nll

        base_nll = self.evaluation.metrics[BASE.name]["nll"]
        if active is None:
            return base_nll, "the base"
        try:
            version = self.store.resolve(self.user, active, base=self.engine.base.fingerprint())
        except BaseModelMismatchError:
            return base_nll, f"the base (the active version {active} was trained on another base)"
        except AdapterNotFoundError:
            return base_nll, "the base"  # deleted a moment ago
        num_seen = count_trained_on(version.metadata.get("trained_on"), self.held_out)
        if num_seen:
            return base_nll, (
                f"the base (the active version {active} was trained on {num_seen} of the "
                "held-out items)"
            )
        try:
            adapter = self.engine.load_adapter(self.store.fetch_dir(version))
        except (IntegrityError, ModelError) as error:
            # A damaged version must not keep its user from a new one.
            return base_nll, f"the base (the active version {active} cannot be used: {error})"
        nll = mean_nll(
            self.engine, self.held_out, self.training.recipe, adapter, self.monitor.should_stop
        )
        return nll, f"the active version {active}"

    def _publish(self, active: str | None, reason: str) -> AdapterVersion:
        recipe = self.training.recipe
        task_adapter = self.engine.base.task_adapter
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
                "num_held_out": len(self.held_out),
                "recipe": recipe.as_dict(),
                "task_adapter": task_adapter.name if task_adapter else None,
                "dtype": str(self.engine.base.dtype).removeprefix("torch."),
                "trained_on": fingerprint_items(self.trained),
            },
            idempotency_key=self.job_key,
            expected_active=active,
            data_seq=self.data_seq,
            reason=reason[:REASON_CHARACTERS].encode("utf-8", "replace").decode(),
        )
