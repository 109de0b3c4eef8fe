"""The text part of ``serving.py``: text in, label out, mixed lengths, beside the bare model and beside other servers.

Everybody has the same bundle, with its session options, one thread and one worker; a request is one text, an answer its
label and score. Every server has its turn beside ours in every round, alone with it on the machine; ratios are of such
neighbours.

The bare model is a loop around ``run()`` over batches of the sizes that were served, tokenized before. With length
bucketing its batches are of neighbours by length, which is the best that any choice of batch mates could do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import servers
from load_generator import Load, Result
from servers import Server

from aios_edge import open_bundle
from aios_edge.bundle.read import Bundle
from aios_edge.bundle.write import write_bundle
from aios_edge.contract import Contract
from aios_edge.golden import read_golden
from aios_edge.profile_files import load_profile
from aios_edge.session import native, session_options
from aios_edge.tasks import task_for

PEERS = Path(__file__).parent / "peers_text"
THREADS = 1
CONNECTIONS = 8
BATCH = 8  # what a bundle that runs one at a time is given where batches are asked for
Encoded = dict[str, np.ndarray]


def text_part(work: Path, peers: Sequence[str], options: argparse.Namespace) -> None:
    """Both tables."""
    if options.bundle is None:
        print("\ntext: skipped, no --bundle was given", file=sys.stderr)
        return
    bundle = open_bundle(options.bundle)
    manifest = bundle.manifest
    ask = Ask(texts := mixed_texts(256), options.seconds)
    print(f"\n{manifest.name}, {manifest.precision}: {CONNECTIONS} connections, mixed lengths; {ask.generator}\n")
    print("| ours | requests/s | of the bare run() | mean batch | CPU µs a request, run() | worker | supervisor |")
    print("|---|" + "---:|" * 6)
    model = Model(bundle, texts)
    together = bundle if manifest.max_batch_size > 1 else with_batches(bundle, work / "bundles" / "text-batches")
    variants = [(f"max_batch_size {together.manifest.max_batch_size}, {how} bucketing", together, how == "with")
                for how in ("with", "without")]  # fmt: skip
    if together is not bundle:
        variants.insert(0, ("as it is, max_batch_size 1", bundle, True))
    started = [(name, start_ours(work, name, which, bucketing, ask), bucketing) for name, which, bucketing in variants]
    try:
        found: dict[str, list[tuple[Result, float, float]]] = {name: [] for name, _, _ in started}
        for _ in range(options.rounds):
            for name, server, bucketing in started:
                result = ask.of(server)
                found[name].append((result, *model.bare(result, sort=bucketing, seconds=options.seconds / 2)))
    finally:
        for _, server, _ in started:
            server.stop()
    for name, rounds in found.items():
        share = median(result.rate * run_s for result, run_s, _ in rounds)
        sizes = median(mean_batch(result) for result, _, _ in rounds)
        worker = median((result.server_cpu_s - result.first_cpu_s) / result.requests for result, _, _ in rounds)
        supervisor = median(result.first_cpu_s / result.requests for result, _, _ in rounds)
        cpu = median(cpu_s for _, _, cpu_s in rounds)
        print(
            f"| {name} | {median(result.rate for result, _, _ in rounds):.0f} | {share * 100:.0f} % | {sizes:.2f} "
            f"| {cpu * 1e6:.0f} | {worker * 1e6:.0f} | {supervisor * 1e6:.0f} |"
        )
    peers_table(work, bundle, peers, ask, options)


def peers_table(work: Path, bundle: Bundle, peers: Sequence[str], ask: Ask, options: argparse.Namespace) -> None:
    """Each peer at each of its settings in turn with ours."""
    print(
        "\n| peer | setting | requests/s | ours beside it | ours / peer (least … most) | CPU µs a request | ours "
        "| failed |"
    )
    print("|---|---|" + "---:|" * 6)
    for name in peers:
        for setting in settings_of(name):
            ours = start_ours(work, "beside a peer", bundle, True, ask)
            try:
                peer = servers.text_peer(name, PEERS / f"with_{name}.py", setting, bundle.path, THREADS, work, ask.body)
            except (RuntimeError, OSError) as error:
                print(f"skipped: {error}", file=sys.stderr)
                ours.stop()
                continue
            try:
                rounds = [(ask.of(peer), ask.of(ours)) for _ in range(options.rounds + 1)][1:]  # the first warms up
            finally:
                peer.stop()
                ours.stop()
            ratios = [mine.rate / theirs.rate for theirs, mine in rounds]
            cpus = [median(pair[k].server_cpu_s / pair[k].requests for pair in rounds) * 1e6 for k in (0, 1)]
            print(
                f"| {name} | {setting} | {median(theirs.rate for theirs, _ in rounds):.0f} "
                f"| {median(mine.rate for _, mine in rounds):.0f} "
                f"| {median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}) | {cpus[0]:.0f} | {cpus[1]:.0f} "
                f"| {sum(theirs.failed + mine.failed for theirs, mine in rounds)} |",
                flush=True,
            )


def settings_of(peer: str) -> list[str]:
    """The settings that its script knows: the third line names them."""
    line = (PEERS / f"with_{peer}.py").read_text(encoding="utf-8").splitlines()[2]
    return line.removeprefix("# settings:").split()


class Ask:
    """The requests, and how long they are sent."""

    generator = "load generator: our own, 1 Python thread"

    def __init__(self, texts: Sequence[str], seconds: float) -> None:
        self._seconds = seconds
        self._bodies = tuple(
            msgspec.json.encode(
                {
                    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}],
                    "outputs": [{"name": "label"}, {"name": "score"}],
                }
            ).decode()
            for text in texts
        )

    @property
    def body(self) -> str:
        """One of them."""
        return self._bodies[0]

    def of(self, server: Server) -> Result:
        """One turn of a server."""
        return servers.measured(
            server,
            Load(
                port=server.port,
                path=server.path,
                bodies=self._bodies,
                connections=CONNECTIONS,
                seconds=self._seconds,
                read_batch_sizes=True,
            ),
        )


class Model:
    """The bundle's model alone, as the agent opens it."""

    def __init__(self, bundle: Bundle, texts: Sequence[str]) -> None:
        import onnxruntime

        manifest = bundle.manifest
        self._encode: Callable[[Sequence[str]], Encoded] = task_for(manifest, bundle.path).encode
        self._texts = list(texts)
        self._session = onnxruntime.InferenceSession(
            str(bundle.file(manifest.model)),
            native(onnxruntime, session_options(manifest.session, load_profile("x86-gateway").threads)),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(manifest.session.disabled_optimizers) or None,
        )

    def bare(self, served: Result, *, sort: bool, seconds: float) -> tuple[float, float]:
        """Seconds and processor time of each request in batches of the sizes that were served."""
        texts = sorted(self._texts, key=len) if sort else self._texts
        batches = [self._encode(texts[start:end]) for start, end in cuts(served.batch_sizes, len(texts))]
        done, began, cpu_began = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            for batch in batches:
                self._session.run(None, batch)
            done += len(texts)
        return (time.perf_counter() - began) / done, (time.process_time() - cpu_began) / done


def cuts(batch_sizes: dict[int, int], count: int) -> list[tuple[int, int]]:
    """Pieces of ``count`` texts whose sizes are spread like those of the batches; ``batch_sizes`` counts requests."""
    sizes = sorted(batch_sizes)
    weights = np.array([batch_sizes[size] / size for size in sizes])
    chance = np.random.default_rng(1)
    pieces, at = [], 0
    while at < count:
        end = min(at + int(chance.choice(sizes, p=weights / weights.sum())), count)
        pieces.append((at, end))
        at = end
    return pieces


def start_ours(work: Path, name: str, bundle: Bundle, bucketing: bool, ask: Ask) -> Server:
    """The agent with that bundle alone."""
    policy = f"length_bucketing = {str(bucketing).lower()}"
    model = bundle.manifest.name
    return servers.agent(f"ours, text, {name}", [bundle.path], model, work, ask.body, policy=policy)


def with_batches(bundle: Bundle, target: Path) -> Bundle:
    """The same bundle, whose model may have several requests at once. Of a dynamically quantized one the answers depend
    on batch mates then, which is why no export says so; its time is what a batch costs all the same."""
    golden = read_golden(bundle.file(bundle.contract.golden.file))
    made = {"contract.json", bundle.contract.golden.file}
    files: dict[str, Path | bytes] = {
        entry.path: bundle.file(entry.path) for entry in bundle.manifest.files if entry.path not in made
    }
    contract: Contract = bundle.contract
    return write_bundle(target, msgspec.structs.replace(bundle.manifest, max_batch_size=BATCH), contract, files, golden)


def mixed_texts(count: int) -> list[str]:
    """Texts of 3 to 60 words, most of them short."""
    words = ["the", "film", "my", "card", "please", "order", "what", "is", "much", "time", "would", "you", "know"]
    chance = np.random.default_rng(0)
    lengths = np.clip(np.round(np.exp(chance.normal(2.4, 0.7, count))), 3, 60).astype(int)
    return [" ".join(chance.choice(words, length)) for length in lengths]


def mean_batch(result: Result) -> float:
    """Requests for each run of the model."""
    return result.requests / sum(requests / size for size, requests in result.batch_sizes.items())


def median(values: object) -> float:
    """Of any iterable."""
    return statistics.median(list(values))  # type: ignore[call-overload]
