"""Requests that are none, as bytes: what each is answered with, and whether its connection may go on."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from raw_http import post

INFER = "/v2/models/id/infer"
START = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
#: Of the agent that is asked.
MAX_BODY_BYTES = 200_000


@dataclass(frozen=True)
class Case:
    """``says``: a part of the error's text. ``closes``: the connection ends with the answer: nobody can know where the
    next request would begin (or the rest of this one isn't worth reading)."""

    name: str
    data: bytes
    status: int
    says: str
    closes: bool = False


def ask(value: int) -> bytes:
    """What is to be answered with that value."""
    return post(INFER, tensor(data=[value]))


def tensor(**changes: Any) -> bytes:
    """An inference of one tensor, with changes to it; None leaves a key out."""
    whole = {"name": "x", "datatype": "INT64", "shape": [1], "data": [1]} | changes
    return json.dumps({"inputs": [{key: value for key, value in whole.items() if value is not None}]}).encode()


def no_http(name: str, data: bytes, says: str) -> Case:
    return Case(name, data, 400, says, closes=True)


#: What isn't HTTP, or HTTP that could be read in two ways: a proxy in front might have read it in the other one.
FRAMING = (
    no_http("two lengths", START + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "Content-Length"),
    no_http("the same length twice", START + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", "Content-Length"),
    no_http("a list of lengths", START + b"Content-Length: 2, 2\r\n\r\n{}", "Content-Length"),
    no_http("a length with a plus", START + b"Content-Length: +2\r\n\r\n{}", "Content-Length"),
    no_http("a negative length", START + b"Content-Length: -2\r\n\r\n{}", "Content-Length"),
    no_http("a length in hex", START + b"Content-Length: 0x2\r\n\r\n{}", "Content-Length"),
    no_http("no digits of a length", START + b"Content-Length: \r\n\r\n{}", "Content-Length"),
    no_http("a length of two numbers", START + b"Content-Length: 1 2\r\n\r\n{}", "Content-Length"),
    no_http("a length beyond 64 bits", START + b"Content-Length: 99999999999999999999999\r\n\r\n{}", "Content-Length"),
    Case("a length of 63 bits", START + b"Content-Length: 9223372036854775808\r\n\r\n{}", 413, "longer than", True),
    no_http(
        "length, then chunks",
        START + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding",
    ),
    no_http(
        "chunks, then length",
        START + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        "Content-Length",
    ),
    no_http(
        "a request behind the end of the chunks",
        START + b"Content-Length: 60\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + ask(666),
        "Transfer-Encoding",
    ),
    no_http(
        "not chunked at the end", START + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", "Transfer-Encoding"
    ),
    no_http("not chunked at all", START + b"Transfer-Encoding: gzip\r\n\r\n{}", "Transfer-Encoding"),
    no_http("identity", START + b"Transfer-Encoding: identity\r\n\r\n{}", "Transfer-Encoding"),
    no_http("chunked twice", START + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding"),
    no_http(
        "chunked in two headers",
        START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding",
    ),
    no_http("chunked misspelt", START + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding"),
    no_http("a space before the colon", START + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", "header"),
    Case(
        "compressed chunks",
        START + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        501,
        "Transfer-Encoding gzip, chunked",
    ),
    no_http("a chunk of no size", CHUNKED + b"ZZ\r\n{}\r\n0\r\n\r\n", "chunk size"),
    no_http("a chunk of negative size", CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n", "chunk size"),
    no_http("a chunk in 0x", CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", "chunk size"),
    no_http("a chunk beyond 64 bits", CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n{}", "chunk size"),
    no_http("a chunk longer than it says", CHUNKED + b"2\r\n{}x\r\n0\r\n\r\n", "chunk"),
    no_http("chunks without CR", CHUNKED + b"2\n{}\n0\n\n", "chunk size"),
    no_http("lines without CR", START.replace(b"\r", b"") + b"Content-Length: 2\n\n{}", "CR"),
    no_http("a CR in a value", START + b"X: a\rb\r\nContent-Length: 2\r\n\r\n{}", "LF"),
    no_http("a NUL in a value", START + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}", "header value"),
    no_http("a folded header", START + b"X: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "header value"),
    no_http("a header without a colon", START + b"X\r\nContent-Length: 2\r\n\r\n{}", "header"),
    no_http("a header without a name", START + b": x\r\nContent-Length: 2\r\n\r\n{}", "header"),
    no_http("a name with a space", START + b"a b: x\r\nContent-Length: 2\r\n\r\n{}", "header"),
    no_http("HTTP/1.9", b"GET /v2 HTTP/1.9\r\nHost: x\r\n\r\n", "version"),
    no_http("HTTP/3", b"GET /v2 HTTP/3.0\r\nHost: x\r\n\r\n", "version"),
    no_http("HTTP/2 without asking", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/1.1"),
    no_http("no method", b"BREW /v2 HTTP/1.1\r\nHost: x\r\n\r\n", "method"),
    no_http("a method in small letters", b"get /v2 HTTP/1.1\r\nHost: x\r\n\r\n", "method"),
    no_http("CONNECT", b"CONNECT example.org:80 HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1"),
    no_http("no path", b"GET  HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1"),
    no_http("a path that isn't ASCII", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", "url"),
    no_http("a host without its end", b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1"),
    no_http("a relative path", b"GET v2 HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1"),
    no_http("TLS to a plain door, or the reverse", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "method"),
    Case("a header without end", b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 400_000, 431, "longer than 65536", True),
    Case("headers without end", b"GET /v2 HTTP/1.1\r\n" + b"X: a\r\n" * 80_000, 431, "longer than 65536", True),
    Case("a trailer without end", CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 80_000, 431, "longer than 65536", True),
    Case("no body", START + b"\r\n", 400, "empty"),
    Case("OPTIONS of everything", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 404, "nothing at *"),
    Case("a header hidden in a path", b"GET /v2/models/a%0d%0aX:y HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no model"),
    Case("a way out of the folder", b"GET /v2/models/..%2f..%2fetc HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no model"),
    Case("a path of 60 KB", b"GET /v2/models/" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 404, "no model"),
    Case("a length shorter than the body", START + b"Content-Length: 1\r\n\r\n{}", 400, "truncated"),
)


def named(name: str, **changes: Any) -> Case:
    """A tensor that is wrong in one way; the error names it."""
    return Case(name, post(INFER, tensor(**changes)), 400, "input 'x'")


def data(text: str) -> bytes:
    return post(INFER, b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":%s}]}' % text.encode())


def parameters(text: str) -> bytes:
    whole = tensor()[:-1] + b',"parameters":{%s}}' % text.encode()
    return post(INFER, whole)


def binary(size: Any, content: bytes, shape: Any = (1,), length: str | None = None) -> bytes:
    head = tensor(data=None, shape=list(shape), parameters={"binary_data_size": size})
    length = str(len(head)) if length is None else length
    return post(INFER, head + content, f"Inference-Header-Content-Length: {length}")


EIGHT = struct.pack("<q", 1)
LENGTH = "Inference-Header-Content-Length"

#: HTTP that is no inference of this model.
ENVELOPES = (
    Case("null", post(INFER, b"null"), 400, "object"),
    Case("a list", post(INFER, b"[]"), 400, "object"),
    Case("half a document", post(INFER, tensor()[:-3]), 400, "truncated"),
    Case("two documents", post(INFER, tensor() * 2), 400, "trailing"),
    Case("a byte order mark", post(INFER, b"\xef\xbb\xbf" + tensor()), 400, "malformed"),
    Case("UTF-16", post(INFER, tensor().decode().encode("utf-16")), 400, "malformed"),
    Case("Latin-1", post(INFER, b'{"id":"\xe9",' + tensor()[1:]), 400, "UTF-8"),
    Case("half a surrogate pair", post(INFER, b'{"id":"\\ud800",' + tensor()[1:]), 400, "Unicode"),
    Case("an id that is no text", post(INFER, b'{"id":5,' + tensor()[1:]), 400, "$.id"),
    Case("deep data", data("[" * 90_000 + "]" * 90_000), 400, "nested too deeply"),
    Case("a deep key that nobody reads", post(INFER, b'{"z":%s,' % (b"[" * 90_000 + b"]" * 90_000)), 400, "too deeply"),
    Case("deep parameters", parameters('"a":' * 1 + '{"a":' * 30_000 + "1" + "}" * 30_000), 400, "parameters"),
    Case("NaN", data("[NaN]"), 400, "binary data"),
    Case("Infinity", data("[-Infinity]"), 400, "binary data"),
    Case("1e999", data("[1e999]"), 400, "out of range"),
    Case("more digits than there are", data("[" + "9" * 5000 + "]"), 400, "out of range"),
    Case("one too many for 64 bits", data("[9223372036854775808]"), 400, "out of the range of INT64"),
    Case("a fraction", data("[1.5]"), 400, "fraction"),
    Case("a text", data('["1"]'), 400, "text"),
    Case("a truth", data("[true]"), 400, "true or false"),
    Case("nothing", data("[null]"), 400, "null"),
    Case("an object", data("[{}]"), 400, "object"),
    Case("data that is no list", data('"abc"'), 400, "not a list"),
    Case("ragged data", post(INFER, tensor(shape=[3], data=[[1, 2], [3]])), 400, "rows"),
    named("too few", shape=[3]),
    named("too many", data=[1, 2]),
    named("no data", data=None),
    named("a negative dimension", shape=[-1]),
    named("a dimension of 2^63", shape=[2**63 - 1]),
    named("dimensions that multiply to 0 in 64 bits", shape=[2**32, 2**32]),
    named("a dimension beyond 64 bits", shape=[2**70]),
    named("no elements, hugely", shape=[0, 2**62], data=[]),
    named("a thousand dimensions", shape=[1] * 1000),
    named("a scalar", shape=[]),
    named("another rank", shape=[1, 1]),
    named("no datatype", datatype="INT7"),
    named("another datatype", datatype="FP32"),
    named("a datatype in small letters", datatype="int64"),
    Case("a shape of fractions", post(INFER, tensor(shape=[1.5])), 400, "shape"),
    Case("a shape that is no list", post(INFER, tensor(shape="1")), 400, "shape"),
    Case("no shape", post(INFER, tensor(shape=None)), 400, "shape"),
    Case("no name", post(INFER, tensor(name=None)), 400, "name"),
    Case("another name", post(INFER, tensor(name="z")), 400, "'z'"),
    Case("the same input twice", post(INFER, tensor()[:-2] + b"," + tensor()[12:]), 400, "twice"),
    Case("an output nobody has", post(INFER, tensor()[:-1] + b',"outputs":[{"name":"z"}]}'), 400, "'z'"),
    Case("a timeout in words", parameters('"timeout":"soon"'), 400, "timeout"),
    Case("a timeout of 400 digits", parameters('"timeout":' + "9" * 400), 400, "timeout"),
    Case("a priority beyond all", parameters('"priority":-1'), 400, "priority"),
    Case("binary data too short", binary(8, EIGHT[:5]), 400, "5 are left"),
    Case("binary data too long", binary(8, EIGHT + b"zz"), 400, "left over"),
    Case("binary data of another shape", binary(8, EIGHT, shape=[2]), 400, "takes 16"),
    Case("binary data of a negative size", binary(-8, EIGHT), 400, "binary_data_size"),
    Case("binary data of 2^62 bytes", binary(2**62, EIGHT), 400, "are left"),
    Case("binary data of a size in words", binary("8", EIGHT), 400, "binary_data_size"),
    Case("binary data of 0 bytes for 2^64", binary(0, b"", shape=[2**32, 2**32]), 400, "dimension"),
    Case("a JSON longer than the body", binary(8, EIGHT, length="9999"), 400, LENGTH),
    Case("a JSON of negative length", binary(8, EIGHT, length="-1"), 400, LENGTH),
    Case("a JSON of superscript length", binary(8, EIGHT, length="\xb2"), 400, LENGTH),
    Case("a JSON length of 5000 digits", binary(8, EIGHT, length="9" * 5000), 400, LENGTH),
    Case("a JSON that is cut off", binary(8, EIGHT, length="1"), 400, "truncated"),
    Case("no gzip", post(INFER, b"abc", "Content-Encoding: gzip"), 400, "not gzip"),
    Case("half a gzip", post(INFER, gzip.compress(tensor())[:-5], "Content-Encoding: gzip"), 400, "too early"),
    Case("two gzips", post(INFER, gzip.compress(tensor()) * 2, "Content-Encoding: gzip"), 400, "follows its end"),
    Case("zlib", post(INFER, zlib.compress(tensor()), "Content-Encoding: deflate"), 415, "deflate"),
    Case("a bomb", post(INFER, gzip.compress(bytes(60_000_000)), "Content-Encoding: gzip"), 413, "unpacked", True),
    Case(
        "a bomb in a parcel",
        post(INFER, gzip.compress(gzip.compress(bytes(9_000_000))), "Content-Encoding: gzip"),
        400,
        "malformed",
    ),
    Case("too long", post(INFER, b" " * (MAX_BODY_BYTES + 1)), 413, "longer than", True),
    Case("a version in words", post("/v2/models/id/versions/x/infer", tensor()), 404, "version"),
    Case("no model", post("/v2/models//infer", tensor()), 404, "no model"),
    Case("a load that is no JSON", post("/v2/repository/models/id/load", b"{"), 400, "load"),
    Case("a load of the client's own model", post("/v2/repository/models/id/load", b'{"parameters":{"config":"{}"}}'),
         400, "'config'"),
)  # fmt: skip
