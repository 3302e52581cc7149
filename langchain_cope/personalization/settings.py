"""The options of a personalization, as `PersonalizeUser` takes them and a run reads them."""

import os
from collections.abc import Callable
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from pydantic import Field, field_validator

from langchain_cope.history.items import Target
from langchain_cope.settings import BaseSettings
from langchain_cope.tracing import TraceUserId
from langchain_cope.training.recipe import RecipeChoice


class PersonalizeSettings(BaseSettings):
    """How a user is personalized, and where the result goes."""

    store: Any = None
    """As for `ChatCoPe`."""
    recipe: RecipeChoice = None
    """A `Recipe`, or a function that is called with the base and the items to train on.

    None: `Recipe.for_model(base, items)`.
    """
    history: Any = None
    """A `ChromaHistory` that a request without a history is filled from."""
    target: Target | None = None
    """The side of a conversation that is learnt, where the rows of a request are conversations.

    None: as is usual for their format. What Chroma holds was divided when it was added.
    """
    gate: Literal["improve", "always"] = "improve"
    """When to publish: `improve` or `always`.

    `improve`: where it is at least 90 % sure that new texts of the user are likelier with the
    adapter than with the base and with `reference_adapter`, and where the held-out ones are
    likelier than with the active version. `always` is told by the held-out texts alone how sure
    that is, and publishes in any case.
    """
    min_gain: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Nats per token by which each of these has to be beaten on average."""
    reference_adapter: str | os.PathLike[str] | None = None
    """A peft folder on the same base that has to be beaten too: one that was trained on others.

    Against the base alone an adapter gains by what all people's texts of a kind have in common.
    """
    job_dir: str | os.PathLike[str] | None = None
    """A folder for unfinished runs, each user's in a folder of its own.

    It holds what users wrote: keep it private.
    """
    samples: bool = True
    """Whether the result holds the held-out items with every way's answer.

    A tool's result never does.
    """
    authorize: Callable[[str, RunnableConfig], None] | None = Field(
        default=None, exclude=True, repr=False
    )
    """Called with the user and the configuration of every call, before anything else is done.

    Nothing is read, trained or traced for the user before. What it raises, the call raises: check
    here that the caller may have that user personalized.
    """
    trace_user_id: TraceUserId = "plain"
    """How runs, metadata and events name the user: `plain`, `hashed` or `omitted`.

    Error messages may name the user: unless it is plain, a trace shows of an error its class alone.
    """

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, value: RecipeChoice) -> RecipeChoice:
        if isinstance(value, type):
            raise ValueError(f"recipe is the class {value.__name__}: give an instance, Recipe()")
        return value
