"""langchain-openai against a running server: drive_langchain.py URL MODEL."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from checks import embedding_model, run, server_and_model
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import BadRequestError
from pydantic import BaseModel, ConfigDict, SecretStr

URL, MODEL = server_and_model()
ENDPOINT: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": SecretStr("none"), "model": MODEL}
QUESTION = [SystemMessage("Be brief."), HumanMessage("What is the capital of France?")]


def model(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(**{**ENDPOINT, "temperature": 0, "max_tokens": 24, **options})


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Weather of a city."""
    return f"It rains in {city}."


class Colour(BaseModel):
    """A colour."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "green"]


def chat() -> None:
    answer = model().invoke(QUESTION)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0


def streamed_chat_equals_the_whole() -> None:
    whole = model().invoke(QUESTION)
    pieces = list(model(stream_usage=True).stream(QUESTION))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert sum(piece.usage_metadata is not None for piece in pieces) == 1


def batch_and_asynchronous() -> None:
    answers = model().batch([QUESTION] * 3)
    answers.append(asyncio.run(model().ainvoke(QUESTION)))
    assert len({answer.content for answer in answers}) == 1


def tools_there_and_back() -> None:
    bound = model(max_tokens=64).bind_tools([get_weather], tool_choice="get_weather")
    call = bound.invoke(QUESTION)
    assert [item["name"] for item in call.tool_calls] == ["get_weather"]
    assert not call.invalid_tool_calls
    result = get_weather.invoke(call.tool_calls[0])
    assert isinstance(result, ToolMessage)
    assert model().invoke([*QUESTION, call, result]).content is not None


def streamed_tool_call() -> None:
    bound = model(max_tokens=64).bind_tools(
        [get_weather], tool_choice="required", parallel_tool_calls=False
    )
    pieces = list(bound.stream(QUESTION))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert [item["name"] for item in whole.tool_calls] == ["get_weather"]
    assert whole.tool_calls[0]["args"]["city"] in ("Paris", "Rome")


def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        found = model(max_tokens=64).with_structured_output(Colour, method=method).invoke(QUESTION)
        assert isinstance(found, Colour), method


def completions() -> None:
    legacy = OpenAI(**{**ENDPOINT, "temperature": 0, "max_tokens": 8})
    whole = legacy.invoke("Once upon a time")
    assert whole
    assert "".join(legacy.stream("Once upon a time")) == whole


def embeddings() -> None:
    found = OpenAIEmbeddings(
        **{**ENDPOINT, "model": embedding_model()}, check_embedding_ctx_length=False
    )
    vectors = found.embed_documents(["one", "two"])
    assert len(vectors) == 2
    assert len(vectors[0]) == len(found.embed_query("three")) > 0


def errors_have_their_class() -> None:
    try:
        model(temperature=-1).invoke(QUESTION)
    except BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a negative temperature was accepted")


if __name__ == "__main__":
    run(
        "langchain-openai",
        (
            chat,
            streamed_chat_equals_the_whole,
            batch_and_asynchronous,
            tools_there_and_back,
            streamed_tool_call,
            structured_output,
            completions,
            embeddings,
            errors_have_their_class,
        ),
    )
