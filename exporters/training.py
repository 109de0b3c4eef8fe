"""Training: a plain torch loop. The best epoch on validation wins; every epoch is a checkpoint to resume from."""

from __future__ import annotations

import functools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import AiosEdgeError
from exporters import memory
from exporters.encode import Encoder, Sample, length_of
from exporters.progress import Progress

_WARMUP_SHARE = 0.1
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
_CHECKPOINT = "checkpoint.pt"
_EVALUATION_BATCH = 32


class LossNotFinite(AiosEdgeError):
    """Training with these settings leads nowhere."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. ``threads`` None: all cores. ``what`` it is, and ``where`` in the recipe, in words."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    threads: int | None
    what: str
    where: str


@dataclass(frozen=True)
class Examples:
    """Encoded rows and the index of each one's label."""

    samples: Sequence[Sample]
    labels: Sequence[int]


@dataclass(frozen=True)
class Epoch:
    """Accuracy on validation after it, and the mean loss of the training rows while it ran."""

    accuracy: float
    loss: float


#: (row numbers, the model's output) -> the loss to go down.
Loss = Callable[[list[int], Any], Any]


def train(
    model: Any,
    trained: list[Any],
    settings: Settings,
    examples: Examples,
    validation: Examples,
    encoder: Encoder,
    loss_of: Loss,
    work: Path,
    progress: Progress,
) -> tuple[Epoch, ...]:
    """Train the parameters ``trained`` and save the best epoch to ``work/model``.

    Resumes from ``work``'s checkpoint. Raises :class:`LossNotFinite`.
    """
    import torch

    prepare(seed=settings.seed, threads=settings.threads)
    steps_per_epoch = math.ceil(len(examples.samples) / settings.batch_size)
    total = steps_per_epoch * settings.epochs
    # Fused: one pass over the parameters instead of several; a fifth of a step on a CPU without bf16.
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=_WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_then_decay(step, total))
    done: list[Epoch] = []
    checkpoint = work / _CHECKPOINT
    if (state := _read_checkpoint(checkpoint, settings.what, progress)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = [Epoch(*figures) for figures in state["epochs"]]
        progress.message(f"resuming {settings.what} after epoch {len(done)} of {settings.epochs}")
    for epoch in range(len(done), settings.epochs):
        torch.manual_seed(settings.seed * 1000 + epoch)  # the same dropout, resumed or not
        model.train()
        summed = 0.0
        batches = list(_batches(examples.samples, settings.batch_size, seed=settings.seed * 1000 + epoch))
        for number, rows in enumerate(batches):
            inputs = tensors(encoder.pad([examples.samples[i] for i in rows]))
            with arithmetic():
                output = model(**inputs)
            loss = loss_of(rows, output)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise LossNotFinite(
                    f"the loss is {value} in epoch {epoch + 1}, batch {number + 1}",
                    where=settings.where,
                    remedy=f"Lower learning_rate (now {settings.learning_rate:g}) in {settings.where}",
                )
            summed += value * len(rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            progress.update(epoch * steps_per_epoch + number + 1, total, f"loss {value:.3f}")
        answered = torch_logits(model, validation.samples, encoder).argmax(axis=1)
        accuracy = float(np.mean(answered == np.asarray(validation.labels)))
        progress.message(f"epoch {epoch + 1}/{settings.epochs}: validation accuracy {accuracy:.4f}")
        if accuracy > max((epoch.accuracy for epoch in done), default=-1.0):
            _save_best(model, work)
        done.append(Epoch(accuracy, summed / len(examples.samples)))
        _save_checkpoint(model, optimizer, schedule, done, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return tuple(done)


def prepare(*, seed: int, threads: int | None) -> None:
    """Threads and seeds, before anything random is made."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.manual_seed(seed)
    random.seed(seed)


def precision() -> str:
    """What the arithmetic of training is on this machine, in words."""
    return "bf16 autocast" if has_bf16() else "fp32"


def arithmetic() -> Any:
    """The context in which a network is run while it, or another one by it, is trained."""
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16())


@functools.cache
def has_bf16() -> bool:
    """bf16 autocast pays only where the CPU multiplies bf16 itself; elsewhere it is emulated and slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16"))


def torch_logits(model: Any, samples: Sequence[Sample], encoder: Encoder) -> NDArray[np.float32]:
    """Logits [N, labels] in the samples' order; batches of similar length, padded."""
    answers: dict[int, Any] = {}
    for rows in by_length(samples, _EVALUATION_BATCH):
        answers.update(zip(rows, batch_logits(model, encoder.pad([samples[i] for i in rows])), strict=True))
    return np.stack([answers[i] for i in range(len(samples))])


def batch_logits(model: Any, batch: Sample) -> NDArray[np.float32]:
    """torch's logits [N, labels] of one padded batch."""
    import torch

    model.eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(**tensors(batch)).logits.float().numpy()
    return logits


def by_length(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches, shortest first."""
    order = sorted(range(len(samples)), key=lambda i: length_of(samples[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def tensors(batch: Sample) -> dict[str, Any]:
    """A batch as torch has it; memory is shared."""
    import torch

    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _batches(samples: Sequence[Sample], batch_size: int, *, seed: int) -> Iterator[list[int]]:
    """Batches of similar length in random order: padding all to the longest would double the cost."""
    chance = random.Random(seed)
    order = sorted(range(len(samples)), key=lambda i: length_of(samples[i]) + chance.uniform(-2, 2))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    chance.shuffle(batches)
    yield from batches


def _warm_then_decay(step: int, total: int) -> float:
    warm = max(1, int(total * _WARMUP_SHARE))
    return (step + 1) / warm if step < warm else max(0.0, (total - step) / max(1, total - warm))


def _save_best(model: Any, work: Path) -> None:
    import shutil

    fresh = work / "model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    shutil.rmtree(work / "model", ignore_errors=True)
    fresh.rename(work / "model")


def _save_checkpoint(model: Any, optimizer: Any, schedule: Any, done: list[Epoch], path: Path) -> None:
    import torch

    fresh = path.with_suffix(".new")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({**state, "epochs": [(epoch.accuracy, epoch.loss) for epoch in done]}, fresh)
    fresh.replace(path)


def _read_checkpoint(path: Path, what: str, progress: Progress) -> dict[str, Any] | None:
    """The state after the last epoch, or None where there is none that can be read."""
    import torch

    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own kinds
        if memory.ran_out(error):
            raise
        progress.message(f"the checkpoint is damaged ({type(error).__name__}); {what} starts again")
        path.unlink()
        return None
    return state
