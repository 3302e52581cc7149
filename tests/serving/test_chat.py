"""Chat completions: whose voice, which version, and what is refused by name."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from personal import metadata_of_headlines
from serving.conftest import Running
from tiny import make_adapter

from adapter_store.errors import BackendError
from langchain_cope.engine import load_base

CHAT = "/v1/chat/completions"


def text_of(answer: Any) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def test_each_user_is_answered_in_a_voice_of_their_own(server: Running) -> None:
    alice, bob = server.ask("alice", max_tokens=20), server.ask("bob", max_tokens=20)
    base = server.ask("base", max_tokens=20)
    assert len({text_of(alice), text_of(bob), text_of(base)}) == 3
    assert base.json()["cope"]["adapter_version"] is None
    assert base.json()["system_fingerprint"].endswith("_base")
    named = server.ask("app", user="alice", max_tokens=20)
    in_model = server.ask("app", model="tiny:alice", max_tokens=20)
    assert text_of(named) == text_of(in_model) == text_of(alice)
    fingerprints = {each.json()["system_fingerprint"] for each in (alice, named, in_model)}
    assert len(fingerprints) == 1


def test_the_base_answers_at_scale_0(server: Running) -> None:
    base, scaled = (
        server.ask("base", max_tokens=20),
        server.ask("alice", max_tokens=20, cope={"adapter_scale": 0}),
    )
    assert text_of(base) == text_of(scaled)
    assert scaled.json()["cope"]["adapter_version"] is None


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 5}])
def test_a_part_without_its_text_is_no_message(part: dict[str, Any], server: Running) -> None:
    refused = server.ask("alice", messages=[{"role": "user", "content": [part]}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages.0")


def test_errors_do_not_say_where_adapters_lie(server: Running) -> None:
    refused = server.ask("alice", cope={"adapter_version": "20260101T000000Z-0123456789ab"})
    assert refused.status_code == 404
    assert str(server.state.store.url) not in refused.text


def test_alpha_and_tau_of_a_request_are_applied_and_told(server: Running) -> None:
    answer = server.ask("alice", cope={"alpha": 0.7, "tau": 0.02}).json()
    assert (answer["cope"]["alpha"], answer["cope"]["tau"]) == (0.7, 0.02)
    assert 0 <= answer["cope"]["contrast_changed"] <= 1


def test_a_user_without_an_adapter_gets_the_base_or_an_error(server: Running) -> None:
    answer = server.ask("app", user="alf")
    assert answer.json()["cope"]["adapter_version"] is None
    refused = server.ask("app", user="alf", cope={"on_missing": "error"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")


def test_the_next_request_has_a_new_version(server: Running, base: Path, tmp_path: Path) -> None:
    store, user = server.state.store, "alvin"
    fingerprint = load_base(str(base)).fingerprint()
    versions, answers = [], []
    for seed in (11, 12):
        folder = make_adapter(tmp_path / str(seed), base, seed=seed)
        version = store.publish(user, folder, base=fingerprint)
        answer = server.ask("app", user=user, max_tokens=20)
        assert answer.json()["cope"]["adapter_version"] == version.version
        assert answer.json()["system_fingerprint"].endswith(version.digest[:8])
        answers.append(text_of(answer))
        versions.append(version.version)
    store.activate(user, versions[0])
    assert text_of(server.ask("app", user=user, max_tokens=20)) == answers[0] != answers[1]


def test_an_answer_tells_how_much_the_question_is_like_the_history(
    server: Running, base: Path, tmp_path: Path
) -> None:
    loaded = load_base(str(base))
    version = server.state.store.publish(
        "albee",
        make_adapter(tmp_path / "adapter", base, seed=13),
        base=loaded.fingerprint(),
        metadata=metadata_of_headlines(loaded),
    )
    like, unlike = (
        server.ask("app", question, user="albee").json()["cope"]
        for question in ("Headline, please.", "Add 12 and 7.")
    )
    assert (like["relevance"], like["adapter_version"]) == (1, version.version)
    assert (unlike["relevance"], unlike["adapter_version"]) == (0, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"store": True}, "store"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"temprature": 1}, "temprature"),
        ({"n": 9}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"cope": {"alhpa": 1}}, "cope.alhpa"),
        ({"cope": {"alpha": -1}}, "cope.alpha"),
        ({"cope": {"alpha": 1001}}, "cope.alpha"),
        ({"cope": {"adapter_scale": 1001}}, "cope.adapter_scale"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    fields: dict[str, Any], param: str, server: Running
) -> None:
    answer = server.ask("alice", **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_an_image_is_refused(server: Running) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    answer = server.ask("alice", messages=[{"role": "user", "content": [image]}])
    assert answer.status_code == 400
    assert "text only" in answer.json()["error"]["message"]


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    plain = server.ask("alice")
    fields = {
        "store": False, "presence_penalty": 0, "logit_bias": {}, "modalities": ["text"],
        "service_tier": "auto", "metadata": {"a": "b"}, "frequency_penalty": None, "n": 1,
    }  # fmt: skip
    assert text_of(server.ask("alice", **fields)) == text_of(plain)


def test_a_store_out_of_reach_is_told_and_never_the_base(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise BackendError("/secret/folder is out of reach")

    monkeypatch.setattr(type(server.state.store), "resolve", fail)
    for stream in (False, True):
        answer = server.ask("alice", stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert answer.headers["Retry-After"]
        assert "/secret" not in answer.text


def test_texts_of_the_developer_and_of_tools_are_read(server: Running) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    answer = server.ask("alice", messages=messages)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] > 20


def test_no_answer_mixes_versions_that_are_published_meanwhile(
    server: Running, base: Path, tmp_path: Path
) -> None:
    store, before = server.state.store, server.state.store.active("bob")
    fingerprint = load_base(str(base)).fingerprint()
    versions = [before]

    def stream(_: int) -> set[tuple[str, ...]]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Tell"}], "stream": True}
        with server.client("bob") as client:
            text = client.post(CHAT, json={**body, "max_tokens": 60, "temperature": 1}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        named = {chunk["cope"]["adapter_version"] for chunk in chunks if "cope" in chunk}
        return {(chunk["system_fingerprint"], *named) for chunk in chunks}

    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(stream, number) for number in range(24)]
        for seed in range(30, 33):
            adapter = make_adapter(tmp_path / str(seed), base, seed=seed)
            versions.append(store.publish("bob", adapter, base=fingerprint).version)
        seen = [answer.result() for answer in answers]
    try:
        assert all(len(marks) == 1 for marks in seen)
        digests = {version.version: version.digest[:8] for version in store.versions("bob")}
        for ((fingerprint_of_answer, version),) in seen:
            assert fingerprint_of_answer.endswith(digests[version])
        assert server.ask("bob").json()["cope"]["adapter_version"] == versions[-1]
    finally:
        assert before is not None
        store.activate("bob", before)
