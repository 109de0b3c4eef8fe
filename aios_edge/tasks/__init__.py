"""Pre- and post-processing per task. ``TASKS`` is the table: a new task is a file here and a line in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aios_edge.errors import BundleRefused
from aios_edge.manifest import Manifest
from aios_edge.tasks.task import Prediction, Task
from aios_edge.tasks.text_classification import TextClassification

#: Hugging Face task name -> what builds the task from a manifest and the bundle's directory.
TASKS: dict[str, Callable[[Manifest, Path], Task]] = {
    "text-classification": TextClassification,
}


def task_for(manifest: Manifest, root: Path) -> Task:
    """The task of a bundle whose files lie in ``root``.

    Raises :class:`BundleRefused` (``task``, ``tokenizer``) or :class:`MissingExtra` (``text``).
    """
    if (build := TASKS.get(manifest.task)) is None:
        raise BundleRefused(
            "task",
            f"the task {manifest.task!r} is unknown to this version, which knows {', '.join(TASKS)}",
            where=str(root),
            remedy="Update aios-edge",
        )
    return build(manifest, root)


__all__ = ["TASKS", "Prediction", "Task", "task_for"]
