"""The page that lists the routes of a server, made of its OpenAPI document alone.

It loads nothing from anywhere, so it works on a machine without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 }
summary b { display: inline-block; min-width: 4.5rem }
pre { background: #8882; padding: .7rem; overflow: auto; max-height: 30rem }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """HTML with every route of an OpenAPI document, its parameters, body and answers."""
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    schemas = document.get("components", {}).get("schemas", {})
    routes = "".join(
        _operation(method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    types = "".join(
        f'<details id="{escape(name)}"><summary>{escape(name)}</summary>{_json(schema)}</details>'
        for name, schema in schemas.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{escape(info.get('description', ''))}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{routes}<h2>Types</h2>{types}</body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    shown = {key: operation[key] for key in ("parameters", "requestBody") if key in operation}
    answers = "".join(
        f"<li>{escape(status)}: {escape(answer.get('description', ''))}</li>"
        for status, answer in operation.get("responses", {}).items()
    )
    return (
        f"<details><summary><b>{escape(method.upper())}</b> <code>{escape(path)}</code> "
        f"{escape(operation.get('summary', ''))}</summary>"
        f"<p>{escape(operation.get('description', ''))}</p>{_json(shown) if shown else ''}"
        f"<ul>{answers}</ul></details>"
    )


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=1))}</pre>"
