"""A tiny user, a quick recipe and what a trace would hold, for all tests that personalize."""

from dataclasses import replace
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from langchain_cope import Recipe
from langchain_cope.engine import Base, PromptProfile
from langchain_cope.training.recipe import DPO, SFT, Negatives

ROWS = [
    {"prompt": f"Headline for story {i}?", "completion": f"The fox jumps over story {i}, says dog"}
    for i in range(10)
]
QUICK = Recipe(
    sft=SFT(learning_rate=2e-2, epochs=3, rank=4, targets="linear"),
    negatives=Negatives(candidates=2),
    dpo=DPO(learning_rate=1e-4),
    max_new_tokens=8,
)

# Four steps of DPO, so that it has a middle.
FOUR_STEPS = replace(QUICK, dpo=replace(QUICK.dpo, batch_size=2))


def metadata_of_headlines(base: Base) -> dict[str, Any]:
    """Return a version's metadata whose user was asked for headlines alone."""
    asked = [f"Generate a headline for this article. {thing}" for thing in ("Rain", "Mud", "Trams")]
    profile = PromptProfile.of(base.everyday, asked)
    assert profile is not None
    return {"prompts": profile.to_stored()}


class Recorder(BaseCallbackHandler):
    """What a trace would hold."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Any, Any]] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.errors: list[BaseException] = []
        self.progress: list[dict[str, Any]] = []
        self.metadata: list[dict[str, Any]] = []

    @property
    def stages(self) -> list[str]:
        """The names of the runs below the first, in order."""
        return [name for name, _, parent in self.started if parent is not None]

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self.started.append((kwargs.get("name", ""), run_id, parent_run_id))
        self.inputs.append(inputs)
        self.metadata.append(kwargs.get("metadata") or {})

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.outputs.append(outputs)

    def on_chain_error(self, error: BaseException, **kwargs: Any) -> None:
        self.errors.append(error)

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        assert name == "cope.progress"
        self.progress.append(data)
