"""The fields by which `ChatCoPe` and `PersonalizeUser` name a base, and the engine they lead to."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from langchain_cope.engine import EngineOptions, default_model
from langchain_cope.errors import EngineClosed

if TYPE_CHECKING:
    from langchain_cope.engine import Engine


class BaseSettings(BaseModel):
    """A base model and how it is loaded. Two settings that agree share one base in memory."""

    model: str = Field(default_factory=default_model)
    """`smollm2`, `starter` (bundled), a Hugging Face id, a folder, or a GGUF file.

    A GGUF file is named by its path, by a folder with one, as `owner/repository:FILE.gguf` on the
    hub, or as `ollama:NAME` where Ollama has pulled it. Default: `COPE_MODEL`, else `smollm2`.
    """
    revision: str | None = None
    """Revision of a Hugging Face id."""
    task_adapter: str | None = None
    """A shared peft LoRA that is merged into the base at load (the paper's task-adapted model).

    A folder or a Hugging Face id.
    """
    device: str | None = None
    """`cpu`, `cuda`, `cuda:1` or `mps`; None: the best there is."""
    dtype: str | None = None
    """`float32`, `bfloat16` or `float16`.

    None: on a CPU bfloat16 where it is measured to be faster, else float32; elsewhere the
    checkpoint's.
    """
    quantization_config: Any = None
    """Passed to `from_pretrained` as it is."""
    engine_options: EngineOptions | None = Field(default=None, exclude=True)
    """Bounds of the engine that all users of the base share.

    None: those of the engine that runs already, else the defaults.
    """

    @model_validator(mode="before")
    @classmethod
    def _none_is_the_default(cls, values: Any) -> Any:
        """Return the given values without None, except where it could be taken for a wish."""
        if not isinstance(values, dict):
            return values
        known = cls.model_fields.keys() - {"trace_user_id"}
        return {
            name: value for name, value in values.items() if value is not None or name not in known
        }

    def _engine(self, model: str | None = None, holder: object = None) -> "Engine":
        """Return the engine of the base, or of another `model` loaded in the same way.

        The first call loads the base. `holder`, this object if None, holds it (`Engine.of`).
        """
        from langchain_cope.engine import Engine, load_base

        while True:
            base = load_base(
                model or self.model,
                revision=self.revision,
                device=self.device,
                dtype=self.dtype,
                task_adapter=self.task_adapter,
                quantization_config=self.quantization_config,
            )
            with suppress(EngineClosed):  # its last holder let it go in this very moment
                return Engine.of(base, self.engine_options, self if holder is None else holder)
