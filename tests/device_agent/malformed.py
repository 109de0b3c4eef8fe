"""HTTP requests that are none, as bytes: what each is answered with, and whether its connection may go on."""

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


LENGTH = "Inference-Header-Content-Length"


def parts(length: str) -> bytes:
    """JSON and a binary tensor behind it, with that length told of the first."""
    head = tensor(data=None, parameters={"binary_data_size": 8})
    return post(INFER, head + struct.pack("<q", 1), f"{LENGTH}: {length}")


#: HTTP whose body is no inference of this model; of what can be wrong in the inference itself, whichever the door,
#: ``malformed_requests`` has the classes.
ENVELOPES = (
    Case("null", post(INFER, b"null"), 400, "object"),
    Case("half a document", post(INFER, tensor()[:-3]), 400, "truncated"),
    Case("a document and a half", post(INFER, tensor() + tensor()[:-3]), 400, "trailing"),
    Case("UTF-16", post(INFER, tensor().decode().encode("utf-16")), 400, "malformed"),
    Case("another shape", post(INFER, tensor(shape=[3])), 400, "input 'x'"),
    Case("another name", post(INFER, tensor(name="z")), 400, "'z'"),
    Case("a JSON longer than the body", parts("9999"), 400, LENGTH),
    Case("a JSON of superscript length", parts("\xb2"), 400, LENGTH),
    Case("a JSON that is cut off", parts("1"), 400, "truncated"),
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
