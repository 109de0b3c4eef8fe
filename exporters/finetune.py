"""Fine-tuning: a plain torch loop. The best epoch on validation wins; every epoch is a checkpoint to resume from."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import AiosEdgeError, RecipeError
from exporters import memory
from exporters.data import Labelled
from exporters.encode import Encoder, Sample, length_of
from exporters.progress import Progress
from exporters.recipe import FinetuneSection

#: Where nothing is said. A head alone takes large steps; whole small encoders take 5e-5 to 1e-4.
LEARNING_RATES = {"full": 5e-5, "last-n": 1e-4, "head": 1e-3}
_WARMUP_SHARE = 0.1
_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
_CHECKPOINT = "checkpoint.pt"
_EVALUATION_BATCH = 32


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What a fine-tuning did; ``tuned.json`` beside the model. Accuracies are on validation, per epoch."""

    method: str
    epochs: int
    best_epoch: int | None
    validation_accuracy: tuple[float, ...]
    precision: str
    trained_parameters: int


def finetune(
    model: Any,
    section: FinetuneSection,
    train: Labelled,
    validation: Labelled,
    encoder: Encoder,
    work: Path,
    progress: Progress,
) -> Tuned:
    """Train ``model`` and save its best epoch to ``work/model``; resumes from ``work``'s checkpoint.

    Raises :class:`AiosEdgeError` when the loss is not finite.
    """
    import torch

    torch.set_num_threads(section.threads or os.cpu_count() or 1)
    torch.manual_seed(section.seed)
    random.seed(section.seed)
    if section.method == "none":
        model.save_pretrained(work / "model")
        return Tuned(
            method="none", epochs=0, best_epoch=None, validation_accuracy=(), precision="fp32", trained_parameters=0
        )
    trained = _choose_trained(model, section)
    train_samples, validation_samples = encoder.samples(train.texts), encoder.samples(validation.texts)
    steps_per_epoch = math.ceil(len(train) / section.batch_size)
    total = steps_per_epoch * section.epochs
    rate = section.learning_rate or LEARNING_RATES[section.method]
    # Fused: one pass over the parameters instead of several; a fifth of a step on a CPU without bf16.
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=_WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_then_decay(step, total))
    fast = _has_bf16()
    accuracies: list[float] = []
    checkpoint = work / _CHECKPOINT
    if (state := _read_checkpoint(checkpoint, progress)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        accuracies = list(state["accuracies"])
        progress.message(f"resuming fine-tuning after epoch {len(accuracies)} of {section.epochs}")
    for epoch in range(len(accuracies), section.epochs):
        torch.manual_seed(section.seed * 1000 + epoch)  # the same dropout, resumed or not
        model.train()
        batches = list(_batches(train_samples, section.batch_size, seed=section.seed * 1000 + epoch))
        for number, rows in enumerate(batches):
            inputs = _tensors(encoder.pad([train_samples[i] for i in rows]))

            wanted = torch.tensor([train.labels[i] for i in rows])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
                logits = model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise AiosEdgeError(
                    f"the loss is {value} in epoch {epoch + 1}, batch {number + 1}",
                    where="finetune",
                    remedy=f"Lower learning_rate (now {rate:g}) in [finetune]",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, _CLIP_NORM)
            optimizer.step()
            schedule.step()
            progress.update(epoch * steps_per_epoch + number + 1, total, f"loss {value:.3f}")
        accuracy = _accuracy(model, validation_samples, validation.labels, encoder)
        progress.message(f"epoch {epoch + 1}/{section.epochs}: validation accuracy {accuracy:.4f}")
        if accuracy > max(accuracies, default=-1.0):
            _save_best(model, work)
        accuracies.append(accuracy)
        _save_checkpoint(model, optimizer, schedule, accuracies, checkpoint)
    checkpoint.unlink(missing_ok=True)
    return Tuned(
        method=section.method,
        epochs=section.epochs,
        best_epoch=int(np.argmax(accuracies)) + 1,
        validation_accuracy=tuple(accuracies),
        precision="bf16 autocast" if fast else "fp32",
        trained_parameters=sum(parameter.numel() for parameter in trained),
    )


def torch_logits(model: Any, samples: Sequence[Sample], encoder: Encoder) -> NDArray[np.float32]:
    """Logits [N, labels] in the samples' order; batches of similar length, padded."""
    answers: dict[int, Any] = {}
    order = sorted(range(len(samples)), key=lambda i: length_of(samples[i]))
    for start in range(0, len(order), _EVALUATION_BATCH):
        rows = order[start : start + _EVALUATION_BATCH]
        answers.update(zip(rows, batch_logits(model, encoder.pad([samples[i] for i in rows])), strict=True))
    return np.stack([answers[i] for i in range(len(samples))])


def batch_logits(model: Any, batch: Sample) -> NDArray[np.float32]:
    """torch's logits [N, labels] of one padded batch."""
    import torch

    model.eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(**_tensors(batch)).logits.float().numpy()
    return logits


def _tensors(batch: Sample) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _accuracy(model: Any, samples: Sequence[Sample], labels: Sequence[int], encoder: Encoder) -> float:
    return float(np.mean(torch_logits(model, samples, encoder).argmax(axis=1) == np.asarray(labels)))


def _choose_trained(model: Any, section: FinetuneSection) -> list[Any]:
    """Freeze what the method leaves alone. A pooler belongs to the head: it only exists to feed it."""
    if section.method != "full":
        for parameter in model.base_model.parameters():
            parameter.requires_grad = False
        unfrozen = [model.base_model.pooler] if getattr(model.base_model, "pooler", None) is not None else []
        if section.method == "last-n":
            layers = encoder_layers(model)
            if section.last_n > len(layers):
                what = f"last_n = {section.last_n}, but the model has {len(layers)} layers"
                raise RecipeError(what, where="[finetune]", remedy="Use a smaller last_n, or method full")
            unfrozen += layers[-section.last_n :]
        for module in unfrozen:
            for parameter in module.parameters():
                parameter.requires_grad = True
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def encoder_layers(model: Any) -> list[Any]:
    """The encoder's layers, first to last, as BERT and DistilBERT name them."""
    base = model.base_model
    for path in (("encoder", "layer"), ("transformer", "layer")):
        stack = getattr(getattr(base, path[0], None), path[1], None)
        if stack is not None:
            return list(stack)
    remedy = "Use method full or head"
    raise RecipeError(f"the layers of a {type(base).__name__} aren't known", where="[finetune]", remedy=remedy)


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


def _has_bf16() -> bool:
    """bf16 autocast pays only where the CPU multiplies bf16 itself; elsewhere it is emulated and slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in ("avx512_bf16", "amx_bf16"))


def _save_best(model: Any, work: Path) -> None:
    import shutil

    fresh = work / "model.new"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    shutil.rmtree(work / "model", ignore_errors=True)
    fresh.rename(work / "model")


def _save_checkpoint(model: Any, optimizer: Any, schedule: Any, accuracies: list[float], path: Path) -> None:
    import torch

    fresh = path.with_suffix(".new")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({**state, "accuracies": accuracies}, fresh)
    fresh.replace(path)


def _read_checkpoint(path: Path, progress: Progress) -> dict[str, Any] | None:
    """The state after the last epoch, or None where there is none that can be read."""
    import torch

    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own kinds
        if memory.ran_out(error):
            raise
        progress.message(f"the checkpoint is damaged ({type(error).__name__}); fine-tuning starts again")
        path.unlink()
        return None
    return state


def save_tuned(tuned: Tuned, work: Path) -> None:
    """Write ``tuned.json``."""
    (work / "tuned.json").write_text(json.dumps(msgspec.to_builtins(tuned), indent=2), encoding="utf-8")


def load_tuned(folder: Path) -> Tuned:
    """Read ``tuned.json``."""
    return msgspec.json.decode((folder / "tuned.json").read_bytes(), type=Tuned)
