"""Protocol v0.1 is frozen: existing fields keep name, type, constraint and default."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from protocol import golden_schemas


def _golden(name: str) -> Any:
    return json.loads((golden_schemas.FOLDER / f"{name}.json").read_text())


@pytest.mark.parametrize("name", sorted(golden_schemas.TYPES))
def test_schema_keeps_every_frozen_field(name: str) -> None:
    assert golden_schemas.differences(_golden(name), golden_schemas.schema_of(name)) == []


def test_every_golden_file_has_its_type() -> None:
    assert {path.stem for path in golden_schemas.FOLDER.glob("*.json")} == set(golden_schemas.TYPES)


def _break_type(schema: Any) -> None:
    schema["properties"]["max_tokens"]["type"] = "number"


def _break_bound(schema: Any) -> None:
    del schema["properties"]["max_tokens"]["exclusiveMinimum"]


def _break_name(schema: Any) -> None:
    schema["properties"]["max_new_tokens"] = schema["properties"].pop("max_tokens")


def _break_required(schema: Any) -> None:
    schema["required"].append("priority")


def _break_strictness(schema: Any) -> None:
    del schema["additionalProperties"]


@pytest.mark.parametrize(
    "change", [_break_type, _break_bound, _break_name, _break_required, _break_strictness]
)
def test_comparison_notices_a_broken_field(change: Any) -> None:
    broken = copy.deepcopy(golden_schemas.schema_of("Request"))
    change(broken)
    assert golden_schemas.differences(_golden("Request"), broken)


def test_comparison_allows_an_optional_addition() -> None:
    grown = copy.deepcopy(golden_schemas.schema_of("Request"))
    grown["properties"]["later"] = {"type": "integer", "default": 0}
    assert golden_schemas.differences(_golden("Request"), grown) == []
