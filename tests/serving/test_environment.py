"""Environment variables, logging and random values."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import logging
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import sagellm.serving
from sagellm.errors import InvalidArgumentError
from sagellm.serving import (
    Env,
    EnvGroup,
    EnvVar,
    RouterDef,
    Server,
    arandint,
    arandstr,
    env,
    log,
    randint,
    randstr,
)
from serving.support import client_of

DOCUMENTED_DEFAULTS = {
    "app": {"name": "ieops"},
    "log": {"level": "INFO", "format": "text"},
    "server": {"host": "127.0.0.1", "port": 8001, "socket": ""},
    "model": {"path": "", "name": "model", "timeout": 600, "concurrency": 8},
    "device": {"cuda_visible": "0", "device": "auto", "torch_dtype": "float16"},
    "storage": {
        "nfs_server": "",
        "pid": "u-00000000",
        "fs_name": "jfs-dev",
        "oid": "gmicloud.ieops",
        "uid": "gmicloud.ieops",
        "write_chunk_size": 524288,
        "read_chunk_size": 524288,
        "timeout": 30000,
    },
    "api": {"base_url": "", "key": "", "timeout": 30.0},
    "register": {"enabled": False, "url": "", "interval": 10.0},
}


@pytest.mark.parametrize("group", DOCUMENTED_DEFAULTS)
def test_defaults_of_every_group(group: str) -> None:
    assert getattr(Env({}), group).values() == DOCUMENTED_DEFAULTS[group]


def test_variables_are_read_when_asked_for_with_the_type_of_their_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODEL_SERVER_PORT", " 9000 ")
    assert env.server.port == 9000
    monkeypatch.setenv("MODEL_SERVER_PORT", "")
    assert env.server.port == 8001
    monkeypatch.setenv("IEOPS_REGISTER_ENABLED", "Yes")
    assert env.register.enabled is True
    with pytest.raises(AttributeError, match="MODEL_SERVER_PORT"):
        env.server.port = 1


def test_values_given_text_are_converted() -> None:
    given = Env({"I": "-3", "B": "off", "F": "2.5", "L": " a, b ,,c ", "E": ""})
    assert given.get_int("I") == -3
    assert given.get_bool("B", True) is False
    assert given.get_float("F") == 2.5
    assert given.get_list("L", ["x"]) == ["a", "b", "c"]
    assert (given.get("E", "x"), given.get_int("E", 4), given.get_list("E", ["x"])) == ("", 4, [])


def test_values_not_given_are_the_default() -> None:
    none = Env({})
    assert none.get("A", "d") == "d"
    assert none.get_int("A", 1) == 1
    assert none.get_bool("A", True) is True
    assert none.get_float("A", 1) == 1.0
    default = ["x"]
    none.get_list("A", default).append("y")
    assert none.get_list("A", default) == ["x"]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (lambda e: e.get_int("MODEL_SERVER_PORT"), "80a"),
        (lambda e: e.get_int("MODEL_SERVER_PORT"), "1.5"),
        (lambda e: e.get_bool("MODEL_SERVER_PORT"), "maybe"),
        (lambda e: e.get_float("MODEL_SERVER_PORT"), "nan"),
        (lambda e: e.server.port, "eighty"),
    ],
)
def test_a_malformed_value_is_an_error_that_names_its_variable(
    read: Callable[[Env], Any], text: str
) -> None:
    with pytest.raises(InvalidArgumentError, match="MODEL_SERVER_PORT") as caught:
        read(Env({"MODEL_SERVER_PORT": text}))
    assert text in str(caught.value)


def test_a_group_of_ones_own() -> None:
    class MyEnv(EnvGroup):
        depth = EnvVar("MY_DEPTH", 3)
        names = EnvVar("MY_NAMES", ["a"])

    mine = MyEnv({"MY_NAMES": "x,y"})
    assert (mine.depth, mine.names) == (3, ["x", "y"])
    assert (mine.is_set("depth"), mine.is_set("names")) == (False, True)


# --- log


@contextlib.contextmanager
def fresh_log() -> Iterator[io.StringIO]:
    """Yield a stream to configure the log with, in place of the test runner's handlers."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield io.StringIO()
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_json_records_carry_level_message_trace_id_and_exception() -> None:
    with fresh_log() as stream:
        log.configure("debug", "json", stream)
        try:
            raise ValueError("why")
        except ValueError:
            log.get_logger(trace_id="t-1").exception("it %s", "failed")
        log.debug("plain")
        first, second = map(json.loads, stream.getvalue().splitlines())
        assert (first["level"], first["message"], first["trace_id"]) == (
            "ERROR",
            "it failed",
            "t-1",
        )
        assert "ValueError: why" in first["exception"]
        assert second["message"] == "plain" and "trace_id" not in second


def test_text_records_are_one_line_that_a_client_cannot_forge() -> None:
    with fresh_log() as stream:
        log.configure("info", "text", stream)
        log.debug("hidden")
        log.get_logger("t-1").info("a\n2026-01-01 ERROR forged")
        (line,) = stream.getvalue().splitlines()
        assert "INFO sagellm.app [t-1] a\\n2026" in line


def test_configure_leaves_a_set_up_log_alone_and_refuses_nonsense() -> None:
    with fresh_log() as stream:
        log.configure("info", "text", stream)
        log.configure("info", "text", other := io.StringIO())
        log.warning("here")
        assert "here" in stream.getvalue() and not other.getvalue()
        for level, kind, words in (("loud", None, "LOG_LEVEL"), (None, "xml", "LOG_FORMAT")):
            with pytest.raises(InvalidArgumentError, match=words):
                log.configure(level, kind)


@pytest.mark.parametrize("threaded", [False, True])
def test_records_of_a_handler_carry_the_trace_id_of_its_request(threaded: bool) -> None:
    with fresh_log() as stream:
        log.configure("info", "json", stream)

        def in_thread(query: Any) -> None:
            log.info("seen")

        async def in_loop(query: Any) -> None:
            log.info("seen")

        server = Server({"t": [RouterDef("go", in_thread if threaded else in_loop)]})
        with client_of(server) as client:
            client.post("/t/go", headers={"X-Trace-Id": "mine"})
        records = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert [r["trace_id"] for r in records if r["message"] == "seen"] == ["mine"]


# --- random values, and the original names


def test_random_values_have_their_length_alphabet_and_range() -> None:
    allowed = set(string.ascii_letters + string.digits)
    for text in (randstr(40), asyncio.run(arandstr(40))):
        assert len(text) == 40 and set(text) <= allowed
    assert randstr(40) != randstr(40)
    assert randstr(0) == ""
    assert {randint(1, 3) for _ in range(200)} == {1, 2, 3}
    assert asyncio.run(arandint(5, 5)) == 5
    with pytest.raises(InvalidArgumentError, match="length"):
        randstr(-1)
    with pytest.raises(InvalidArgumentError, match="low <= high"):
        randint(2, 1)


@pytest.mark.parametrize("module", ["handler", "config", "utils"])
def test_the_original_names_are_the_same_objects(module: str) -> None:
    original = importlib.import_module(f"gmi_ieops.{module}")
    for name in original.__all__:
        assert getattr(original, name) is getattr(sagellm.serving, name)


def test_storage_says_that_it_is_missing_and_what_to_do() -> None:
    with pytest.raises(ImportError, match="mount the share"):
        importlib.import_module("gmi_ieops.storage")
