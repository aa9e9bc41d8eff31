"""The native readers against files of the `gguf` and `safetensors` packages, and hostile ones."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from sagellm.errors import CorruptFileError, InvalidArgumentError, UnsupportedError

pytestmark = pytest.mark.native
checkpoint = pytest.importorskip("sagellm._core").checkpoint

# ---- building files by hand, so that they can be wrong -----------------------------------------


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    out = magic + struct.pack("<IQQ", version, num_tensors, num_entries)
    out += b"".join(entries + tensors)
    return out + b"\0" * (-len(out) % alignment) + data


def open_gguf(tmp_path: Path, content: bytes) -> checkpoint.GgufFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return checkpoint.GgufFile(str(path))


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def open_safetensors(tmp_path: Path, content: bytes) -> checkpoint.SafetensorsFile:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return checkpoint.SafetensorsFile(str(path))


F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

# ---- what other programs write -----------------------------------------------------------------


def test_reads_what_gguf_writes(tmp_path: Path):
    path = tmp_path / "written.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint8("n.u8", 255)
    writer.add_int8("n.i8", -128)
    writer.add_uint16("n.u16", 65535)
    writer.add_int16("n.i16", -32768)
    writer.add_uint32("n.u32", 2**32 - 1)
    writer.add_int32("n.i32", -(2**31))
    writer.add_uint64("n.u64", 2**64 - 1)
    writer.add_int64("n.i64", -(2**63))
    writer.add_float32("n.f32", 0.1)
    writer.add_float64("n.f64", 0.1)
    writer.add_bool("n.bool", True)
    writer.add_string("text", "grüße 你好 🙂")
    writer.add_array("tokens", ["a", "ü", "", "▁b"])
    writer.add_array("scores", [0.5, -1.0])
    writer.add_array("types", [1, 2, 3])
    writer.add_array("flags", [True, False])
    values = rng.standard_normal((3, 5, 256)).astype(np.float32)
    stored = {}
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        stored[name] = gguf.quants.quantize(values, kind)
        writer.add_tensor(f"t.{name}", stored[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = checkpoint.GgufFile(str(path))
    metadata = file.metadata
    assert metadata["general.architecture"] == "llama"
    assert {k: v for k, v in metadata.items() if k.startswith("n.")} == {
        "n.u8": 255,
        "n.i8": -128,
        "n.u16": 65535,
        "n.i16": -32768,
        "n.u32": 2**32 - 1,
        "n.i32": -(2**31),
        "n.u64": 2**64 - 1,
        "n.i64": -(2**63),
        "n.f32": float(np.float32(0.1)),
        "n.f64": 0.1,
        "n.bool": True,
    }
    assert metadata["n.bool"] is True
    assert metadata["text"] == "grüße 你好 🙂"
    assert metadata["tokens"].tolist() == ["a", "ü", "", "▁b"]
    np.testing.assert_array_equal(metadata["scores"], np.array([0.5, -1.0], np.float32))
    assert metadata["types"].tolist() == [1, 2, 3]
    assert metadata["types"].dtype == np.int32
    assert metadata["flags"].tolist() == [True, False]
    assert metadata is file.metadata

    for name, data in stored.items():
        info = file.tensors[f"t.{name}"]
        assert (info.name, info.format, info.shape) == (f"t.{name}", name, (3, 5, 256))
        raw = file.raw(info.name)
        assert raw.nbytes == info.nbytes
        np.testing.assert_array_equal(raw, np.ascontiguousarray(data).view(np.uint8).reshape(-1))
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        np.testing.assert_array_equal(file.dequantize(info.name), expected.reshape(values.shape))


@pytest.mark.parametrize("version", (2, 3))
def test_reads_versions_2_and_3_and_nested_arrays(tmp_path: Path, version: int):
    inner = struct.pack("<IQ2H", 2, 2, 7, 8)
    outer = struct.pack("<IQ", 9, 2) + inner + struct.pack("<IQ", 8, 1) + text("x")
    content = gguf_bytes(
        [entry("nested", 9, outer), entry("general.alignment", 4, struct.pack("<I", 64))],
        [tensor("w", (2,), 0, 0), tensor("v", (1,), 0, 64)],
        struct.pack("<2f", 1, 2).ljust(64, b"\0") + struct.pack("<f", 3),
        version=version,
        alignment=64,
    )
    file = open_gguf(tmp_path, content)
    assert file.metadata["nested"][0].tolist() == [7, 8]
    assert file.metadata["nested"][1] == ["x"]
    assert file.dequantize("w").tolist() == [1, 2]
    assert file.dequantize("v").tolist() == [3]


def test_strings_are_a_sequence_that_keeps_the_file(tmp_path: Path):
    words = ["a", "ü", ""]
    array = struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words))
    strings = open_gguf(tmp_path, gguf_bytes([entry("words", 9, array)])).metadata["words"]
    gc.collect()  # the file itself is gone
    assert len(strings) == 3 and list(strings) == words
    assert (strings[1], strings[-3]) == ("ü", "a")
    for index in (3, -4):
        with pytest.raises(IndexError):
            strings[index]


def test_raw_is_a_read_only_view_that_keeps_the_file(tmp_path: Path):
    content = gguf_bytes([], [tensor("w", (2,), 0, 0)], struct.pack("<2f", 1, 2))
    raw = open_gguf(tmp_path, content).raw("w")
    gc.collect()
    assert not raw.flags.writeable
    assert not raw.flags.owndata
    assert raw.view(np.float32).tolist() == [1, 2]


def test_missing_tensor_is_named(tmp_path: Path):
    file = open_gguf(tmp_path, gguf_bytes())
    for call in (file.raw, file.dequantize):
        with pytest.raises(CorruptFileError, match=r"model.gguf: no tensor 'blk.0'"):
            call("blk.0")


def test_reads_what_safetensors_writes(tmp_path: Path):
    rng = np.random.default_rng(1)
    tensors = {
        "a.f32": rng.standard_normal((2, 3)).astype(np.float32),
        "b.f16": rng.standard_normal((4, 1, 2)).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "ids": np.arange(3, dtype=np.int64),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", "ü": '"\\'})
    file = checkpoint.SafetensorsFile(str(path))
    assert file.metadata == {"format": "pt", "ü": '"\\'}
    assert set(file.tensors) == set(tensors)
    for name, expected in tensors.items():
        assert file.tensors[name].shape == expected.shape
        assert file.tensors[name].nbytes == expected.nbytes
        if name == "ids":
            continue
        assert file.raw(name).tobytes() == expected.tobytes()
        np.testing.assert_array_equal(file.dequantize(name), expected.astype(np.float32))
    assert file.tensors["ids"].format == "I64"
    for call in (file.raw, file.dequantize):
        with pytest.raises(UnsupportedError, match="stored as 'I64'; supported: F32, F16, BF16"):
            call("ids")


def test_reads_bf16_at_an_odd_address(tmp_path: Path):
    header = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}} '
    header = header if len(header) % 2 else header + b" "
    file = open_safetensors(tmp_path, safetensors_bytes(header, struct.pack("<2H", 0x3F80, 0xC000)))
    assert file.dequantize("w").tolist() == [1, -2]


def test_safetensors_names_may_use_any_escape(tmp_path: Path):
    header = rb'{"\u00fc\ud83d\ude42\/\n":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    file = open_safetensors(tmp_path, safetensors_bytes(header, b"\0" * 4))
    assert list(file.tensors) == ["ü🙂/\n"]


# ---- paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ("GgufFile", "SafetensorsFile"))
def test_paths_that_are_no_file_name_the_remedy(tmp_path: Path, reader: str):
    opener = getattr(checkpoint, reader)
    with pytest.raises(InvalidArgumentError, match=r"cannot open 'none.gguf'.*check the path"):
        opener(str(tmp_path / "none.gguf"))
    with pytest.raises(InvalidArgumentError, match="not a regular file"):
        opener(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidArgumentError, match="not a regular file"):
        opener(str(tmp_path / "pipe"))
    (tmp_path / "empty").touch()
    with pytest.raises(CorruptFileError, match="'empty' is empty; download it again"):
        opener(str(tmp_path / "empty"))


# ---- hostile GGUF ------------------------------------------------------------------------------


def test_gguf_truncated_at_any_byte_is_refused(tmp_path: Path):
    content = gguf_bytes(
        [
            entry("general.architecture", 8, text("llama")),
            entry("tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("bc")),
            entry("scores", 9, struct.pack("<IQ2f", 6, 2, 1, 2)),
        ],
        [tensor("w", (32, 2), 2, 0)],
        bytes(36),
    )
    assert open_gguf(tmp_path, content).tensors["w"].nbytes == 36
    for size in range(1, len(content)):
        with pytest.raises(CorruptFileError):
            open_gguf(tmp_path, content[:size])


BIG = 2**64 - 1
ALIGNMENT = "general.alignment"
W = tensor("w", (32,), 0, 0)
HOSTILE_GGUF = {
    "bad magic": (gguf_bytes(magic=b"GGML"), "not a GGUF file"),
    "html": (b"<!doctype html>", "not a GGUF file"),
    "huge tensor count": (gguf_bytes(counts=(BIG, 0)), "the limit is 65536"),
    "huge value count": (gguf_bytes(counts=(0, 65537)), "the limit is 65536"),
    "many absent tensors": (gguf_bytes(counts=(65536, 0), alignment=1), "truncated"),
    "huge key": (gguf_bytes([struct.pack("<Q", BIG)]), "truncated"),
    "empty key": (gguf_bytes([entry("", 0, b"\0")]), "metadata key"),
    "key not utf-8": (gguf_bytes([text(b"\xff") + struct.pack("<IB", 0, 0)]), "not valid UTF-8"),
    "surrogate": (gguf_bytes([entry("k", 8, text(b"\xed\xa0\x80"))]), "not valid UTF-8"),
    "overlong": (gguf_bytes([entry("k", 8, text(b"\xc0\xaf"))]), "not valid UTF-8"),
    "unknown value type": (gguf_bytes([entry("k", 13, b"")]), "metadata type 13"),
    "bool is 2": (gguf_bytes([entry("k", 7, b"\2")]), "bool"),
    "bools hold 2": (gguf_bytes([entry("k", 9, struct.pack("<IQ2B", 7, 2, 1, 2))]), "bool array"),
    "duplicate key": (gguf_bytes([entry("k", 0, b"\1")] * 2), "'k' appears twice"),
    "huge string": (gguf_bytes([entry("k", 8, struct.pack("<Q", 2**63))]), "truncated"),
    "huge number array": (gguf_bytes([entry("k", 9, struct.pack("<IQ", 10, 2**61))]), "claims"),
    "huge string array": (gguf_bytes([entry("k", 9, struct.pack("<IQ", 8, BIG))]), "claims"),
    "huge nested array": (gguf_bytes([entry("k", 9, struct.pack("<IQ", 9, BIG // 12))]), "claims"),
    "deep": (gguf_bytes([entry("k", 9, struct.pack("<IQ", 9, 1) * 5 + bytes(64))]), "nest deeper"),
    "array type": (gguf_bytes([entry("k", 9, struct.pack("<IQ", 99, 0))]), "metadata type 99"),
    "alignment 0": (gguf_bytes([entry(ALIGNMENT, 4, bytes(4))]), "power of two"),
    "alignment 24": (gguf_bytes([entry(ALIGNMENT, 4, struct.pack("<I", 24))]), "power of two"),
    "alignment huge": (gguf_bytes([entry(ALIGNMENT, 4, struct.pack("<I", 2**31))]), "power of two"),
    "alignment as text": (gguf_bytes([entry(ALIGNMENT, 8, text("32"))]), "not a uint32"),
    "no name": (gguf_bytes([], [tensor("", (1,), 0, 0)], bytes(4)), "tensor name"),
    "no dimensions": (gguf_bytes([], [tensor("w", (), 0, 0)], bytes(4)), "has 0 dimensions"),
    "five dimensions": (gguf_bytes([], [tensor("w", (1,) * 5, 0, 0)], bytes(4)), "has 5 dim"),
    "zero extent": (gguf_bytes([], [tensor("w", (0,), 0, 0)]), "extent of 0"),
    "negative extent": (gguf_bytes([], [tensor("w", (2**63,), 0, 0)]), "extent of"),
    "elements overflow": (gguf_bytes([], [tensor("w", (2**32, 2**32), 0, 0)]), "overflow"),
    "bytes overflow": (gguf_bytes([], [tensor("w", (2**62, 2), 0, 0)]), "overflow"),
    "offset overflow": (gguf_bytes([], [tensor("w", (1,), 0, BIG - 31)], bytes(4)), "overflow"),
    "row not whole blocks": (gguf_bytes([], [tensor("w", (16, 2), 2, 0)], bytes(18)), "Q4_0 block"),
    "misaligned": (gguf_bytes([], [tensor("w", (1,), 0, 4)], bytes(64)), "the alignment 32"),
    "outside": (gguf_bytes([], [tensor("w", (1,), 0, 32)], bytes(32)), "ends at byte"),
    "one byte short": (gguf_bytes([], [W], bytes(127)), "ends at byte"),
    "duplicate tensor": (gguf_bytes([], [W, tensor("w", (32,), 0, 128)], bytes(256)), "two tens"),
    "overlap": (gguf_bytes([], [W, tensor("v", (32,), 0, 96)], bytes(256)), "overlap"),
    "same bytes": (gguf_bytes([], [W, tensor("v", (32,), 0, 0)], bytes(256)), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_GGUF)
def test_hostile_gguf_is_refused(tmp_path: Path, case: str):
    content, message = HOSTILE_GGUF[case]
    with pytest.raises(CorruptFileError, match=message):
        open_gguf(tmp_path, content)


@pytest.mark.parametrize("version", (0, 1, 4, 0x03000000))
def test_other_gguf_versions_are_unsupported(tmp_path: Path, version: int):
    with pytest.raises(UnsupportedError, match="convert the model again"):
        open_gguf(tmp_path, gguf_bytes(version=version))


@pytest.mark.parametrize("kind", (4, 9, 15, 16, 24, 26, 28, 39, 2**32 - 1))
def test_unsupported_tensor_type_lists_the_supported_ones(tmp_path: Path, kind: int):
    content = gguf_bytes([], [tensor("blk.0.w", (256,), kind, 0)], bytes(4096))
    message = rf"'blk.0.w' has GGML type {kind}; supported: F32, .*, IQ4_NL"
    with pytest.raises(UnsupportedError, match=message):
        open_gguf(tmp_path, content)


def test_messages_carry_no_control_characters(tmp_path: Path):
    name = "\x1b[31m" + "x" * 500
    with pytest.raises(CorruptFileError) as caught:
        open_gguf(tmp_path, gguf_bytes([], [tensor(name, (1,), 0, 0)]))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


# ---- hostile safetensors -----------------------------------------------------------------------


def test_safetensors_truncated_at_any_byte_is_refused(tmp_path: Path):
    content = safetensors_bytes({"__metadata__": {"a": "b"}, "w": F32_PAIR}, bytes(8))
    assert open_safetensors(tmp_path, content).tensors["w"].nbytes == 8
    for size in range(1, len(content)):
        with pytest.raises(CorruptFileError):
            open_safetensors(tmp_path, content[:size])


def pair(**changes: object) -> bytes:
    return safetensors_bytes({"w": F32_PAIR | changes}, bytes(8))


HOSTILE_SAFETENSORS = {
    "short": (b"\0" * 7, "too few"),
    "huge header": (struct.pack("<Q", BIG) + b"{}", "claims a header"),
    "header one too long": (struct.pack("<Q", 3) + b"{}", "claims a header"),
    "empty header": (safetensors_bytes(b""), "expected '{'"),
    "array": (safetensors_bytes(b"[]"), "expected '{'"),
    "unfinished": (safetensors_bytes(b'{"w":'), "malformed"),
    "trailing comma": (safetensors_bytes(b'{"__metadata__":{},}'), "malformed"),
    "trailing text": (safetensors_bytes(b"{}x"), "follows the closing brace"),
    "deep": (safetensors_bytes(b'{"w":' + b"[" * 10000), "malformed"),
    "negative": (pair(data_offsets=[-1, 8]), "integer"),
    "fraction": (pair(shape=[2.0]), "malformed"),
    "exponent": (safetensors_bytes(b'{"w":{"shape":[1e9]}}'), "malformed"),
    "leading zero": (safetensors_bytes(b'{"w":{"shape":[02]}}'), "leading zero"),
    "65 bits": (pair(data_offsets=[0, 2**64]), "64 bits"),
    "shape is null": (pair(shape=None), "malformed"),
    "dtype is a number": (pair(dtype=1), "malformed"),
    "three offsets": (pair(data_offsets=[0, 4, 8]), "malformed"),
    "reversed offsets": (pair(data_offsets=[8, 0]), "takes bytes"),
    "outside": (pair(data_offsets=[0, 9]), "takes bytes"),
    "wrong size": (pair(shape=[3]), "need 12"),
    "extent overflow": (pair(shape=[2**63]), "beyond any limit"),
    "product overflow": (pair(shape=[2**40, 2**40]), "overflow"),
    "half a byte": (pair(dtype="F4", shape=[15]), "need"),
    "many dimensions": (pair(shape=[1] * 9), "beyond any limit"),
    "lacks shape": (safetensors_bytes(b'{"w":{"dtype":"F32","data_offsets":[0,0]}}'), "lacks"),
    "unknown field": (pair(extra=1), "unknown field 'extra'"),
    "duplicate field": (
        safetensors_bytes(b'{"w":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "two fields dtype",
    ),
    "duplicate tensor": (
        safetensors_bytes(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
                          b'"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "two tensors are named 'w'",
    ),
    "two metadata": (safetensors_bytes(b'{"__metadata__":{},"__metadata__":{}}'), "two __meta"),
    "duplicate key": (safetensors_bytes(b'{"__metadata__":{"a":"","a":""}}'), "'a' appears twice"),
    "metadata not text": (safetensors_bytes(b'{"__metadata__":{"a":1}}'), "malformed"),
    "hole": (safetensors_bytes({"w": F32_PAIR}, bytes(12)), "cover 8 of 12"),
    "overlap": (
        safetensors_bytes({"v": F32_PAIR, "w": F32_PAIR | {"data_offsets": [4, 12]}}, bytes(12)),
        "overlap",
    ),
    "control character": (safetensors_bytes(b'{"a\nb":1}'), "control character"),
    "bad escape": (safetensors_bytes(rb'{"\x":1}'), "unknown escape"),
    "bad hex": (safetensors_bytes(rb'{"\u00g0":1}'), "hexadecimal"),
    "lone high surrogate": (safetensors_bytes(rb'{"\ud83d":1}'), "surrogate"),
    "lone low surrogate": (safetensors_bytes(rb'{"\ude42":1}'), "surrogate"),
    "not utf-8": (safetensors_bytes(b'{"\xff":1}'), "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_is_refused(tmp_path: Path, case: str):
    content, message = HOSTILE_SAFETENSORS[case]
    with pytest.raises(CorruptFileError, match=message):
        open_safetensors(tmp_path, content)


def test_dtypes_of_later_versions_are_listed(tmp_path: Path):
    header = {"w": {"dtype": "F5_NEW", "shape": [3], "data_offsets": [0, 2]}}
    file = open_safetensors(tmp_path, safetensors_bytes(header, bytes(2)))
    assert file.tensors["w"].format == "F5_NEW"
    with pytest.raises(UnsupportedError, match="F5_NEW"):
        file.raw("w")
