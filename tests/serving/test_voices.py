"""From texts to a voice over HTTP: history, jobs with progress, versions, erasure.

A real server on a loopback address, a tiny base that is really trained.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from personal import QUICK, ROWS
from serving.conftest import Running

from adapter_store import AdapterStore
from langchain_cope.serving.jobs import JobRunner
from langchain_cope.serving.run import server_of
from langchain_cope.serving.settings import ServeSettings
from langchain_cope.serving.state import ServerState


@pytest.fixture(scope="module")
def state(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ServerState:
    """The state of a server without keys, which publishes whatever it trains."""
    folder = tmp_path_factory.mktemp("serve")
    base = tiny("llama", initializer_range=0.05)
    settings = ServeSettings(
        model=str(base), store=str(folder / "adapters"), data=folder / "data", port=0, app=True
    )
    state = ServerState.of(settings)
    personalize = state.runner._personalize
    assert personalize is not None
    quick = personalize.model_copy(update={"recipe": QUICK, "gate": "always"})
    state.runner._personalize = quick
    return state


@pytest.fixture(scope="module")
def client(state: ServerState) -> Iterator[httpx.Client]:
    """A client of the running server."""
    server = server_of(state)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    server.handle_exit(15, None)
    thread.join()


def events_of(client: httpx.Client, job: str, **headers: str) -> list[tuple[str, Any]]:
    """Return all events of a job as (name, data), until it ends."""
    response = client.get(f"/v1/personalize/{job}/events", headers=headers)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.strip().split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in block.split("\n"))
        if "data" in fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def personalized(client: httpx.Client, user: str) -> dict[str, Any]:
    """Let the user be personalized from the demo rows, and return the finished job."""
    client.post("/v1/history", json={"user": user, "rows": ROWS}).raise_for_status()
    job = client.post("/v1/personalize", json={"user": user})
    assert job.status_code == 202
    return dict(events_of(client, job.json()["id"])[-1][1])


def test_pasted_texts_are_counted_and_kept_once(client: httpx.Client) -> None:
    text = (
        "A first text.\nIt has two lines.\n\nA second one.\n   \n\nA first text.\nIt has two lines."
    )
    answer = client.post("/v1/history", json={"user": "paula", "text": text})
    assert answer.json() == {"user": "paula", "added": 2, "items": 2}
    lines = '{"prompt": "Hi?", "completion": "Hello"}\n{"text": "Third"}'
    answer = client.post("/v1/history", json={"user": "paula", "text": lines})
    assert answer.json() == {"user": "paula", "added": 2, "items": 4}
    assert client.get("/v1/history", params={"user": "paula"}).json()["items"] == 4
    assert client.get("/v1/history", params={"user": "paul"}).json()["items"] == 0
    assert client.delete("/v1/history", params={"user": "paula"}).json()["deleted"] == 4


def test_thumbs_and_corrections_are_rows(client: httpx.Client, state: ServerState) -> None:
    prompt = [{"role": "user", "content": "Say hello"}]
    rows = [
        {"prompt": prompt, "answer": "Hey!", "score": 1},
        {"prompt": prompt, "answer": "Good day, madam.", "score": 0},
        {"prompt": "Say bye", "answer": "Farewell.", "correction": "See ya"},
    ]
    client.post("/v1/history", json={"user": "tom", "rows": rows}).raise_for_status()
    items = state.history.history("tom").items
    assert [(item.completion, item.rejected) for item in items] == [
        ("Hey!", ("Good day, madam.",)),
        ("See ya", ("Farewell.",)),
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give either"),
        ({"rows": [], "text": ""}, "give either"),
        ({"text": '{"prompt": "a"}\n{"prompt": '}, "line 2"),
        ({"rows": [{"colour": "red"}]}, "colour"),
        ({"rows": [{"text": 3}]}, ""),
        ({"rows": ["text"]}, "rows.0"),
        ({"text": "x", "path": "/etc/passwd"}, "path"),
    ],
)
def test_wrong_rows_are_refused_whole(client: httpx.Client, body: Any, said: str) -> None:
    answer = client.post("/v1/history", json={"user": "wrong", **body})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert client.get("/v1/history", params={"user": "wrong"}).json()["items"] == 0


def test_texts_become_a_version_with_progress_told(client: httpx.Client) -> None:
    client.post("/v1/history", json={"user": "robin", "rows": ROWS}).raise_for_status()
    job = client.post("/v1/personalize", json={"user": "robin"}).json()
    again = client.post("/v1/personalize", json={"user": "robin"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_running")
    events = events_of(client, job["id"])
    labels = {data["label"] for name, data in events if name == "progress" and "label" in data}
    assert {"SFT", "negatives", "DPO"} <= labels
    name, end = events[-1]
    assert (name, end["status"], end["result"]["published"]) == ("end", "succeeded", True)
    assert end == client.get(f"/v1/personalize/{job['id']}").json()
    missed = events_of(client, job["id"], **{"Last-Event-ID": str(len(events) - 2)})
    assert len(missed) <= 2
    assert missed[-1] == events[-1]
    shown = client.get("/v1/adapters", params={"user": "robin"}).json()["data"]
    assert [(one["version"], one["active"]) for one in shown] == [(end["result"]["version"], True)]
    assert {"id": "robin", "has_adapter": True} in client.get("/v1/users").json()["data"]


def test_versions_are_activated_and_rolled_back(client: httpx.Client) -> None:
    first = personalized(client, "vera")["result"]["version"]
    extra = [{"prompt": "Headline for story 77?", "completion": "The fox is tired, says dog"}]
    client.post("/v1/history", json={"user": "vera", "rows": extra}).raise_for_status()
    second = personalized(client, "vera")["result"]["version"]

    def active() -> list[str]:
        shown = client.get("/v1/adapters", params={"user": "vera"}).json()["data"]
        return [one["version"] for one in shown if one["active"]]

    assert active() == [second]
    client.post("/v1/adapters/rollback", json={"user": "vera"}).raise_for_status()
    assert active() == [first]
    body = {"user": "vera", "version": second}
    client.post("/v1/adapters/activate", json=body).raise_for_status()
    assert active() == [second]
    unknown = {"user": "vera", "version": "20260131T235959Z-0123456789ab"}
    assert client.post("/v1/adapters/activate", json=unknown).status_code == 404
    assert client.post("/v1/adapters/rollback", json={"user": "nobody"}).status_code == 404


def test_a_cancelled_job_publishes_nothing(client: httpx.Client, state: ServerState) -> None:
    client.post("/v1/history", json={"user": "carl", "rows": ROWS}).raise_for_status()
    job = client.post("/v1/personalize", json={"user": "carl"}).json()["id"]
    while not state.runner._jobs[job].steps:
        time.sleep(0.01)
    client.post(f"/v1/personalize/{job}/cancel").raise_for_status()
    assert events_of(client, job)[-1][1]["status"] == "cancelled"
    assert client.get("/v1/adapters", params={"user": "carl"}).json()["data"] == []
    listed = client.get("/v1/personalize", params={"user": "carl"}).json()["data"]
    assert [one["status"] for one in listed] == ["cancelled"]


def test_a_failed_job_says_why(client: httpx.Client) -> None:
    client.post("/v1/history", json={"user": "few", "rows": ROWS[:2]}).raise_for_status()
    job = client.post("/v1/personalize", json={"user": "few"}).json()["id"]
    end = events_of(client, job)[-1][1]
    assert end["status"] == "failed"
    assert "items" in end["error"]["message"]


def test_erased_in_mid_training_nothing_is_left(client: httpx.Client, state: ServerState) -> None:
    personalized(client, "erna")
    extra = [{"prompt": "Headline for story 88?", "completion": "Canary text of erna"}]
    client.post("/v1/history", json={"user": "erna", "rows": extra}).raise_for_status()
    job = client.post("/v1/personalize", json={"user": "erna"}).json()["id"]
    while not state.runner._jobs[job].steps:
        time.sleep(0.01)
    slip = client.post("/v1/erase", json={"user": "erna", "confirm": "emma"})
    assert (slip.status_code, slip.json()["error"]["code"]) == (400, "not_confirmed")
    answer = client.post("/v1/erase", json={"user": "erna", "confirm": "erna"})
    assert answer.status_code == 200
    assert answer.json()["erased"] is True
    assert client.get("/v1/history", params={"user": "erna"}).json()["items"] == 0
    assert client.get("/v1/adapters", params={"user": "erna"}).json()["data"] == []
    assert client.get(f"/v1/personalize/{job}").status_code == 404
    for file in state.runner.folder.rglob("*"):
        assert not file.is_file() or b"Canary" not in file.read_bytes()


def test_a_job_goes_on_after_a_restart(
    client: httpx.Client, state: ServerState, tmp_path: Path
) -> None:
    client.post("/v1/history", json={"user": "resa", "rows": ROWS}).raise_for_status()
    assert state.runner._personalize is not None
    store = AdapterStore(tmp_path / "adapters")
    personalize = state.runner._personalize.model_copy(
        update={"store": store, "job_dir": tmp_path / "jobs" / "work"}
    )
    runner = JobRunner(tmp_path / "jobs", personalize)
    runner.start()
    job = runner.add("resa")
    while not any(step["stage"] == "negatives" for step in job.steps):
        time.sleep(0.005)
    runner.close()
    assert store.versions("resa") == []
    again = JobRunner(tmp_path / "jobs", personalize)
    assert [one.status for one in again.of_user("resa")] == ["queued"]
    again.start()
    while again.of_user("resa")[0].is_live:
        time.sleep(0.01)
    again.close()
    finished = again.of_user("resa")[0]
    assert (finished.id, finished.status) == (job.id, "succeeded")
    assert finished.result is not None
    assert any("not run again: sft" in note for note in finished.result["notes"])
    assert len(store.versions("resa")) == 1


def test_a_damaged_record_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "job_1.json").write_text("{")
    (tmp_path / "job_2.json").write_text('{"id": "job_3", "user": "a"}')
    (tmp_path / "job_4.json").write_text('{"id": "job_4", "user": "a", "path": "/"}')
    runner = JobRunner(tmp_path, None)
    assert runner.of_user("a") == []
    assert len(caplog.records) == 3


def test_the_page_comes_from_this_package_alone(client: httpx.Client) -> None:
    page = client.get("/app", follow_redirects=True)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("app.js", "app.css", "icon.svg"):
        assert name in page.text
        assert client.get(f"/app/{name}").status_code == 200
    assert "http" not in page.text.replace("http-equiv", "")
    assert client.get("/app/secrets.txt").status_code == 404
    assert client.get("/app/..%2f..%2fsettings.py").status_code == 404


def test_a_proxys_user_sees_no_other_users_job(server: Running) -> None:
    job = server.state.runner.add("bob")
    with server.client("proxy", headers={"X-User": "alice"}) as alice:
        assert alice.get(f"/v1/personalize/{job.id}").status_code == 404
        assert alice.post(f"/v1/personalize/{job.id}/cancel").status_code == 404
    with server.client("proxy", headers={"X-User": "bob"}) as bob:
        assert bob.get(f"/v1/personalize/{job.id}").status_code == 200
    server.state.runner.cancel(job)


def test_a_cancel_outlives_the_process(tmp_path: Path, state: ServerState) -> None:
    runner = JobRunner(tmp_path, state.runner._personalize)  # not started: nothing runs
    job = runner.add("carol")
    job.status = "running"
    runner.cancel(job)
    again = JobRunner(tmp_path, None)
    assert [one.status for one in again.of_user("carol")] == ["cancelled"]


def test_a_full_disk_ends_no_other_training(
    tmp_path: Path, state: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = JobRunner(tmp_path / "jobs", state.runner._personalize)
    jobs = [runner.add("nobody1"), runner.add("nobody2")]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("langchain_cope.serving.jobs.write_json", full)
    runner.start()
    deadline = time.monotonic() + 30
    while any(job.is_live for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [job.status for job in jobs] == ["failed", "failed"]  # they have no texts
    runner.close()


def test_a_voice_score_tells_who_writes_more_like_the_user() -> None:
    from langchain_cope.personalize import PersonalizeResult, Sample
    from langchain_cope.serving.voice_score import voice_score

    own = ["well, the harbour was rather lovely", "well, the bridge was rather long"]
    plain = ["The harbour is a place.", "A bridge connects two sides."]

    def score(answers: list[str]) -> Any:
        samples = [
            Sample(prompt=[], reference=one, base=base, sft=base, dpo=base, cope=answer)
            for one, base, answer in zip(own, plain, answers, strict=False)
        ]
        result = PersonalizeResult(
            user_id="a", published=True, version="v", reason="", metrics={}, timings={},
            num_trained=8, num_held_out=2, samples=samples,
        )  # fmt: skip
        return voice_score(result)["voice"]

    assert score(plain) == 0
    assert score(own) > score([own[0], plain[1]]) > 0
    assert score(own[:1]) is None
