"""TrainTaskAdapter: what many users wrote in, one task adapter for all of them out.

The runnable is here; what it does is `personalization/task_adapter.py`.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForChainRun, dispatch_custom_event
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import BaseModel, ConfigDict, ValidationError

from langchain_cope.errors import HistoryError, InputError
from langchain_cope.history import as_history
from langchain_cope.history.items import Target, UserHistory
from langchain_cope.personalization.run import PROGRESS
from langchain_cope.personalization.task_adapter import TaskAdapterResult, train_task_adapter
from langchain_cope.settings import BaseSettings
from langchain_cope.training.progress import Monitor, Progress
from langchain_cope.training.recipe import Recipe, RecipeChoice

__all__ = ["TaskAdapterRequest", "TaskAdapterResult", "TrainTaskAdapter"]


class TaskAdapterRequest(BaseModel):
    """Whom to learn from, and where the adapter goes."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    users: Sequence[Any]
    """Histories (`read_users`), or rows of `user_id`, `history` and `"shareable": true`."""
    folder: str | os.PathLike[str]
    """A new folder, of a parent that exists."""


class TrainTaskAdapter(
    BaseSettings, RunnableSerializable[TaskAdapterRequest | dict[str, Any], TaskAdapterResult]
):
    """Trains one adapter on many users' items, and leaves it in a folder where it helps.

    It learns the task and no person: the first stage of the paper's chain. Give the folder as
    `task_adapter` to `PersonalizeUser` and `ChatCoPe`; a version that was trained on it is refused
    on a base without it.

    ```python
    result = TrainTaskAdapter().invoke({"users": read_users("users.jsonl"), "folder": "task"})
    if result.folder is not None:
        personalize = PersonalizeUser(task_adapter=result.folder)
    ```

    Only users who are `shareable` are learnt from. Steps come as custom events named
    `cope.progress`, with stage, step, total, loss and seconds_left; a `threading.Event` given as
    `stop_event` ends it within one step, and nothing is left behind. A trace holds the numbers of
    users and items, never a text.

    Raises `HistoryError` and `InputError` for a wrong request, `ModelError` for a base that cannot
    be trained, and `Cancelled`; an adapter that does not help is no error.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    task_adapter: None = None
    """A base has one task adapter: this trains it."""
    recipe: RecipeChoice = Recipe.for_task
    """A `Recipe`, or a function that is called with the base and all items; its `sft` is used."""
    target: Target | None = None
    """The side of a conversation that is learnt, where rows are conversations."""
    all_shareable: bool = False
    """Whether everybody is learnt from: all of them agreed."""
    gate: Literal["improve", "always"] = "improve"
    """`improve`: leave it only where held-out items are likelier with it than without."""

    @property
    def InputType(self) -> type[TaskAdapterRequest]:  # noqa: N802 - core's name
        """The form of a request, for schemas."""
        return TaskAdapterRequest

    def invoke(
        self,
        input: TaskAdapterRequest | dict[str, Any],
        config: RunnableConfig | None = None,
        *,
        stop_event: threading.Event | None = None,
        **kwargs: Any,
    ) -> TaskAdapterResult:
        """Train the adapter, and return what became of it."""
        request = _as_request(input)
        users = [_user(row, f"users[{at}]", self.target) for at, row in enumerate(request.users)]
        traced = {"num_users": len(users), "num_items": sum(len(user.items) for user in users)}
        found: list[TaskAdapterResult] = []

        def train(_: Any, run_manager: CallbackManagerForChainRun, config: RunnableConfig) -> Any:
            monitor = _EventMonitor(config, stop_event)
            found.append(self._train(users, request.folder, monitor))
            return asdict(found[0])

        self._call_with_config(train, traced, ensure_config(config), **kwargs)
        return found[0]

    def _train(
        self, users: list[UserHistory], folder: str | os.PathLike[str], monitor: Monitor
    ) -> TaskAdapterResult:
        return train_task_adapter(
            self._engine(holder=monitor),
            users,
            folder,
            all_shareable=self.all_shareable,
            always=self.gate == "always",
            recipe=self.recipe,
            monitor=monitor,
        )


class _EventMonitor(Monitor):
    """Sends steps as custom events, and stops where an event is set."""

    def __init__(self, config: RunnableConfig, stop_event: threading.Event | None) -> None:
        super().__init__()
        self._send = partial(dispatch_custom_event, PROGRESS, config=config)
        self._stop_event = stop_event

    def should_stop(self) -> bool:
        """Return whether the stop event is set."""
        return self._stop_event is not None and self._stop_event.is_set()

    def report(self, progress: Progress) -> None:
        """Send a step."""
        self._send(asdict(progress) | {"stage": progress.stage.value})


def _as_request(input: TaskAdapterRequest | dict[str, Any]) -> TaskAdapterRequest:
    if isinstance(input, TaskAdapterRequest):
        return input
    try:
        return TaskAdapterRequest.model_validate(input)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the request'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise InputError(f"a request takes users and folder ({problems})") from error


def _user(row: Any, where: str, target: Target | None) -> UserHistory:
    if isinstance(row, UserHistory):
        return row
    try:
        return as_history([row], target=target)
    except HistoryError as error:
        raise HistoryError(f"{where}: {error}") from error
