"""The agent's gRPC door beside its HTTP door: latency over one connection, processor time, memory.

    python benchmarks/grpc_door.py --work DIR [--rounds 7] [--requests 1000]

The tiny model of ``serving.py`` behind both doors of one agent, and a bare echo for each protocol (uvicorn with
httptools, grpcio's asyncio server) as a measure of what the protocol itself costs here. Requests are ready bytes and
answers aren't decoded, so what the clients add is a socket's loop for HTTP and grpcio's stub for gRPC; both run in this
process. In each round every row has its turn; ratios are those of neighbours, and the median over rounds is printed.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import served_models as models
import servers

from aios_edge.host import describe, inspect_host
from aios_edge.oip.tensors import encode_request
from device_agent.grpc_door.messages import SERVICE, ModelInferRequest

METHOD = f"/{SERVICE}/ModelInfer"
JSON_LENGTH = "Inference-Header-Content-Length"
#: Row -> the row that its ratio is to.
BESIDE = {
    "HTTP, JSON": "HTTP, echo",
    "HTTP, binary": "HTTP, echo",
    "gRPC, typed": "gRPC, echo",
    "gRPC, raw": "gRPC, echo",
}

Ask = Callable[[], object]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="models and logs are kept there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1000, help="of each row's turn")
    options = parser.parse_args()
    work = options.work.absolute()
    load = "busy" if Path("/proc/loadavg").read_text().split()[0] > "0.5" else "quiet"
    print(f"{describe(inspect_host())}; the machine was {load} before the run; {options.rounds} rounds")
    tiny = models.write_tiny_bundle(work / "bundles" / "tiny", models.write_mlp(work / "tiny.onnx"), "tiny")
    body = models.request_body(1)
    address = f"127.0.0.1:{servers.free_port()}"
    plain = servers.agent("HTTP alone", [tiny], "tiny", work, body)
    plain.measure_memory()
    plain.stop()
    agent = servers.agent("both doors", [tiny], "tiny", work, body, http=f'grpc_bind = "{address}"')
    echo = servers.echo(work, body, len(agent.answer))
    grpc_echo, echo_address = start_echo(work, len(agent.answer))
    try:
        measure(agent, echo, grpc_echo, address, echo_address, body, options)
    finally:
        agent.measure_memory()
        for server in (agent, echo):
            server.stop()
        grpc_echo.kill()
        grpc_echo.wait()
    first = [server.pss_bytes["first"] / 1e6 for server in (plain, agent)]
    print(f"\nPSS of the supervisor: {first[0]:.1f} MB with HTTP alone, {first[1]:.1f} MB with both doors")


def measure(
    agent: servers.Server,
    echo: servers.Server,
    grpc_echo: subprocess.Popen[str],
    address: str,
    echo_address: str,
    body: str,
    options: argparse.Namespace,
) -> None:
    """Rounds over all rows."""
    ids = np.arange(models.INPUTS, dtype=np.int64)[None]
    binary, length = encode_request({"input_ids": ids}, binary=True)
    typed, raw = (ModelInferRequest(model_name="tiny") for _ in range(2))
    for message in (typed, raw):
        message.inputs.add(name="input_ids", datatype="INT64", shape=ids.shape)
    typed.inputs[0].contents.int64_contents.extend(ids.ravel().tolist())
    raw.raw_input_contents.append(ids.tobytes())
    header = "" if length is None else f"{JSON_LENGTH}: {length}\r\n"
    asks: dict[str, tuple[Ask, int]] = {
        "HTTP, echo": (over_http(echo.port, "/", body.encode()), echo.process.pid),
        "HTTP, JSON": (over_http(agent.port, agent.path, body.encode()), agent.process.pid),
        "HTTP, binary": (over_http(agent.port, agent.path, binary, header), agent.process.pid),
        "gRPC, echo": (over_grpc(echo_address, raw.SerializeToString()), grpc_echo.pid),
        "gRPC, typed": (over_grpc(address, typed.SerializeToString()), agent.process.pid),
        "gRPC, raw": (over_grpc(address, raw.SerializeToString()), agent.process.pid),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in asks}
    for number in range(-1, options.rounds):
        for name, (ask, pid) in asks.items():
            took, before = [], servers.cpu_s([pid])
            for _ in range(options.requests):
                began = time.perf_counter()
                ask()
                took.append(time.perf_counter() - began)
            if number >= 0:
                took.sort()
                cpu = (servers.cpu_s([pid]) - before) / options.requests
                found[name].append((statistics.median(took), took[len(took) * 99 // 100], cpu))
        print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    print("\n| | p50 | p99 | p50 beside its echo | supervisor's processor time a request |\n|---|---:|---:|---:|---:|")
    for name, results in found.items():
        p50, p99, cpu = (statistics.median(values) * 1e6 for values in zip(*results, strict=True))
        beside = [mine[0] / its[0] for mine, its in zip(results, found[BESIDE.get(name, name)], strict=True)]
        print(f"| {name} | {p50:.0f} µs | {p99:.0f} µs | {statistics.median(beside):.2f} | {cpu:.0f} µs |")
    for mine, other in (("gRPC, raw", "HTTP, binary"), ("gRPC, typed", "HTTP, JSON"), ("gRPC, echo", "HTTP, echo")):
        ratios = [a[0] / b[0] for a, b in zip(found[mine], found[other], strict=True)]
        print(f"\n{mine} beside {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def over_http(port: int, path: str, body: bytes, header: str = "") -> Ask:
    """One request after the other on a kept connection."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{header}Content-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body

    def ask() -> bytes:
        sock.sendall(request)
        answer = sock.recv(65536)
        head, _, content = answer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(content) < length:
            content += sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200"), answer
        return content

    return ask


def over_grpc(address: str, message: bytes) -> Ask:
    """The same for gRPC."""
    stub = grpc.insecure_channel(address).unary_unary(METHOD)
    return lambda: stub(message)


def start_echo(work: Path, answer_bytes: int) -> tuple[subprocess.Popen[str], str]:
    """grpcio's asyncio server with nothing behind it, and its address."""
    code = f"""
import asyncio, grpc
async def answer(request, context):
    return b"x" * {answer_bytes}
class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(answer)
async def main():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=work)
    assert process.stdout is not None
    return process, f"127.0.0.1:{process.stdout.readline().strip()}"


if __name__ == "__main__":
    main()
