"""LangChain's own suites for chat models.

The integration suite runs on `smollm2`, or on the instruct model that `COPE_TEST_MODEL` names, a
path or a Hugging Face id. What needs more understanding than 135 million parameters have is
expected to fail there, and nowhere else.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_cope import ChatCoPe

OTHER_MODEL = os.environ.get("COPE_TEST_MODEL")
HELD_TO_A_FORM = ("structured", "json", "tool", "agent", "few_shot")


def for_smollm2(test: str) -> dict[str, Any]:
    """Settings with few tokens, for time.

    Answers are sampled, for its likeliest joke is "A cat is a cat, a cat is a cat, a cat …"; but a
    name has to be copied, and one in Japanese takes it many tokens.
    """
    if "unicode" in test:
        return {"dtype": "float32", "max_tokens": 128, "temperature": 0.0}
    is_long = any(word in test for word in HELD_TO_A_FORM)
    return {
        "dtype": "float32",  # in bfloat16 the split of a prompt in pieces changes samples
        "max_tokens": 96 if is_long else 16,
        "temperature": 0.7,
        "seed": 1 if "2_v1" in test else 0,  # with 0 the joke of that test has no end
    }


class TestChatCoPeUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCoPe

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"store": "memory://standard", "user_id": "alice"}

    @pytest.mark.xfail(
        reason="core loads only classes of packages on its own allow-list", strict=True
    )
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)


class TestChatCoPeIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _settings(self, request: pytest.FixtureRequest, tiny: Callable[..., Path]) -> None:
        self._options = {"max_tokens": 512} if OTHER_MODEL else for_smollm2(request.node.name)
        self._other = str(tiny("llama", context=8192))

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatCoPe

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": OTHER_MODEL or "smollm2", "store": "memory://standard", **self._options}

    @property
    def model_override_value(self) -> str:
        return self._other

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @pytest.mark.xfail(
        OTHER_MODEL is None,
        reason="left free to, smollm2 writes about the weather and calls no tool",
        strict=True,
    )
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
