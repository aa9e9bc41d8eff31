"""instructor against a running server: drive_instructor.py URL MODEL."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import instructor
from checks import run, server_and_model
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL = server_and_model()
MODES = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)


class Person(BaseModel):
    """A person. Everything is bounded, so that a small model comes to an end."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["Ann", "Bob", "Eve"]
    age: Annotated[int, Field(ge=0, le=99)]
    tags: Annotated[list[Literal["tall", "old", "kind"]], Field(max_length=2)]


def request(**more: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Ann is 31 years old and kind. Extract her."}],
        "max_tokens": 128,
        "temperature": 0,
        "max_retries": 0,
        **more,
    }


def client(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=mode)


def every_mode_gives_an_object() -> None:
    for mode in MODES:
        found = client(mode).chat.completions.create(response_model=Person, **request())
        assert isinstance(found, Person), mode


def asynchronous() -> None:
    async def ask() -> Person:
        server = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none")
        patched = instructor.from_openai(server, mode=instructor.Mode.JSON_SCHEMA)
        return await patched.chat.completions.create(response_model=Person, **request())

    assert isinstance(asyncio.run(ask()), Person)


def partial_objects_while_streaming() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        found = list(client(mode).chat.completions.create_partial(Person, **request()))
        assert len(found) > 1, mode
        Person.model_validate(found[-1].model_dump())


def the_answer_comes_along() -> None:
    person, answer = client(instructor.Mode.TOOLS).chat.completions.create_with_completion(
        response_model=Person, **request()
    )
    assert isinstance(person, Person)
    assert answer.usage.completion_tokens > 0


if __name__ == "__main__":
    run(
        "instructor",
        (
            every_mode_gives_an_object,
            asynchronous,
            partial_objects_while_streaming,
            the_answer_comes_along,
        ),
    )
