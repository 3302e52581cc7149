"""What the OpenAPI document says is true of whatever is sent: no 5xx, and no answer beside it."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serving.conftest import Running, wait_until

from langchain_cope.serving.app import ROUTES

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
DOCUMENTED = [
    (route.method, route.path) for route in ROUTES if route.options.get("include_in_schema", True)
]


@pytest.mark.parametrize("row", DOCUMENTED, ids=" ".join)
@pytest.mark.filterwarnings("ignore")
def test_a_route_keeps_to_its_document_whatever_is_sent(
    row: tuple[str, str], server: Running
) -> None:
    with server.client("alice") as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    method, path = row
    operation = schema[path.replace(":path", "")][method]
    checks = CHECKS
    if path == "/readyz":  # whose 503 may be the truth on a machine that stood still
        checks = [only_the_store_may_be_missed, *CHECKS[1:]]

    @given(case=operation.as_strategy())
    @settings(
        max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    def keeps_to_it(case: Any) -> None:
        for key in (server.keys["alice"], "nobody's"):
            headers = {"Authorization": f"Bearer {key}"}
            case.call_and_validate(base_url=server.url, headers=headers, checks=checks)

    keeps_to_it()
    if path == "/readyz":
        with server.client(None) as probe:
            wait_until(lambda: probe.get(path).status_code == 200, seconds=30)


def only_the_store_may_be_missed(_context: Any, response: Any, _case: Any) -> None:
    """Fail for a 5xx but that the store has not answered in time: this server is up."""
    if response.status_code >= 500:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "store_unavailable"
