"""Inference requests that are none, as data: what each class of them is refused with, at whichever door it comes.

A case has the ways that can carry it; ``request_forms`` makes what it looks like there, ``request_doors`` takes it in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from request_forms import BINARY, BYTES_WAYS, GRPC_WAYS, HTTP_WAYS, JSON, RAW, TYPED, WAYS, Case, Tensor, Verbatim, good

#: Of the agents that are asked.
MAX_BODY_BYTES = 200_000

ECHO = {
    tensor.name: tensor
    for tensor in (
        Tensor(name="in_BOOL", datatype="BOOL", shape=(1, 2), data=(True, False)),
        Tensor(name="in_BYTES", datatype="BYTES", shape=(1, 2), data=("a", "b")),
        Tensor(name="in_FP32", datatype="FP32", shape=(1, 2), data=(0.5, 1.5)),
        Tensor(name="in_INT8", datatype="INT8", shape=(1, 2), data=(1, 2)),
        Tensor(name="in_UINT8", datatype="UINT8", shape=(1, 2), data=(1, 2)),
    )
}
HALVES = tuple(Tensor(name=f"in_{kind}", datatype=kind, shape=(1, 2), data=(1, 2)) for kind in ("FP16", "BF16"))
TEXT = Tensor(name="text", datatype="BYTES", data=("a good film",))
IDS = tuple(Tensor(name=name, shape=(1, 2), data=(2, 3)) for name in ("input_ids", "attention_mask"))


def one(title: str, says: str = "input 'x'", /, *, ways: tuple[str, ...] = WAYS, **changes: Any) -> Case:
    """The only input of ``id`` is wrong."""
    return Case(name=title, says=says, ways=ways, inputs=(replace(Tensor(), **changes),))


def echo(title: str, kind: str, says: str, /, *, ways: tuple[str, ...] = WAYS, **changes: Any) -> Case:
    """One of the five inputs of ``echo`` is wrong; the error names it."""
    changed = tuple(replace(tensor, **changes) if tensor.datatype == kind else tensor for tensor in ECHO.values())
    return Case(name=title, says=says, ways=ways, model="echo", inputs=changed)


def text(title: str, says: str, /, *, ways: tuple[str, ...] = WAYS, status: int = 400, **changes: Any) -> Case:
    """The natural input of a bundle is wrong."""
    return Case(name=title, says=says, ways=ways, status=status, model="tiny", inputs=(replace(TEXT, **changes),))


def parameter(title: str, key: str, value: Any, says: str, *, ways: tuple[str, ...] = WAYS) -> Case:
    """A parameter of the request is wrong."""
    return Case(name=title, says=says, ways=ways, parameters={key: value})


def output(title: str, says: str, *wanted: dict[str, Any], ways: tuple[str, ...] = WAYS) -> Case:
    """What is asked for is wrong."""
    return Case(name=title, says=says, ways=ways, outputs=list(wanted))


def document(title: str, body: bytes, says: str) -> Case:
    """A body that has no request in it."""
    return Case(name=title, says=says, ways=(JSON,), body=body)


def message(title: str, body: bytes, says: str, status: int = 400) -> Case:
    """The same over gRPC."""
    return Case(name=title, says=says, ways=(RAW,), body=body, status=status)


GOOD = good(1).document()

MODELS = (
    Case(name="no such model", says="no model 'nobody'", status=404, model="nobody"),
    Case(name="a model without a name", says="no model ''", status=404, model=""),
    Case(name="a model's name in capitals", says="no model 'ID'", status=404, model="ID"),
    Case(name="a model with a slash", says="no model 'a/b'", status=404, model="a/b"),
    Case(name="a way out of the folder", says="no model '../id'", status=404, model="../id"),
    Case(name="a model of control characters", says="no model", status=404, model="\r\nX: y\x00"),
    Case(name="a model's name of 5000 characters", says="no model", status=404, model="m" * 5000),
    Case(name="no such version", says="no version '9'", status=404, version="9"),
    Case(name="a version in words", says="no version 'x'", status=404, version="x"),
)

INPUTS = (
    Case(name="no inputs", says="x", inputs=()),
    Case(name="one input is missing", says="in_UINT8", model="echo", inputs=tuple(ECHO.values())[:-1]),
    Case(name="one input too many", says="'z'", inputs=(Tensor(), Tensor(name="z"))),
    Case(name="an output sent as input", says="'y'", inputs=(Tensor(), Tensor(name="y"))),
    Case(name="the same input twice", says="input 'x': is there twice", inputs=(Tensor(), Tensor())),
    one("another name", "'z'", name="z"),
    one("an empty name", "''", name=""),
    one("a name of 5000 characters", "no input", name="n" * 5000),
    one("no name in the JSON", "name", ways=HTTP_WAYS, name=None),
    one("an empty datatype", datatype=""),
    one("no datatype there is", "input 'x': 'INT7' is not a datatype", datatype="INT7"),
    one("a datatype in small letters", "input 'x': 'int64' is not a datatype", datatype="int64"),
    one("no datatype in the JSON", "datatype", ways=HTTP_WAYS, datatype=None),
    one("another datatype", datatype="FP64", ways=(JSON, BINARY, RAW)),
    one("floats for integers", "input 'x': is FP32", datatype="FP32"),
    one("texts for integers", "input 'x': is BYTES", datatype="BYTES", data=("1",)),
    echo("integers for texts", "BYTES", "input 'in_BYTES': is INT64", datatype="INT64", data=(1, 2)),
    echo("integers for truths", "BOOL", "input 'in_BOOL': is INT8", datatype="INT8", data=(1, 0)),
    Case(name="halves with each other's datatype", says="input 'in_FP16': is BF16", ways=(JSON,), model="halves",
         inputs=(replace(HALVES[0], datatype="BF16"), HALVES[1])),
    Case(name="halves in a typed field", says="input 'in_FP16': the protocol has no typed field", ways=(TYPED,),
         model="halves", inputs=HALVES),
    text("a text of numbers", "text", datatype="INT64", data=(1,)),
    text("a text that isn't UTF-8", "UTF-8", ways=BYTES_WAYS, content=b"\x02\0\0\0\xff\xfe"),
    text("a table of texts", "text", shape=(1, 2), data=("a", "b")),
    text("a text as a scalar", "text", shape=()),
    text("more rows than are taken", "max_rows", status=413, shape=(5000,), data=("x",) * 5000),
    Case(name="a text and what became of it", says="text", model="tiny", inputs=(TEXT, *IDS)),
    Case(name="half of a model's tensors", says="attention_mask", model="tiny", inputs=IDS[:1]),
    Case(name="an image for a text model", says="image", model="tiny", inputs=(replace(TEXT, name="image"),)),
)  # fmt: skip

SHAPES = (
    one("too few elements", shape=(3,)),
    one("too many elements", data=(1, 2)),
    one("no data", data=None),
    one("a negative dimension", "dimension -1", shape=(-1,)),
    one("the least dimension of 64 bits", "dimension -9223372036854775808", shape=(-(2**63),)),
    one("a dimension of 2^31", "dimension 2147483648", shape=(2**31,), ways=(JSON, BINARY, RAW)),
    one("a dimension of 2^63 - 1", shape=(2**63 - 1,)),
    one("a dimension beyond 64 bits", "dimension", ways=HTTP_WAYS, shape=(2**70,)),
    one("dimensions that multiply to 0 in 64 bits", shape=(2**32, 2**32)),
    one("a product of 124 bits", shape=(2**31 - 1,) * 4),
    one("no elements, hugely", shape=(0, 2**62), data=()),
    one("a thousand dimensions", "1000 dimensions", shape=(1,) * 1000),
    one("a scalar", shape=()),
    one("another rank", shape=(1, 1)),
    echo("another width", "FP32", "in_FP32", shape=(1, 3), data=(1.0, 2.0, 3.0)),
    echo("the data the other way round", "FP32", "in_FP32", shape=(2, 1)),
    one("a shape of fractions", "shape", ways=HTTP_WAYS, shape=(1.5,)),
    one("a shape of texts", "shape", ways=HTTP_WAYS, shape=("1",)),
    one("a shape that is no list", "shape", ways=HTTP_WAYS, shape="1"),
    one("no shape in the JSON", "shape", ways=HTTP_WAYS, shape=None),
)

ELEMENTS = (
    *(
        one(f"elements: {name}", says, ways=(JSON,), data=data)
        for name, data, says in (
            ("NaN", "[NaN]", "binary data"),
            ("-Infinity", "[-Infinity]", "binary data"),
            ("1e999", "[1e999]", "out of range"),
            ("more digits than there are", "[" + "9" * 5000 + "]", "out of range"),
            ("one too many for 64 bits", "[9223372036854775808]", "input 'x': 9223372036854775808 is out of the range"),
            ("a fraction", "[1.5]", "input 'x': element 0 is a fraction"),
            ("a text", '["1"]', "input 'x': element 0 is text"),
            ("a truth", "[true]", "input 'x': element 0 is true or false"),
            ("null", "[null]", "input 'x': element 0 is null"),
            ("an object", '[{"b64": "AQ=="}]', "input 'x': element 0 is an object"),
            ("a text in place of the list", '"AQAAAAAAAAA="', "input 'x': 'data' is not a list"),
            ("an object in place of the list", "{}", "input 'x': 'data' is not a list"),
            ("null in place of the list", "null", "input 'x': has neither"),
            ("nested too deeply for the shape", "[[1]]", "input 'x'"),
            ("nested without end", "[" * 50_000 + "]" * 50_000, "nested too deeply"),
        )
    ),
    one("ragged rows", "input 'x': 'data' has 2 rows", ways=(JSON,), shape=(3,), data="[[1, 2], [3]]"),
    echo("rows of unequal length", "INT8", "in_INT8': a list at depth 1", ways=(JSON,), shape=(2, 2),
         data="[[1], [2, 3, 4]]"),
    echo("rows and a number", "INT8", "in_INT8': 'data' is nested unevenly", ways=(JSON,), shape=(2, 2),
         data="[[1, 2], 3]"),
    echo("128 for INT8", "INT8", "in_INT8", ways=(JSON, TYPED), data=(127, 128)),
    echo("256 for UINT8", "UINT8", "in_UINT8", ways=(JSON, TYPED), data=(255, 256)),
    echo("-1 for UINT8", "UINT8", "in_UINT8': -1 is out of the range", ways=(JSON,), data=(0, -1)),
    echo("1e39 for FP32", "FP32", "in_FP32': a value is out of the range of FP32", ways=(JSON,), data="[1e39, 0]"),
    echo("a number for a truth", "BOOL", "in_BOOL': element 0 is a number", ways=(JSON,), data="[1, 0]"),
    echo("a number for a text", "BYTES", "in_BYTES': element 0 is a number", ways=(JSON,), data="[1, 2]"),
    echo("null for a text", "BYTES", "in_BYTES': element 1 is null", ways=(JSON,), data='["a", null]'),
    Case(name="70000 for FP16", says="in_FP16': a value is out of the range of FP16", ways=(JSON,), model="halves",
         inputs=(replace(HALVES[0], data=(70000, 0)), HALVES[1])),
    one("elements in another datatype's field", "input 'x': has elements in fp32_contents", ways=(TYPED,),
        column="fp32_contents"),
    Case(name="typed and raw tensors", says="input 'x': has data in contents and in raw_input_contents", ways=(TYPED,),
         tail=b"\1\0\0\0\0\0\0\0"),
    Case(name="more raw tensors than inputs", says="raw_input_contents has 2 tensors, there are 1 inputs", ways=(RAW,),
         tail=b"\1\0\0\0\0\0\0\0"),
)  # fmt: skip

CONTENTS = (
    one("half an element", "input 'x'", ways=BYTES_WAYS, content=b"\1\0\0\0"),
    one("an element and a half", "input 'x': has 12 bytes", ways=BYTES_WAYS, content=b"\1" + bytes(11)),
    one("elements for two", "input 'x': has 16 bytes", ways=BYTES_WAYS, content=bytes(16)),
    one("no bytes", "input 'x': has 0 bytes", ways=BYTES_WAYS, content=b""),
    echo("a BOOL of 2", "BOOL", "in_BOOL': a BOOL is a byte 0 or 1", ways=BYTES_WAYS, content=b"\1\2"),
    echo("texts without their lengths", "BYTES", "in_BYTES", ways=BYTES_WAYS, content=b"ab"),
    echo("a text longer than the data", "BYTES", "in_BYTES': element 1 is longer", ways=BYTES_WAYS,
         content=b"\1\0\0\0a\5\0\0\0b"),
    echo("a text of 4 GB", "BYTES", "in_BYTES': element 0 is longer", ways=BYTES_WAYS, content=b"\xff" * 8),
    echo("a text too few", "BYTES", "in_BYTES", ways=BYTES_WAYS, content=b"\4\0\0\0abcd"),
    echo("bytes behind the last text", "BYTES", "in_BYTES': 1 bytes are left over", ways=BYTES_WAYS,
         content=b"\1\0\0\0a\1\0\0\0bc"),
    one("a size of words", "binary_data_size '8'", ways=(BINARY,), parameters={"binary_data_size": "8"}),
    one("a negative size", "binary_data_size -8", ways=(BINARY,), parameters={"binary_data_size": -8}),
    one("a size of a fraction", "binary_data_size 8.5", ways=(BINARY,), parameters={"binary_data_size": 8.5}),
    one("a size that is true", "binary_data_size True", ways=(BINARY,), parameters={"binary_data_size": True}),
    one("a size of 2^62", "8 are left in the body", ways=(BINARY,), parameters={"binary_data_size": 2**62}),
    one("a size beyond 64 bits", "are left in the body", ways=(BINARY,), parameters={"binary_data_size": 2**80}),
    one("a size less than there is", "input 'x': has 4 bytes", ways=(BINARY,), parameters={"binary_data_size": 4}),
    Case(name="bytes behind the last tensor", says="2 bytes of binary data are left over", ways=(BINARY,), tail=b"zz"),
    Case(name="data beside a size", says="input 'x': has both", ways=(JSON,),
         inputs=(Tensor(parameters={"binary_data_size": 8}),)),
    Case(name="a size without a length of the JSON", says="8 bytes of binary data, 0 are left", ways=(JSON,),
         inputs=(Tensor(data=None, parameters={"binary_data_size": 8}),)),
    *(
        Case(name=f"a JSON length {name}", says="Inference-Header-Content-Length", ways=(BINARY,), length=length)
        for name, length in (
            ("beyond the body", "99999"),
            ("below 0", "-1"),
            ("of a fraction", "1.5"),
            ("in words", "ten"),
            ("of 5000 digits", "9" * 5000),
            ("of nothing", ""),
        )
    ),
    Case(name="a JSON length that cuts the JSON off", says="truncated", ways=(BINARY,), length="1"),
    Case(name="no JSON for a model of several inputs", says="only possible for a model with one input", ways=(BINARY,),
         model="echo", length="0"),
    Case(name="no JSON, and no whole elements", says="input 'x'", ways=(BINARY,), length="0", body=b"abc", inputs=()),
)  # fmt: skip

PARAMETERS = (
    parameter("a timeout in words", "timeout", "soon", "parameters.timeout"),
    parameter("a negative timeout", "timeout", -1, "parameters.timeout: -1"),
    parameter("a timeout of a fraction", "timeout", 0.5, "parameters.timeout: 0.5"),
    parameter("a timeout that is true", "timeout", True, "parameters.timeout: True"),
    parameter("a timeout beyond counting", "timeout", 2**60, "parameters.timeout"),
    parameter("a timeout beyond 63 bits", "timeout", 2**64 - 1, "parameters.timeout"),
    parameter("a timeout of 400 digits", "timeout", Verbatim("9" * 400), "parameters.timeout", ways=HTTP_WAYS),
    parameter("a negative priority", "priority", -1, "parameters.priority: -1"),
    parameter("a priority of a fraction", "priority", 0.5, "parameters.priority"),
    parameter("a priority in words", "priority", "high", "parameters.priority"),
    parameter("a priority beyond all", "priority", 2**32, "parameters.priority"),
    parameter("a priority that is true", "priority", True, "parameters.priority"),
    parameter("a privacy there isn't", "privacy", "please", "parameters.privacy"),
    parameter("a privacy that is true", "privacy", True, "parameters.privacy"),
    parameter("a timeout misspelt", "timout", 5, "Did you mean 'timeout'"),
    parameter("a privacy misspelt", "Privacy", "local-only", "Did you mean 'privacy'"),
    parameter("outputs in binary, perhaps", "binary_data_output", "yes", "binary_data_output"),
    parameter("a parameter of nothing", "custom", None, "parameters", ways=WAYS),
    parameter("a parameter that is a list", "custom", [1], "parameters", ways=HTTP_WAYS),
    parameter("a parameter that is an object", "custom", {"a": 1}, "parameters", ways=HTTP_WAYS),
    Case(name="parameters that are a list", says="parameters", ways=HTTP_WAYS, parameters=[1]),
    Case(name="parameters without end", says="parameters", ways=HTTP_WAYS,
         parameters=Verbatim('{"a":' * 20_000 + "1" + "}" * 20_000)),
    *(
        Case(name=f"an input in shared memory, {name}", says="input 'x': has 'shared_memory_region'", ways=ways,
             inputs=(Tensor(data=data, parameters={"shared_memory_region": "r"}),))
        for name, data, ways in (("with data", (1,), WAYS), ("without", None, (JSON, RAW)))
    ),
    one("an input's parameter of nothing", "inputs", ways=HTTP_WAYS, parameters={"custom": None}),
    one("an input's parameter without a value", "input 'x'.custom", ways=GRPC_WAYS, parameters={"custom": None}),
)  # fmt: skip

OUTPUTS = (
    output("an output nobody has", "'z'", {"name": "z"}),
    output("an input asked for", "'x'", {"name": "x"}),
    output("an output without a name", "''", {"name": ""}),
    output("the same output twice", "output 'y': is asked for twice", {"name": "y"}, {"name": "y"}),
    output("an output that is there, and one that isn't", "'z'", {"name": "y"}, {"name": "z"}),
    output("a parameter nobody reads", "output 'y': has the unknown parameter 'custom'",
           {"name": "y", "parameters": {"custom": 1}}),
    output("classes", "output 'y': the classification extension", {"name": "y", "parameters": {"classification": 3}}),
    output("an output in shared memory", "output 'y': has 'shared_memory_region'",
           {"name": "y", "parameters": {"shared_memory_region": "r"}}),
    output("an output in binary, perhaps", "output 'y'", {"name": "y", "parameters": {"binary_data": "yes"}}),
    output("an output's parameter of nothing", "outputs", {"name": "y", "parameters": {"custom": None}},
           ways=HTTP_WAYS),
    output("an output's name of a number", "outputs", {"name": 5}, ways=HTTP_WAYS),
    output("an output that is a text", "outputs", Verbatim('"y"'), ways=HTTP_WAYS),  # type: ignore[arg-type]
    Case(name="outputs that are an object", says="outputs", ways=HTTP_WAYS, outputs={"name": "y"}),
    Case(name="a NaN asked for in JSON", says="output 'out_FP32': has NaN", status=422, ways=(BINARY,), model="echo",
         inputs=tuple(replace(each, data=(float("nan"), 0.0)) if each.datatype == "FP32" else each
                      for each in ECHO.values()), outputs=[{"name": "out_FP32"}]),
)  # fmt: skip

DOCUMENTS = (
    document("nothing", b"", "empty"),
    document("a space", b" ", "truncated"),
    document("null", b"null", "object"),
    document("a list", b"[]", "object"),
    document("a number", b"5", "object"),
    document("no inputs in the JSON", b"{}", "inputs"),
    document("inputs of null", b'{"inputs":null}', "inputs"),
    document("inputs that are an object", b'{"inputs":{}}', "inputs"),
    document("an input that is a number", b'{"inputs":[1]}', "inputs"),
    document("half a document", GOOD[:-3], "truncated"),
    document("two documents", GOOD * 2, "trailing"),
    document("a byte order mark", b"\xef\xbb\xbf" + GOOD, "malformed"),
    document("UTF-16", GOOD.decode().encode("utf-16"), "malformed"),
    document("Latin-1", b'{"id":"\xe9",' + GOOD[1:], "UTF-8"),
    document("bytes that are no text", b"\xff\xfe\xfd", "malformed"),
    document("half a surrogate pair", b'{"id":"\\ud800",' + GOOD[1:], "Unicode"),
    document("a comma too many", GOOD[:-1] + b",}", "malformed"),
    document("quotes of another kind", GOOD.replace(b'"', b"'"), "malformed"),
    document("a deep key that nobody reads", b'{"z":%b,' % (b"[" * 50_000 + b"]" * 50_000) + GOOD[1:], "too deeply"),
    Case(name="an id that is no text", says="$.id", ways=HTTP_WAYS, id=5),
    message("bytes that are no message", b"\xff\xff\xff", "no ModelInferRequest"),
    message("a JSON for a message", GOOD, "no ModelInferRequest"),
    message("half a message", b"\x0a\x05id", "no ModelInferRequest"),
    message("a model's name that isn't UTF-8", b"\x0a\x02\xff\xfe", "no ModelInferRequest"),
    message("an empty message", b"", "no model ''", 404),
)

TOO_LONG = (
    Case(name="a body that is too long", says=f"longer than {MAX_BODY_BYTES} bytes", status=413, ways=HTTP_WAYS,
         inputs=(Tensor(shape=(26_000,), data=(-1_000_000,) * 26_000),)),
    Case(name="a message that is too long", says="larger than max", status=413, ways=GRPC_WAYS,
         inputs=(Tensor(shape=(26_000,), data=(-1_000_000,) * 26_000),)),
)  # fmt: skip

CASES = (*MODELS, *INPUTS, *SHAPES, *ELEMENTS, *CONTENTS, *PARAMETERS, *OUTPUTS, *DOCUMENTS, *TOO_LONG)
