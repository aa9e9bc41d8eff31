"""Building blocks of request models: what a foreign API knows and this server refuses by name."""

from __future__ import annotations

from typing import Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from sagellm.text.tool_formats import TOOL_NAME

_SHOWN_CHARS = 64


class RequestModel(BaseModel):
    """Rejects unknown fields, values of another type, NaN and infinities."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


FUNCTION_NAME = Field(json_schema_extra={"pattern": f"^{TOOL_NAME.pattern}$"})
"""For ``Annotated``: documents the rule of tools' names, which ``text.tool_formats`` enforces."""


def unsupported(remedy: str) -> WrapValidator:
    """For ``Annotated``: the field takes only the values of its type, the ones without effect.

    So the OpenAPI document shows what is taken, and any other value is a 400 that says why.

    Args:
        remedy: What to do instead, as the end of a sentence.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "unsupported", "not supported by this server; {remedy}", {"remedy": remedy}
            ) from None

    return WrapValidator(check)


def explained(expected: str) -> WrapValidator:
    """For ``Annotated``: one sentence instead of the problems of every branch of a union.

    Args:
        expected: What the field takes, as the end of ``"must be ..."``.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "value", "must be {expected}", {"expected": expected}
            ) from None

    return WrapValidator(check)


def _as_integers(value: Any) -> Any:
    if isinstance(value, list):
        if float in set(map(type, value)):
            return [_as_integers(item) for item in value]
    elif type(value) is float and value.is_integer():
        return int(value)
    return value


WHOLE = BeforeValidator(_as_integers)
"""For ``Annotated``, after a field's bounds: 5.0 is an integer, as in JSON Schema; also in a list.

JavaScript and Lua have one type of number, and some of their libraries write it so. Booleans,
strings and 5.5 are refused as ever.
"""


def only_types(*types: str, remedy: str) -> BeforeValidator:
    """For ``Annotated``: names the ``type`` of an object that is none of ``types``."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in types:
            raise PydanticCustomError(
                "unsupported_type",
                "type {kind} is not supported by this server; {remedy}",
                {"kind": repr(kind[:_SHOWN_CHARS]), "remedy": remedy},
            )
        return value

    return BeforeValidator(check)


def by_shape() -> Discriminator:
    """Chooses between the tags ``text`` (a string) and ``list`` (anything else)."""
    return Discriminator(lambda value: "text" if isinstance(value, str) else "list")
