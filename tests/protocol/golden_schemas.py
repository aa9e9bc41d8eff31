"""JSON schemas of every protocol type, reduced to what the freeze covers.

``python tests/protocol/golden_schemas.py`` writes a golden file for each type that has none yet, or
for all of them with ``--all``; do that only for types that are not released.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sagellm import protocol

FOLDER = Path(__file__).parent.parent / "goldens" / "protocol"
TYPES: dict[str, Any] = {
    name: getattr(protocol, name)
    for name in (
        "Error",
        "ErrorCode",
        "KVAllocateParams",
        "KVDType",
        "KVEvictReason",
        "KVHandle",
        "KVLayout",
        "KVMigrateParams",
        "Message",
        "Metrics",
        "Request",
        "Response",
        "ResponseFormat",
        "SamplingParams",
        "StreamEvent",
        "StreamEventDelta",
        "StreamEventEnd",
        "StreamEventStart",
        "Timestamps",
    )
}


def schema_of(name: str) -> Any:
    """The schema of a type without titles and descriptions, which may change."""
    return _without_prose(TypeAdapter(TYPES[name]).json_schema())


def _without_prose(value: Any, is_properties: bool = False) -> Any:
    if isinstance(value, list):
        return [_without_prose(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_prose(item, is_properties=key in ("properties", "$defs"))
        for key, item in value.items()
        if is_properties or key not in ("title", "description")
    }


def differences(golden: Any, current: Any, where: str = "") -> list[str]:
    """What ``current`` broke. New optional properties and new enum values are allowed."""
    if isinstance(golden, dict) and isinstance(current, dict):
        growing = where.rsplit("/", 1)[-1] in ("properties", "$defs")
        found = [] if growing else [f"{where}/{k} is new" for k in current.keys() - golden.keys()]
        for key, expected in golden.items():
            if key not in current:
                found.append(f"{where}/{key} is gone")
            elif key == "enum":
                found += [f"{where}: {v!r} is gone" for v in expected if v not in current[key]]
            else:
                found += differences(expected, current[key], f"{where}/{key}")
        return found
    return [] if golden == current else [f"{where}: {golden!r} became {current!r}"]


def main() -> None:
    """Writes golden files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in TYPES:
        path = FOLDER / f"{name}.json"
        if "--all" in sys.argv or not path.exists():
            path.write_text(json.dumps(schema_of(name), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
