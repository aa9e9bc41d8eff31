"""``/health`` (restart me if not), ``/ready`` (send me work), ``/ping`` and ``/version``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from sagellm import __version__
from sagellm.gateway.errors import RETRY_LATER_S
from sagellm.gateway.liveness import check_liveness
from sagellm.protocol import PROTOCOL_VERSION
from sagellm.serving import HTTPMethod, RouterDef

if TYPE_CHECKING:
    from sagellm.gateway.gateway import Gateway


class HealthResponse(BaseModel):
    """Whether the server works.

    Attributes:
        status: ``ok`` with HTTP status 200, anything else with 503.
        reason: What is wrong.
    """

    status: Literal["ok", "stalled", "loading", "draining"]
    reason: str | None = None


class VersionResponse(BaseModel):
    """What runs here."""

    version: str
    protocol_version: str


def routers(gateway: Gateway) -> dict[str, list[RouterDef]]:
    """The routes of this module."""

    async def health() -> Response:
        return _answer(*liveness_of(gateway))

    async def ready() -> Response:
        return _answer(*readiness_of(gateway))

    async def version() -> dict[str, Any]:
        return {"version": __version__, "protocol_version": PROTOCOL_VERSION}

    def route(name: str, handler: Any, summary: str) -> list[RouterDef]:
        return [
            RouterDef(
                "",
                handler,
                method=HTTPMethod.GET,
                summary=summary,
                response_model=HealthResponse,
                responses={503: {"model": HealthResponse, "description": "It does not"}},
                tags=(name,),
            )
        ]

    return {
        "health": route("health", health, "Whether the engine moves"),
        "ping": route("health", health, "The same as /health"),
        "ready": route("health", ready, "Whether requests are welcome"),
        "version": [
            RouterDef(
                "",
                version,
                method=HTTPMethod.GET,
                summary="Versions of server and protocol",
                response_model=VersionResponse,
                tags=("health",),
            )
        ],
    }


def liveness_of(gateway: Gateway) -> tuple[str, str]:
    """Status and reason for ``/health``. A server that drains or loads is alive."""
    verdict = check_liveness(gateway.engine, gateway.embedder, gateway.config.stall_timeout_s)
    return ("ok", "") if verdict.is_alive else ("stalled", verdict.reason)


def readiness_of(gateway: Gateway) -> tuple[str, str]:
    """Status and reason for ``/ready``."""
    if gateway.is_draining:
        return "draining", "the server is shutting down"
    if not gateway.is_ready:
        return "loading", "the model is warming up"
    return liveness_of(gateway)


def _answer(status: str, reason: str) -> Response:
    if status == "ok":
        return JSONResponse({"status": "ok"})
    return JSONResponse(
        {"status": status, "reason": reason}, 503, {"Retry-After": str(RETRY_LATER_S)}
    )
