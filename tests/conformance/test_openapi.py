"""Every route against the server's own OpenAPI document, with data that fits it and that does not.

``SAGELLM_CONFORMANCE_EXAMPLES=2000`` fuzzes every route with that many requests instead of a few.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis

from gateway.support import HashEmbedder, mock_gateway, serve_in_thread, serving
from sagellm.gateway.app import create_server
from sagellm.gateway.config import GatewayConfig
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.middleware import OPEN_PATHS

HOOKS = Path(__file__).with_name("checks.py")
MAX_EXAMPLES = int(os.environ.get("SAGELLM_CONFORMANCE_EXAMPLES", "20"))
SEED = "20250101"
REPLACED_CHECKS = "not_a_server_error,positive_data_acceptance"  # by those of checks.py
MAX_LINE_CHARS = 2_000  # of a request in the report
METHODS = {"get", "post"}


def new_gateway(api_keys: tuple[str, ...] = ()) -> Gateway:
    config = GatewayConfig(
        access_log=False, warm_up=False, metrics_public=not api_keys, api_keys=api_keys
    )
    return mock_gateway(script="An answer", embedder=HashEmbedder(), config=config)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    document: dict[str, Any] = create_server(new_gateway()).app.openapi()
    return document


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


@pytest.mark.slow
def test_every_answer_conforms_to_the_openapi_document(tmp_path: Path) -> None:
    with serve_in_thread(create_server(new_gateway())) as url:
        run = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                "run",
                f"{url}/openapi.json",
                "--checks=all",
                f"--exclude-checks={REPLACED_CHECKS}",
                "--phases=examples,coverage,fuzzing,stateful",
                "--mode=all",
                f"--max-examples={MAX_EXAMPLES}",
                f"--seed={SEED}",
                "--generation-database=none",
                "--no-shrink",
                "--continue-on-failure",
                "--no-color",
                "--warnings=off",
            ],
            cwd=tmp_path,
            env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS)},
            capture_output=True,
            text=True,
            check=False,
        )
    shown = "\n".join(line[:MAX_LINE_CHARS] for line in run.stdout.splitlines())
    assert run.returncode == 0, shown + run.stderr[-2_000:]


def test_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()


def test_every_route_has_a_summary_and_an_example_of_its_answer(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        assert method in METHODS, path
        assert operation["summary"], path
        assert operation["tags"], path
        for kind, body in operation["responses"]["200"]["content"].items():
            assert body["schema"], f"{path} does not say what its {kind} is"


def test_every_route_declares_its_errors_in_the_shape_of_its_api(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        declared = set(operation["responses"])
        assert {"400", "401", "404", "429", "431", "500", "503", "504"} <= declared, path
        assert "422" not in declared, path
        assert ({"408", "413", "415"} <= declared) == (method == "post"), path
        shape = "Anthropic" if path.startswith("/v1/messages") else "OpenAi"
        schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith(f"/{shape}ErrorResponse"), path


def test_routes_that_stream_declare_both_forms(document: dict[str, Any]) -> None:
    for path, _, operation in operations(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if body is None:
            continue
        name = body["schema"]["$ref"].rpartition("/")[2]
        streams = "stream" in document["components"]["schemas"][name]["properties"]
        assert ("text/event-stream" in operation["responses"]["200"]["content"]) == streams, path


def test_document_asks_for_keys_where_the_server_does() -> None:
    document = create_server(new_gateway(("secret",))).app.openapi()
    secured = {path for path, _, operation in operations(document) if "security" in operation}
    assert set(document["paths"]) - secured == OPEN_PATHS
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey"}


def test_whole_numbers_may_be_written_with_a_point() -> None:
    with serving(new_gateway()) as client:
        body = {"prompt": [97.0, 98], "max_tokens": 2.0, "temperature": 0, "stop_token_ids": [5.0]}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] == 2
        refused: list[Any] = [2.5, True, "2", 1e300]
        for value in refused:
            answer = client.post("/v1/completions", json=body | {"max_tokens": value})
            assert answer.status_code == 400, value
            assert answer.json()["error"]["param"] == "max_tokens"


def test_bounds_of_integers_are_exact(document: dict[str, Any]) -> None:
    seed = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]["seed"]
    assert seed["anyOf"][0] == {
        "type": "integer",
        "minimum": -(2**63),
        "exclusiveMaximum": 2**64,
    }
