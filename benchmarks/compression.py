"""Our quantized candidates beside peers': size, agreement, accuracy lost and speed, on the same fine-tuned models.

    python benchmarks/compression.py RECIPE.toml --work DIR [--seeds 5] [--peers nncf,olive]

For each seed the recipe is exported once (fine-tuning included, kept in DIR; with ``{seed}`` in its source, models that
were fine-tuned before are taken); every peer then gets the same fp32 ONNX file, the same calibration samples and, for
those that start from torch, the folder of the fine-tuned model. With ``[prune]`` in the recipe pruned networks are
among the candidates. Answers are one test row at a time on one thread. Agreement and drop are against the fp32 model,
pooled over seeds, with bootstrap 95 % intervals over rows (a row's seeds stay together). Speed is the median of
neighbouring runs' ratios against fp32 at onnxruntime's defaults, all models in turn, one thread.

A peer is a script in ``benchmarks/peers`` that runs in an environment of its own, made in DIR on first use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import tomllib

import exporters
from aios_edge import open_bundle
from aios_edge.host import describe, inspect_host
from aios_edge.manifest import SessionSpec
from aios_edge.profile_detect import detect
from aios_edge.profile_files import load_profile, shipped_profiles
from aios_edge.tasks import task_for
from exporters import convert, ort
from exporters.data import load_data
from exporters.progress import LineProgress
from exporters.recipe import ExportRecipe, parse_recipe

PEERS = Path(__file__).parent / "peers"
CALIBRATION_SAMPLES = 128
LENGTHS = (32, 128)
ROUNDS = 150
RESAMPLES = 2000
#: What is built of each network, whatever the profile of this machine prefers.
CANDIDATES = ("dynamic-s8", "dynamic-s8-e4", "dynamic-s8-e2", "qdq-u8s8", "fp32")


@dataclass(frozen=True)
class Model:
    """A model of one seed: what it is called in the table, its file, its session options, the bundle whose tokenizer it
    reads with."""

    name: str
    path: Path
    spec: SessionSpec
    bundle: Any

    @property
    def size_bytes(self) -> int:
        """The file and its external data."""
        data = self.path.with_name(self.path.name + ".data")
        return self.path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


@dataclass(frozen=True)
class Outcome:
    """One model of one seed on the test rows: answers [N], logits are not kept."""

    model: Model
    answers: np.ndarray
    speedups: dict[int, float]


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peers", default="ort-dynamic,optimum,nncf,olive,neural-compressor")
    options = parser.parse_args()
    peers = [name for name in options.peers.split(",") if name]
    machine = inspect_host()
    profile = detect(machine, [load_profile(name) for name in shipped_profiles()]).name or "x86-gateway"
    seeds: list[dict[str, Outcome]] = []
    truth = np.empty(0, dtype=np.int64)
    for seed in range(1, options.seeds + 1):
        truth, outcomes = run_seed(options.recipe, seed, profile, peers, options.work)
        seeds.append(outcomes)
        print(table(seeds, truth), file=sys.stderr)
    print(f"{describe(machine)}; onnxruntime {ort.version()}; {len(truth)} test rows, {len(seeds)} seeds")
    flags = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
    print("CPU flags:", ", ".join(flag for flag in flags if flag in machine.cpu_flags))
    print(table(seeds, truth))


def run_seed(
    path: Path, seed: int, profile: str, peers: list[str], work: Path
) -> tuple[np.ndarray, dict[str, Outcome]]:
    """Export with this seed, let every peer quantize the same model, and measure all of them."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    document.setdefault("finetune", {})["seed"] = seed
    document["model"]["source"] = document["model"]["source"].replace("{seed}", str(seed))
    recipe = parse_recipe(document, folder=path.parent, where=str(path))
    out = work / f"seed-{seed}"
    wanted = msgspec.structs.replace(load_profile(profile), precision_preference=CANDIDATES)
    report = exporters.export(recipe, [wanted], out, candidates=True, progress=LineProgress())
    candidates = {
        c.name: open_bundle(out / c.measuring_bundle)
        for c in report.profiles[profile].candidates
        if c.measuring_bundle is not None
    }
    whole = candidates["fp32"]
    stages = (*report.stages["built"], *report.stages["reused"])
    tuned = next(out / ".cache" / stage for stage in stages if stage.startswith("finetune/")) / "model"
    graphs = [out / ".cache" / stage / convert.RAW for stage in stages if stage.startswith("convert/")]
    fp32 = max(graphs, key=lambda path: path.stat().st_size)  # the others are of pruned networks
    models = [Model("fp32", fp32, ort.DEFAULT_SPEC, whole)]
    for name, bundle in candidates.items():
        models.append(Model(f"ours: {name}", bundle.file("model.onnx"), bundle.manifest.session, bundle))
    samples = calibration(recipe, whole)
    for peer in peers:
        models += quantized_by(peer, fp32, tuned, samples, whole, out, work)
    held_out = load_data(recipe).test
    held_out.release()
    test = held_out.read_once()
    speeds = speedups(models)
    outcomes = {m.name: Outcome(m, answers(m, encode(m.bundle, test.texts)), speeds[m.name]) for m in models}
    return np.asarray(test.labels), outcomes


def encode(bundle: Any, texts: Any) -> list[dict[str, np.ndarray]]:
    """Each text as the device encodes it, alone."""
    task = task_for(bundle.manifest, bundle.path)
    return [task.encode([text]) for text in texts]


def calibration(recipe: ExportRecipe, bundle: Any) -> list[dict[str, np.ndarray]]:
    """The same training rows for everybody."""
    texts = load_data(recipe).train.texts
    return encode(bundle, texts[:: max(1, len(texts) // CALIBRATION_SAMPLES)][:CALIBRATION_SAMPLES])


def quantized_by(
    peer: str, source: Path, tuned: Path, samples: list[dict[str, np.ndarray]], whole: Any, out: Path, work: Path
) -> list[Model]:
    """What a peer makes of it; it may write several models, each with a line ``name<TAB>file`` on stdout."""
    folder = out / "peers" / peer
    listing = folder / "models.tsv"
    if not listing.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        packed = {f"{i}/{name}": array for i, sample in enumerate(samples) for name, array in sample.items()}
        np.savez(folder / "calibration.npz", **packed)
        script = PEERS / f"{peer.replace('-', '_')}.py"
        command = [environment(script, work), script, source, folder / "calibration.npz", folder, tuned]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{peer} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
            return []
        listing.write_text("".join(line + "\n" for line in done.stdout.splitlines() if "\t" in line))
    rows = [line.split("\t") for line in listing.read_text().splitlines()]
    return [Model(name, folder / file, ort.DEFAULT_SPEC, whole) for name, file in rows]


def environment(script: Path, work: Path) -> Path:
    """The interpreter of the peer's own environment, made of the requirements in its first line."""
    first = script.read_text(encoding="utf-8").splitlines()[0]
    requirements = first.removeprefix("# requires:").split()
    folder = work.absolute() / "envs" / script.stem
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        (folder / "ready").touch()
    return python


def answers(model: Model, encoded: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The class of each row, each alone on one thread; two rows at a time."""
    session = ort.Session(model.path, model.spec)
    with ThreadPoolExecutor(2) as pool:
        return np.asarray([int(logits[0].argmax()) for logits in pool.map(session.run, encoded)])


def speedups(models: list[Model]) -> dict[str, dict[int, float]]:
    """For each model and length, the median ratio of fp32's time to its own, all in turn."""
    sessions = [ort.Session(model.path, model.spec) for model in models]
    found: dict[str, dict[int, float]] = {model.name: {} for model in models}
    for length in LENGTHS:
        ids = np.random.default_rng(0).integers(1000, 5000, (1, length))
        filled = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        feeds = [{name: filled[name] for name in session.input_names} for session in sessions]
        times = np.empty((ROUNDS, len(sessions)))
        for row in range(-10, ROUNDS):
            for column, (session, feed) in enumerate(zip(sessions, feeds, strict=True)):
                start = time.perf_counter()
                session.run(feed)
                times[row, column] = time.perf_counter() - start
        for column, model in enumerate(models):
            found[model.name][length] = float(np.median(times[:, 0] / times[:, column]))
    return found


def table(seeds: list[dict[str, Outcome]], truth: np.ndarray) -> str:
    """One row a model; a model that is missing for a seed is left out of that seed."""
    lines = [
        "| model | size | agreement | accuracy | drop, points | 1 x 32 | 1 x 128 |",
        "|---|" + "---:|" * 6,
    ]
    for name in seeds[0]:
        have = [seed for seed in seeds if name in seed]
        wanted = np.stack([seed["fp32"].answers for seed in have])
        seen = np.stack([seed[name].answers for seed in have])
        agree = pooled((seen == wanted).astype(float))
        drop = pooled((wanted == truth).astype(float) - (seen == truth).astype(float))
        speeds = [np.mean([seed[name].speedups[length] for seed in have]) for length in LENGTHS]
        lines.append(
            f"| {name} | {have[0][name].model.size_bytes / 1e6:.2f} MB | {span(agree, 100, '.2f')} % "
            f"| {np.mean(seen == truth) * 100:.2f} % | {span(drop, 100, '+.2f')} "
            f"| {speeds[0]:.2f}x | {speeds[1]:.2f}x |"
        )
    return "\n".join(lines)


def pooled(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and bootstrap interval of [seeds, rows]: rows are resampled, all seeds of a row together."""
    rows = values.mean(axis=0)
    chance = np.random.default_rng(0)
    means = [rows[chance.integers(0, len(rows), len(rows))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(rows.mean()), float(low), float(high)


def span(figures: tuple[float, float, float], scale: float, form: str) -> str:
    """``mean (low … high)``."""
    mean, low, high = (figure * scale for figure in figures)
    return f"{mean:{form}} ({low:{form}} … {high:{form}})"


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    main()
