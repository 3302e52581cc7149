"""ChatCoPe as LangChain users meet it: real tiny bases, real adapters, a real store."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.load import dumps, load
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableLambda, ensure_config
from pydantic import ValidationError

from adapter_store import (
    AdapterNotFoundError,
    AdapterStore,
    BaseModelMismatchError,
    InvalidAdapterError,
)
from langchain_cope import ChatCoPe, EngineOptions, strength
from langchain_cope.engine import Contrast, Engine, PromptProfile, Request, Sampling, load_base
from langchain_cope.errors import InputError, ModelError, ModelNotFound

QUESTION = "What does the fox do all day?"


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


@pytest.fixture
def store(base: Path, adapter: Callable[..., Path], store_folder: Path) -> AdapterStore:
    """Alice and Bob, each with an adapter of their own."""
    store = AdapterStore(store_folder)
    fingerprint = load_base(base).fingerprint()
    store.publish("alice", adapter(base, seed=1), base=fingerprint, alpha=0.3, tau=0.2)
    store.publish("bob", adapter(base, seed=2), base=fingerprint)
    return store


@pytest.fixture
def chat(base: Path, store: AdapterStore) -> ChatCoPe:
    return ChatCoPe(model=str(base), store=store, user_id="alice", max_tokens=16)


def answer_of(chat: ChatCoPe, folder: Path | None, alpha: float, tau: float = 0.1) -> str:
    """What the engine answers by itself."""
    engine = Engine.of(load_base(chat.model))
    prompt = engine.base.prompt_ids([{"role": "user", "content": QUESTION}])
    adapter = None if folder is None else engine.load_adapter(folder)
    request = Request(prompt, adapter, Contrast(alpha, tau), Sampling(max_tokens=16))
    [completion] = engine.generate([request])
    return completion.text


def test_answers_with_the_users_adapter_and_its_recommended_alpha_and_tau(
    chat: ChatCoPe, base: Path, adapter: Callable[..., Path]
) -> None:
    message = chat.invoke(QUESTION)
    assert message.content == answer_of(chat, adapter(base, seed=1), alpha=0.3, tau=0.2)
    assert message.content != answer_of(chat, None, alpha=0)


def test_metadata_says_who_answered_and_how(chat: ChatCoPe, store: AdapterStore) -> None:
    message = chat.invoke(QUESTION)
    version = store.resolve("alice")
    facts = message.response_metadata
    assert facts["model_name"] == chat.model
    assert facts["user_id"] == "alice"
    assert (facts["adapter_version"], facts["adapter_digest"]) == (version.version, version.digest)
    assert (facts["alpha"], facts["tau"]) == (0.3, 0.2)
    assert facts["finish_reason"] in {"stop", "length"}
    assert 0 <= facts["contrast_changed"] <= 1
    usage = message.usage_metadata
    assert usage is not None
    prompt = load_base(chat.model).prompt_ids([{"role": "user", "content": QUESTION}])
    assert usage["input_tokens"] == len(prompt)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_streamed_equals_invoked_and_ends_with_one_last_chunk(chat: ChatCoPe) -> None:
    whole = chat.invoke(QUESTION)
    chunks = list(chat.stream(QUESTION))
    assert len(chunks) > 2
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert [chunk.chunk_position for chunk in chunks].count("last") == 1
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    told, of_whole = merged.response_metadata, whole.response_metadata
    # What is cached by now makes for other rounding.
    assert told.pop("mean_divergence") == pytest.approx(of_whole.pop("mean_divergence"), rel=1e-4)
    assert told == of_whole
    assert merged.usage_metadata == whole.usage_metadata


async def test_the_async_four_answer_alike(chat: ChatCoPe) -> None:
    expected = chat.invoke(QUESTION).content
    assert (await chat.ainvoke(QUESTION)).content == expected
    assert "".join([chunk.content async for chunk in chat.astream(QUESTION)]) == expected
    answers = await chat.abatch([QUESTION, QUESTION])
    assert [message.content for message in answers] == [expected, expected]
    events = [event async for event in chat.astream_events(QUESTION, version="v2")]
    assert events[-1]["data"]["output"].content == expected


def test_users_of_a_batch_never_mix(
    chat: ChatCoPe, base: Path, adapter: Callable[..., Path]
) -> None:
    users: list[str | None] = ["alice", "bob", None, "newcomer"] * 3
    configs: list[Any] = [{"configurable": {"user_id": user}} for user in users]
    answers = chat.batch([QUESTION] * len(users), configs)
    expected = {
        "alice": answer_of(chat, adapter(base, seed=1), alpha=0.3, tau=0.2),
        "bob": answer_of(chat, adapter(base, seed=2), alpha=0.1),
        None: answer_of(chat, None, alpha=0),
        "newcomer": answer_of(chat, None, alpha=0),
    }
    assert len({expected["alice"], expected["bob"], expected[None]}) == 3
    assert [message.content for message in answers] == [expected[user] for user in users]
    assert [message.response_metadata["user_id"] for message in answers] == users


async def test_batches_and_concurrent_streams_of_different_users_share_their_steps(
    chat: ChatCoPe,
) -> None:
    users: list[str | None] = ["alice", "bob", None] * 4
    configs: list[Any] = [{"configurable": {"user_id": user}} for user in users]
    engine = Engine.of(load_base(chat.model))

    async def streamed(config: Any) -> str:
        return "".join([str(chunk.content) async for chunk in chat.astream(QUESTION, config)])

    alone = [chat.invoke(QUESTION, config) for config in configs[:3]]
    lengths = sum(message.usage_metadata["output_tokens"] for message in alone) * 4
    for together in (
        lambda: asyncio.to_thread(chat.batch, [QUESTION] * len(users), configs),
        lambda: chat.abatch([QUESTION] * len(users), configs),
        lambda: asyncio.gather(*(streamed(config) for config in configs)),
    ):
        before = engine.statistics().steps
        answers = [getattr(answer, "content", answer) for answer in await together()]
        assert answers == [message.content for message in alone] * 4
        assert engine.statistics().steps - before < lengths / 2


def test_the_engines_bounds_are_named_once_and_hold_for_everyone(
    base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    chat = ChatCoPe(model=str(copy), store="memory://bounds", engine_options={"max_rows": 8})
    assert chat.invoke(QUESTION).content
    assert chat._engine().options == EngineOptions(max_rows=8)
    assert ChatCoPe(model=str(copy), store="memory://bounds").invoke(QUESTION).content
    other = ChatCoPe(model=str(copy), store="memory://bounds", engine_options={"max_rows": 9})
    with pytest.raises(InputError, match="already runs with EngineOptions"):
        other.invoke(QUESTION)
    with pytest.raises(ValidationError, match="max_rows must be an integer"):
        ChatCoPe(model=str(copy), engine_options={"max_rows": 1})
    chat._engine().close()
    with pytest.raises(ValidationError, match="max_rowz"):
        ChatCoPe(model=str(copy), engine_options={"max_rowz": 8})


def test_an_engine_closed_between_pin_and_request_is_opened_again(chat: ChatCoPe) -> None:
    closed = []

    class ClosingLimiter(InMemoryRateLimiter):
        def acquire(self, *, blocking: bool = True) -> bool:
            engine = chat._engine()
            engine.close()
            closed.append(engine)
            return super().acquire(blocking=blocking)

    answer = chat.invoke(QUESTION).content
    limiter = ClosingLimiter(requests_per_second=1000)
    assert chat.model_copy(update={"rate_limiter": limiter}).invoke(QUESTION).content == answer
    assert closed


def test_keyword_beats_configurable_beats_constructor(chat: ChatCoPe) -> None:
    def user(*args: Any, **kwargs: Any) -> Any:
        return chat.invoke(QUESTION, *args, **kwargs).response_metadata["user_id"]

    bob = {"configurable": {"user_id": "bob"}}
    assert user() == "alice"
    assert user({"configurable": {"thread_id": "1"}}) == "alice"
    assert user(bob) == "bob"
    assert user(bob, user_id="alice") == "alice"
    assert user({"configurable": {"user_id": None}}) is None
    assert user(bob, user_id=None) is None
    with pytest.raises(InputError, match="must be a string that is not empty"):
        user({"configurable": {"user_id": ""}})


async def test_the_user_reaches_the_model_through_chains_bindings_and_events(
    chat: ChatCoPe,
) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "{q}")]) | chat | StrOutputParser()
    bob: Any = {"configurable": {"user_id": "bob"}}
    expected = chat.invoke(QUESTION, bob).content
    assert chain.invoke({"q": QUESTION}, bob) == expected
    assert await chain.ainvoke({"q": QUESTION}, bob) == expected
    assert "".join(chain.stream({"q": QUESTION}, bob)) == expected
    assert chat.bind(stop=["never"]).invoke(QUESTION, bob).content == expected
    assert chat.bind(user_id="bob").invoke(QUESTION).content == expected
    assert chat.with_config(bob).invoke(QUESTION).content == expected
    assert chat.with_retry().invoke(QUESTION, bob).content == expected
    # A node that calls the model without a config, as create_agent does.
    node = RunnableLambda(lambda question: chat.invoke(question).content)
    assert node.invoke(QUESTION, bob) == expected
    events = [e async for e in chat.astream_events(QUESTION, bob, version="v2")]
    assert events[-1]["data"]["output"].content == expected


@pytest.mark.filterwarnings("ignore:.*beta.*")
async def test_version_3_events_know_the_user(chat: ChatCoPe) -> None:
    bob: Any = {"configurable": {"user_id": "bob"}}
    expected = chat.invoke(QUESTION, bob).content
    assert str(chat.stream_events(QUESTION, bob, version="v3").text) == expected
    stream = await chat.astream_events(QUESTION, bob, version="v3")
    assert str(await stream.text) == expected


def test_alpha_and_tau_come_from_call_model_version_or_paper(
    chat: ChatCoPe,
) -> None:
    def contrast(model: ChatCoPe, **options: Any) -> tuple[float, float]:
        facts = model.invoke(QUESTION, max_tokens=1, **options).response_metadata
        return facts["alpha"], facts["tau"]

    model = chat.model_copy(update={"alpha": 0.6})
    assert contrast(model, alpha=0.9) == (0.9, 0.2)
    assert contrast(model, tau=0.5) == (0.6, 0.5)
    assert contrast(chat, alpha=None) == (0.3, 0.2)
    assert contrast(chat, user_id="bob") == (0.1, 0.1)
    assert contrast(model, user_id=None, alpha=0.9, tau=0.5) == (0, 0.5)


def test_alpha_zero_is_the_adapter_alone(
    chat: ChatCoPe, base: Path, adapter: Callable[..., Path]
) -> None:
    assert chat.invoke(QUESTION, alpha=0).content == answer_of(chat, adapter(base, seed=1), alpha=0)


def test_the_cache_never_serves_another_user_or_an_old_version(
    chat: ChatCoPe,
    store: AdapterStore,
    base: Path,
    adapter: Callable[..., Path],
    llm_cache: InMemoryCache,
) -> None:
    alice, bob = chat.invoke(QUESTION), chat.invoke(QUESTION, user_id="bob")
    assert alice.content != bob.content
    assert chat.invoke(QUESTION).content == alice.content
    assert len(llm_cache._cache) == 2
    assert chat.invoke(QUESTION, alpha=0.9).response_metadata["alpha"] == 0.9
    assert chat.invoke(QUESTION, max_tokens=3).usage_metadata["output_tokens"] <= 3
    store.publish("alice", adapter(base, seed=3), base=load_base(base).fingerprint())
    newer = chat.invoke(QUESTION)
    assert newer.response_metadata["adapter_version"] != alice.response_metadata["adapter_version"]
    assert newer.content != alice.content
    assert len(llm_cache._cache) == 5


def test_a_named_version_is_served_and_an_unknown_one_is_an_error(
    chat: ChatCoPe, store: AdapterStore, base: Path, adapter: Callable[..., Path]
) -> None:
    first = store.active("alice")
    before = chat.invoke(QUESTION).content
    fingerprint = load_base(base).fingerprint()
    store.publish("alice", adapter(base, seed=3), base=fingerprint, alpha=0.3, tau=0.2)
    assert chat.invoke(QUESTION).content != before
    assert chat.invoke(QUESTION, adapter_version=first).content == before
    with pytest.raises(AdapterNotFoundError):
        chat.invoke(QUESTION, adapter_version="20200101T000000000000Z-0000000000000000")


def test_a_user_without_an_adapter_gets_the_base_or_an_error(chat: ChatCoPe) -> None:
    message = chat.invoke(QUESTION, user_id="newcomer")
    assert message.content == answer_of(chat, None, alpha=0)
    assert message.response_metadata["adapter_version"] is None
    strict = chat.model_copy(update={"on_missing_adapter": "error"})
    with pytest.raises(AdapterNotFoundError, match="newcomer"):
        strict.invoke(QUESTION, user_id="newcomer")


def test_an_adapter_of_another_base_is_refused_naming_what_differs(
    chat: ChatCoPe, tiny: Callable[..., Path]
) -> None:
    other = chat.model_copy(update={"model": str(tiny("llama", seed=9))})
    with pytest.raises(BaseModelMismatchError, match="weights"):
        other.invoke(QUESTION)


def test_an_adapter_of_the_former_default_is_refused_with_its_option(
    chat: ChatCoPe, store: AdapterStore, base: Path, adapter: Callable[..., Path]
) -> None:
    trained_on = {**load_base(base).fingerprint(), "model": "starter", "weights": "ab" * 32}
    store.publish("earlier", adapter(base, seed=3), base=trained_on)
    with pytest.raises(BaseModelMismatchError) as caught:
        chat.invoke(QUESTION, user_id="earlier")
    assert "load the base that it was trained on (model='starter', --model starter)" in str(
        caught.value
    )
    assert "`starter` was the default base before `smollm2`" in str(caught.value)


def test_logprobs_explain_every_token(chat: ChatCoPe) -> None:
    message = chat.invoke(QUESTION, logprobs=True)
    tokens = message.response_metadata["logprobs"]
    assert len(tokens) == message.usage_metadata["output_tokens"]
    for token in tokens:
        assert token["reward"] == pytest.approx(token["log_p_user"] - 0.3 * token["log_p_base"])
    assert message.content == chat.invoke(QUESTION).content


def test_stop_strings_end_the_answer_before_them(chat: ChatCoPe) -> None:
    text = chat.invoke(QUESTION).content
    stop = text[3:6]
    expected = text[: text.index(stop)]
    assert chat.invoke(QUESTION, stop=[stop]).content == expected
    assert chat.model_copy(update={"stop": stop}).invoke(QUESTION).content == expected


def test_system_and_assistant_turns_reach_the_template(chat: ChatCoPe) -> None:
    turns = [
        SystemMessage("Be brief."),
        HumanMessage("Hi"),
        AIMessage("Hello"),
        HumanMessage([{"type": "text", "text": QUESTION}]),
    ]
    as_dicts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": QUESTION},
    ]
    num_tokens = chat.get_num_tokens_from_messages(turns)
    assert num_tokens == len(load_base(chat.model).prompt_ids(as_dicts))
    assert chat.invoke(turns).usage_metadata["input_tokens"] == num_tokens


def test_what_the_base_cannot_read_is_refused_by_name(chat: ChatCoPe) -> None:
    image = HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}])
    with pytest.raises(InputError, match="image_url"):
        chat.invoke([image])
    with pytest.raises(InputError, match="RemoveMessage"):
        chat.invoke([HumanMessage("Hi"), RemoveMessage(id="1")])
    with pytest.raises(InputError, match="no messages"):
        chat.invoke([])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alpha", -0.1),
        ("alpha", float("nan")),
        ("tau", 0),
        ("tau", 1.5),
        ("temperature", -1),
        ("max_tokens", 0),
        ("top_p", 0),
    ],
)
def test_options_out_of_range_are_refused_in_constructor_and_call(
    chat: ChatCoPe, option: str, value: float
) -> None:
    with pytest.raises(ValidationError, match=option):
        ChatCoPe(**{option: value})
    with pytest.raises(ValueError, match=option):
        chat.invoke(QUESTION, **{option: value})


OPTIONS = [
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "stop",
    "alpha", "tau", "timeout", "model",
]  # fmt: skip


@pytest.mark.parametrize("option", [*OPTIONS, "max_retries", "streaming", "on_missing_adapter"])
def test_none_is_the_default_in_the_constructor(option: str) -> None:
    assert getattr(ChatCoPe(**{option: None}), option) == getattr(ChatCoPe(), option)


@pytest.mark.parametrize("option", [*OPTIONS, "tools", "tool_choice", "logprobs"])
def test_none_is_the_models_own_in_a_call(
    option: str, chat: ChatCoPe, llm_cache: InMemoryCache
) -> None:
    own = chat.model_copy(update={"top_k": 3, "max_tokens": 4, "temperature": 0.5, "seed": 7})
    expected = own.invoke(QUESTION)
    answer = own.invoke(QUESTION, **{option: None})
    assert answer.content == expected.content
    assert answer.usage_metadata == {**expected.usage_metadata, "total_cost": 0}  # from the cache
    assert own.bind(**{option: None}).invoke(QUESTION).content == expected.content


def test_none_for_the_shown_user_is_no_wish_that_is_guessed() -> None:
    with pytest.raises(ValidationError, match="trace_user_id"):
        ChatCoPe(trace_user_id=None)
    with pytest.raises(ValidationError, match="temprature"):
        ChatCoPe(temprature=None)


@pytest.mark.parametrize("seed", [1.5, "a"])
def test_a_seed_that_is_none_is_refused_before_it_can_harm_others(
    chat: ChatCoPe, seed: Any
) -> None:
    with pytest.raises(ValueError, match="seed must be an integer"):
        chat.invoke(QUESTION, seed=seed, temperature=1)


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], 5, [5], [None], b"a", [["a"]]])
def test_a_stop_that_is_no_text_is_refused_as_input(chat: ChatCoPe, stop: Any) -> None:
    with pytest.raises(InputError, match="stop must be strings that are not empty"):
        chat.invoke(QUESTION, stop=stop)


def test_a_copy_with_another_store_reads_that_store(chat: ChatCoPe, tmp_path: Path) -> None:
    assert chat.invoke(QUESTION).response_metadata["adapter_version"] is not None
    other = chat.model_copy(update={"store": AdapterStore(tmp_path / "other")})
    assert other.invoke(QUESTION).response_metadata["adapter_version"] is None


def test_the_base_alone_is_reported_without_contrast(chat: ChatCoPe) -> None:
    message = chat.invoke(QUESTION, user_id=None, logprobs=True)
    assert message.response_metadata["alpha"] == 0
    for token in message.response_metadata["logprobs"]:
        assert token["reward"] == token["log_p_user"] == token["log_p_base"]


def test_a_base_under_a_relative_path_is_found_again(
    chat: ChatCoPe, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(base.parent)
    relative = chat.model_copy(update={"model": f"./{base.name}"})
    Engine.of(load_base(relative.model))
    monkeypatch.chdir(tmp_path)
    assert relative.model.startswith("./")
    monkeypatch.chdir(base.parent)
    assert relative.invoke(QUESTION).content == chat.invoke(QUESTION).content


def test_unknown_options_are_refused(chat: ChatCoPe) -> None:
    with pytest.raises(ValidationError, match="alfa"):
        ChatCoPe(alfa=0.1)
    with pytest.raises(InputError, match="has no option alfa"):
        chat.invoke(QUESTION, alfa=0.1)


@pytest.mark.parametrize("user", ["a\0b", "x" * 10_000, "\ud800"])
def test_hostile_user_ids_are_refused(chat: ChatCoPe, user: str) -> None:
    with pytest.raises(InvalidAdapterError):
        chat.invoke(QUESTION, user_id=user)


@pytest.mark.parametrize("user", ["../../etc/passwd", "🙂", "alice/../bob", "%2e%2e"])
def test_odd_user_ids_are_users_like_any_other(chat: ChatCoPe, user: str) -> None:
    assert chat.invoke(QUESTION, user_id=user).response_metadata["adapter_version"] is None


def test_a_prompt_longer_than_the_context_is_cores_error_with_the_numbers(chat: ChatCoPe) -> None:
    with pytest.raises(ContextOverflowError, match=r"holds 256"):
        chat.invoke("dog " * 400)


def test_an_unknown_base_is_named() -> None:
    with pytest.raises(ModelNotFound, match="/nowhere/at/all"):
        ChatCoPe(model="/nowhere/at/all").invoke(QUESTION)


def test_a_timeout_stops_the_answer(chat: ChatCoPe) -> None:
    with pytest.raises(ModelTimeoutError):
        chat.invoke(QUESTION, timeout=1e-9)
    wait_until_idle(chat)


def test_seeded_samples_repeat_and_unseeded_ones_differ(chat: ChatCoPe) -> None:
    warm = chat.model_copy(update={"temperature": 1.5})
    assert warm.invoke(QUESTION, seed=7).content == warm.invoke(QUESTION, seed=7).content
    assert len({warm.invoke(QUESTION).content for _ in range(4)}) > 1


async def test_a_cancelled_task_stops_within_a_token(chat: ChatCoPe) -> None:
    long = chat.model_copy(update={"max_tokens": 200})
    assert long.invoke("🙂").usage_metadata["output_tokens"] > 20
    batch = Engine.of(load_base(chat.model))._batch
    task = asyncio.create_task(long.ainvoke("🙂"))
    while not batch.decoding:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    wait_until_idle(chat)


def test_an_abandoned_stream_stops(chat: ChatCoPe) -> None:
    stream = chat.stream(QUESTION)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    wait_until_idle(chat)


def wait_until_idle(chat: ChatCoPe) -> None:
    batch = Engine.of(load_base(chat.model))._batch
    deadline = time.monotonic() + 2
    while batch.decoding and time.monotonic() < deadline:
        time.sleep(0.01)
    assert batch.num_rows == 0


def test_construction_loads_nothing() -> None:
    chat = ChatCoPe(model="/nowhere/at/all", store="/nowhere/either", user_id="alice")
    assert chat._llm_type == "cope"


@pytest.mark.filterwarnings("ignore:.*beta.*")
def test_written_out_and_read_back(base: Path, store_folder: Path) -> None:
    chat = ChatCoPe(
        model=str(base),
        store=str(store_folder),
        user_id="alice",
        alpha=0.2,
        stop=["x"],
        api_key="secret",
    )
    written = dumps(chat)
    assert "secret" not in written
    allowed = {"allowed_objects": [ChatCoPe], "valid_namespaces": ["langchain_cope"]}
    again = load(json.loads(written), **allowed)
    assert again.model_dump() == chat.model_copy(update={"api_key": None}).model_dump()


def test_tracing_parameters(chat: ChatCoPe) -> None:
    params = chat._get_ls_params(stop=["x"], model="other")
    assert params["ls_provider"] == "cope"
    assert params["ls_model_name"] == "other"
    assert params["ls_model_type"] == "chat"
    assert chat._llm_type == "cope"
    assert ensure_config(None)["tags"] == []


@pytest.mark.parametrize(("recommended", "used"), [(0.5, 0.5), (50.0, 1), (-1, 1), ("0.5", 1)])
def test_the_recommended_scale_is_used_where_it_is_sane(
    chat: ChatCoPe,
    store: AdapterStore,
    base: Path,
    adapter: Callable[..., Path],
    recommended: object,
    used: float,
) -> None:
    store.publish(
        "alice",
        adapter(base, seed=1),
        base=load_base(base).fingerprint(),
        alpha=0.3,
        metadata={"recommended": {"adapter_scale": recommended}},
    )
    message = chat.invoke(QUESTION)
    facts = message.response_metadata
    assert (facts["alpha"], facts["tau"], facts["adapter_scale"]) == (0.3, 0.1, used)
    same = chat.invoke(QUESTION, adapter_scale=used, alpha=0.3, tau=0.1)
    assert message.content == same.content
    assert chat.invoke(QUESTION, adapter_scale=0.25).response_metadata["adapter_scale"] == 0.25


def test_what_users_of_the_base_need_is_used_without_recommendation(
    chat: ChatCoPe, base: Path, monkeypatch: pytest.MonkeyPatch, llm_cache: InMemoryCache
) -> None:
    before = chat.invoke(QUESTION, user_id="bob")
    usual = {"alpha": 0.6, "tau": 0.3, "adapter_scale": 0.8}
    weights = load_base(base).fingerprint()["weights"]
    known = {**strength._measured(), weights: {"usual": usual, "candidates": []}}
    monkeypatch.setattr(strength, "_measured", lambda: known)
    facts = chat.invoke(QUESTION, user_id="bob").response_metadata
    assert {name: facts[name] for name in usual} == usual
    assert before.response_metadata["alpha"] == 0.1  # and the cache did not serve it again
    facts = chat.invoke(QUESTION).response_metadata
    assert (facts["alpha"], facts["tau"], facts["adapter_scale"]) == (0.3, 0.2, 0.8)


def test_the_adapters_scale_of_a_call_wins_over_the_models(chat: ChatCoPe) -> None:
    whole, alone = chat.invoke(QUESTION), chat.invoke(QUESTION, user_id=None)
    assert chat.invoke(QUESTION, adapter_scale=1).content == whole.content
    off = ChatCoPe(model=chat.model, store=chat.store, user_id="alice", adapter_scale=0)
    assert off.invoke(QUESTION, max_tokens=16).content == alone.content
    half = off.invoke(QUESTION, max_tokens=16, adapter_scale=0.5)
    assert half.content not in (alone.content, whole.content)
    scales = [each.response_metadata["adapter_scale"] for each in (whole, alone, half)]
    assert scales == [1, 0, 0.5]
    with pytest.raises(ValidationError, match="adapter_scale must be a finite number ≥ 0"):
        ChatCoPe(adapter_scale=-1)


def test_strengths_beyond_all_use_are_refused_wherever_given(chat: ChatCoPe) -> None:
    schema = ChatCoPe.model_json_schema(mode="serialization")["properties"]
    for name in ("alpha", "adapter_scale"):
        assert (schema[name]["minimum"], schema[name]["maximum"]) == (0, 1000)
        expected = f"{name} must be 1000 at most, not 1001"
        with pytest.raises(ValidationError, match=expected):
            ChatCoPe(**{name: 1001})
        with pytest.raises(ValueError, match=expected):
            chat.invoke(QUESTION, **{name: 1001})


def test_the_adaptive_contrast_says_when_it_acted(chat: ChatCoPe) -> None:
    fixed, adaptive = chat.invoke(QUESTION, contrast="fixed"), chat.invoke(QUESTION)
    facts = [each.response_metadata for each in (fixed, adaptive)]
    assert [each["contrast"] for each in facts] == ["fixed", "adaptive"]
    assert (facts[0]["contrast_active_share"], facts[0]["mean_divergence"]) == (1, None)
    assert 0 <= facts[1]["contrast_active_share"] <= 1
    assert 0 < facts[1]["mean_divergence"] < 0.7
    model = ChatCoPe(model=chat.model, store=chat.store, user_id="alice", contrast="fixed")
    assert model.invoke(QUESTION, max_tokens=16).content == fixed.content
    with pytest.raises(InputError, match="contrast must be 'fixed' or 'adaptive', not 'often'"):
        chat.invoke(QUESTION, contrast="often")


def test_on_questions_unlike_the_history_the_base_answers(
    base: Path, store: AdapterStore, adapter: Callable[..., Path], chat: ChatCoPe
) -> None:
    loaded = load_base(base)
    asked = [f"What does the {animal} do all day?" for animal in ("dog", "cat", "owl", "bee")]
    profile = PromptProfile.of(loaded.everyday, asked)
    assert profile is not None
    store.publish(
        "alice",
        adapter(base, seed=1),
        base=loaded.fingerprint(),
        metadata={"prompts": profile.to_stored()},
    )
    careful = chat.model_copy(update={"adapter_scale": 0.8})
    other = "Write a Python function that adds two numbers."
    like, unlike = careful.invoke(QUESTION), careful.invoke(other)
    told = [each.response_metadata for each in (like, unlike)]
    assert [each["relevance"] for each in told] == [1, 0]
    assert [each["adapter_scale"] for each in told] == [0.8, 0]
    assert unlike.content == careful.invoke(other, user_id=None).content
    assert like.content != careful.invoke(QUESTION, user_id=None).content
    turns = [("user", QUESTION), ("ai", "It jumps."), ("user", "Shorter, please.")]
    assert careful.invoke(turns).response_metadata["relevance"] == 1
    assert careful.invoke(turns[1:]).response_metadata["relevance"] == 0
    fixed = careful.invoke(other, contrast="fixed")
    assert fixed.content != unlike.content
    assert fixed.response_metadata["relevance"] is None


def test_a_version_whose_prompt_profile_is_damaged_is_an_error(
    base: Path, store: AdapterStore, adapter: Callable[..., Path], chat: ChatCoPe
) -> None:
    fingerprint = load_base(base).fingerprint()
    metadata = {"prompts": {"format": 1, "centre": "?"}}
    store.publish("alice", adapter(base, seed=1), base=fingerprint, metadata=metadata)
    with pytest.raises(ModelError, match="keeps of its prompts cannot be used"):
        chat.invoke(QUESTION)
    told = chat.invoke(QUESTION, contrast="fixed").response_metadata
    assert (told["contrast"], told["relevance"]) == ("fixed", None)
