"""Nobody gets at what a key does not open: the matrix, route by route, and tricks around it."""

import json
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock
from serving.conftest import ROLES, Running, running, wait_until
from serving.matrix import COLUMNS, MATRIX, PATHS, SENT

from langchain_cope.errors import InputError
from langchain_cope.serving import ServerState, ServeSettings, create_app
from langchain_cope.serving.keys import KeyFile, add_key, last_uses, new_key, revoke_key
from langchain_cope.serving.principals import USER_SCOPES, Users
from langchain_cope.serving.route import Route
from langchain_cope.serving.routes import users

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = SENT[("POST", CHAT)]["json"]


def routes_of(state: ServerState) -> set[tuple[str, str]]:
    """Every method and path that the app answers, mounts and nested apps included."""
    found: set[tuple[str, str]] = set()
    for route in create_app(state).routes:
        methods = getattr(route, "methods", None)
        assert methods, f"{route!r} is a mount or something else that the matrix cannot walk"
        found |= {(method, route.path) for method in methods if method != "HEAD"}  # type: ignore[attr-defined]
    return found


def test_every_route_has_a_row_in_the_matrix(server: Running) -> None:
    assert routes_of(server.state) == set(MATRIX)


@pytest.fixture(scope="module")
def bad_keys(server: Running) -> dict[str, str]:
    """Keys that open nothing, by the matrix's columns."""
    path = server.state.settings.keys
    assert path is not None
    revoked, record = new_key("revoked", **ROLES["alice"])
    add_key(path, record)
    revoke_key(path, record.id)
    past = datetime.now(UTC) - timedelta(seconds=1)
    expired, record = new_key("expired", expires=past, **ROLES["alice"])
    add_key(path, record)
    time.sleep(0.6)  # until the server has looked at the file again
    return {"malformed": server.keys["alice"][:-1] + "x", "revoked": revoked, "expired": expired}


@pytest.mark.parametrize("row", MATRIX, ids=" ".join)
def test_each_route_opens_for_its_keys_alone(
    row: tuple[str, str], server: Running, bad_keys: dict[str, str]
) -> None:
    method, path = row
    sent = dict(SENT.get(row, {}))
    place = sent.pop("user", None)
    keys = {**server.keys, **bad_keys, "app about bob": server.keys["app"]}
    statuses, counts = [], server.state.runner.counts
    for column in COLUMNS:
        headers = {} if column == "none" else {"Authorization": f"Bearer {keys[column]}"}
        request = {name: dict(value) for name, value in sent.items()}
        if place is not None:
            request[place]["user"] = "bob" if column == "app about bob" else "alice"
        answer = httpx.request(
            method, server.url + PATHS.get(path, path), headers=headers, timeout=30, **request
        )
        wait_until(lambda: "running" not in counts() and "queued" not in counts(), seconds=60)
        statuses.append(answer.status_code if answer.status_code >= 300 else 200)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert tuple(statuses) == MATRIX[row]


def test_a_route_without_a_declared_scope_cannot_be_added(server: Running) -> None:
    app = create_app(server.state)
    with pytest.raises(KeyError, match="x-scope"):
        app.add_api_route("/new", lambda: None)
    with pytest.raises(TypeError):
        Route("GET", "/new")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "headers", "status"),
    [
        ({"user": "bob"}, {}, 403),
        ({"model": "tiny:bob"}, {}, 403),
        ({"user": "alice", "model": "tiny:bob"}, {}, 400),
        ({"user": "Alice"}, {}, 403),
        ({"user": "alice\u200b"}, {}, 403),
        ({"user": "álice"}, {}, 403),
        ({"user": ""}, {}, 400),
        ({"user": "a" * 513}, {}, 400),
        ({"user": ["alice"]}, {}, 400),
        ({"user": None}, {}, 400),
        ({"user": 1}, {}, 400),
        ({"user": "\ud800"}, {}, 400),
        ({"user": "alice\0"}, {}, 400),
        ({"model": "tiny:"}, {}, 400),
        ({}, {"X-User": "bob"}, 200),  # the header of a key that is no proxy's says nothing
    ],
)
def test_another_users_name_is_refused_before_the_store_is_asked(
    fields: dict[str, Any],
    headers: dict[str, str],
    status: int,
    server: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    resolve = type(server.state.store).resolve
    monkeypatch.setattr(
        type(server.state.store),
        "resolve",
        lambda store, user, *rest, **more: (
            asked.append(user),
            resolve(store, user, *rest, **more),
        )[1],
    )
    with server.client("alice") as client:
        body = json.dumps({**BODY, **fields})  # in ASCII, which can hold half a character
        headers = {"Content-Type": "application/json", **headers}
        answer = client.post(CHAT, content=body, headers=headers)
    assert answer.status_code == status
    assert asked == (["alice"] if status == 200 else [])


def test_known_and_unknown_users_are_refused_alike(server: Running) -> None:
    known, unknown = server.ask("app", user="bob"), server.ask("app", user="nobody")
    assert known.status_code == unknown.status_code == 403
    assert known.json() == unknown.json()


@pytest.mark.parametrize(
    "fields",
    [
        {"safety_identifier": "bob"},
        {"metadata": {"user": "bob"}},
        {"prompt_cache_key": "bob"},
    ],
    ids=str,
)
def test_labels_of_other_kinds_choose_no_voice(fields: dict[str, Any], server: Running) -> None:
    plain, labelled = server.ask("alice").json(), server.ask("alice", **fields).json()
    assert labelled["system_fingerprint"] == plain["system_fingerprint"]
    assert labelled["choices"][0]["message"] == plain["choices"][0]["message"]


def test_a_trusted_proxy_names_the_user_in_its_header(server: Running) -> None:
    alice = server.ask("alice").json()["system_fingerprint"]
    with server.client("proxy") as client:
        named = client.post(CHAT, json=BODY, headers={"X-User": "alice"}).json()
        nobody = client.post(CHAT, json=BODY).json()
        both = client.post(CHAT, json={**BODY, "user": "bob"}, headers={"X-User": "alice"})
        twice = client.post(CHAT, json=BODY, headers=[("X-User", "alice"), ("X-User", "bob")])
    assert named["system_fingerprint"] == alice
    assert nobody["cope"]["adapter_version"] is None
    assert (both.status_code, both.json()["error"]["code"]) == (400, "conflicting_user")
    assert twice.status_code == 400


def test_the_trusted_header_is_read_as_utf8(server: Running) -> None:
    with server.client("proxy") as client:

        def status(header: bytes) -> int:
            both = client.post(CHAT, json={**BODY, "user": "zoë"}, headers={"X-User": header})
            return both.status_code

        assert status("zoë".encode()) == 200, "the same user"
        assert status("zoë".encode("latin-1")) == status("zoé".encode()) == 400


def test_log_probabilities_need_a_scope_of_their_own(server: Running) -> None:
    assert server.ask("alice", logprobs=True).status_code == 200
    refused = server.ask("app", user="alice", logprobs=True)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")


def test_models_list_only_users_that_the_key_names(server: Running) -> None:
    for role, expected in {
        "alice": ["tiny", "tiny:alice"],
        "app": ["tiny"],
        "admin": ["tiny"],
    }.items():
        with server.client(role) as client:
            assert [each["id"] for each in client.get("/v1/models").json()["data"]] == expected
    with server.client("alice") as client:
        assert client.get("/v1/models/tiny:alice").status_code == 200
        assert client.get("/v1/models/tiny:bob").status_code == 404


def test_a_revoked_key_is_refused_within_a_second(server: Running) -> None:
    path = server.state.settings.keys
    assert path is not None
    text, record = new_key("short", USER_SCOPES, Users(("alice",)))
    add_key(path, record)
    with server.client(text) as client:
        wait_until(lambda: client.get("/v1/models").status_code == 200, seconds=1.5)
        revoke_key(path, record.id)
        wait_until(lambda: client.get("/v1/models").status_code == 401, seconds=1)


def test_without_keys_only_this_machines_own_programs_are_answered(
    base: Path, published: Path, tmp_path: Path
) -> None:
    with running(base, published, tmp_path, keys=False) as local, local.client(None) as client:
        assert client.get("/v1/models").status_code == 200
        own = {"Origin": local.url}
        assert client.get("/v1/models", headers=own).status_code == 200
        for headers in (
            {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example"},
            {"Host": ""},
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
        ):
            answer = client.post(CHAT, json=BODY, headers=headers)
            assert answer.status_code in (400, 403), headers
            assert not [name for name in answer.headers if name.startswith("access-control")]
        plain = client.post(
            CHAT, content='{"model": "tiny"}', headers={"Content-Type": "text/plain"}
        )
        assert plain.status_code == 400


def test_a_key_is_found_while_another_process_holds_the_file(server: Running) -> None:
    path = server.state.settings.keys
    assert path is not None
    text, record = new_key("locked", USER_SCOPES, Users(("alice",)))
    add_key(path, record)
    keys = KeyFile(path)
    with FileLock(path.with_name(f".{path.name}.lock")):
        started = time.monotonic()
        assert keys.principal_of(text) is not None
        assert time.monotonic() - started < 1
        assert record.id not in last_uses(path)
    wait_until(lambda: record.id in last_uses(path))


def test_users_beyond_the_first_page_are_found(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "_MOST", 1)
    listed = {}
    for role in ("alice", "bob", "app", "admin"):
        with server.client(role) as client:
            listed[role] = [each["id"] for each in client.get("/v1/users").json()["data"]]
    assert listed["alice"] == listed["app"] == ["alice"]
    assert listed["bob"] == ["bob"]
    assert len(listed["admin"]) == 1
    with server.client("proxy", headers={"X-User": "bob"}) as client:
        assert client.get("/v1/users").json()["data"] == [{"id": "bob", "has_adapter": True}]


def test_a_folder_of_data_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    ServerState.of(
        ServeSettings(model="starter", store=str(tmp_path / "s"), data=tmp_path / "data")
    )
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_reachable_address_without_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cope-lc keys new"):
        ServeSettings(model="starter", host="0.0.0.0", data=tmp_path)


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, new_key("a", USER_SCOPES, Users(("alice",)))[1])
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        ServerState.of(ServeSettings(model="starter", keys=path, data=tmp_path))


def test_no_secret_is_written_to_the_key_file(server: Running) -> None:
    path = server.state.settings.keys
    assert path is not None
    written = path.read_text()
    for text in server.keys.values():
        secret = text.split("_", 2)[2][:43]
        assert secret not in written
    assert socket.gethostname() not in written
