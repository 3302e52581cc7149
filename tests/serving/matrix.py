"""Who gets what: every route, for every kind of key, as a table that a test walks.

A row is a route; its columns are the statuses for, in this order:
no key · no such key · a revoked one · an expired one · alice's own · an app's for users that begin
with `al`, about alice · the same about bob · an operator's.
Where a status depends on more than the key, the body below is what was sent. 200 stands for
whatever the route says to somebody who may ask.
"""

from typing import Any

COLUMNS = ("none", "malformed", "revoked", "expired", "alice", "app", "app about bob", "admin")
LOCKED = (401, 401, 401, 401)

MATRIX: dict[tuple[str, str], tuple[int, ...]] = {
    ("GET", "/healthz"): (200,) * 8,
    ("GET", "/readyz"): (200,) * 8,
    ("GET", "/metrics"): (*LOCKED, 403, 403, 403, 200),
    ("GET", "/openapi.json"): (*LOCKED, 200, 200, 200, 200),
    ("GET", "/v1/models"): (*LOCKED, 200, 200, 200, 200),
    ("GET", "/v1/models/{name:path}"): (*LOCKED, 200, 200, 200, 200),
    ("POST", "/v1/chat/completions"): (*LOCKED, 200, 200, 403, 403),
    ("GET", "/v1/users"): (*LOCKED, 200, 200, 200, 200),
    ("GET", "/v1/adapters"): (*LOCKED, 200, 200, 403, 200),
    ("POST", "/v1/adapters/activate"): (*LOCKED, 404, 404, 403, 404),
    ("POST", "/v1/adapters/rollback"): (*LOCKED, 404, 404, 403, 404),
    ("POST", "/v1/history"): (*LOCKED, 200, 200, 403, 403),
    ("GET", "/v1/history"): (*LOCKED, 200, 200, 403, 403),
    ("DELETE", "/v1/history"): (*LOCKED, 200, 200, 403, 403),
    ("POST", "/v1/personalize"): (*LOCKED, 200, 200, 403, 200),
    ("GET", "/v1/personalize"): (*LOCKED, 200, 200, 403, 200),
    # Of a job that is not there; that of somebody else's user is not there either.
    ("GET", "/v1/personalize/{job}"): (*LOCKED, 404, 404, 404, 404),
    ("POST", "/v1/personalize/{job}/cancel"): (*LOCKED, 404, 404, 404, 404),
    ("GET", "/v1/personalize/{job}/events"): (*LOCKED, 404, 404, 404, 404),
    ("POST", "/v1/erase"): (*LOCKED, 400, 403, 403, 400),
    # The page is off in this server.
    ("GET", "/app"): (307,) * 8,
    ("GET", "/app/"): (404,) * 8,
    ("GET", "/app/{name}"): (404,) * 8,
}
"""Rows of routes that name a user get alice, in the column `app about bob` bob."""

SENT: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/chat/completions"): {
        "json": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
        "user": "json",
    },
    ("GET", "/v1/adapters"): {"params": {}, "user": "params"},
    ("POST", "/v1/adapters/activate"): {"json": {"version": "none"}, "user": "json"},
    ("POST", "/v1/adapters/rollback"): {"json": {}, "user": "json"},
    ("POST", "/v1/history"): {"json": {"rows": []}, "user": "json"},
    ("GET", "/v1/history"): {"params": {}, "user": "params"},
    ("DELETE", "/v1/history"): {"params": {}, "user": "params"},
    ("POST", "/v1/personalize"): {"json": {}, "user": "json"},
    ("GET", "/v1/personalize"): {"params": {}, "user": "params"},
    ("POST", "/v1/erase"): {"json": {"confirm": "not so"}, "user": "json"},
}
"""What is sent beside the key; `user` says where the user's name goes: `json` or `params`."""
PATHS = {
    "/v1/models/{name:path}": "/v1/models/tiny",
    "/v1/personalize/{job}": "/v1/personalize/job_none",
    "/v1/personalize/{job}/cancel": "/v1/personalize/job_none/cancel",
    "/v1/personalize/{job}/events": "/v1/personalize/job_none/events",
    "/app/{name}": "/app/app.js",
}
