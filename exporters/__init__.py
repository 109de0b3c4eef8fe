"""The workshop: labelled data and a source model in, one bundle per device profile out.

>>> import exporters
>>> report = exporters.export(Path("recipe.toml"), [profile], Path("out"))

Importing this package loads neither torch nor transformers; :func:`export` does, when called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_edge.profile import DeviceProfile
    from exporters.progress import Progress
    from exporters.recipe import ExportRecipe
    from exporters.report import ExportReport

__all__ = ["export"]


def export(
    recipe: ExportRecipe | Path,
    profiles: Sequence[DeviceProfile],
    out: Path,
    *,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> ExportReport:
    """Make one verified bundle per profile under ``out/<profile>/`` and a report beside them.

    ``recipe`` is a value or the path of a TOML file; ``cache`` (default ``out/.cache``) keeps finished stages, so an
    interrupted export resumes and a further profile reuses what it can. Raises ``RecipeError`` and ``DataError``
    for bad input, ``MissingExtra`` without the workshop's packages, ``PromiseBroken`` when no candidate keeps
    accuracy, parity or size; then no bundle is written at all.
    """
    from exporters.progress import SilentProgress
    from exporters.recipe import load_recipe

    value = load_recipe(recipe) if isinstance(recipe, Path) else recipe
    _require_workshop()
    from exporters.pipeline import run

    return run(value, tuple(profiles), out, progress=progress or SilentProgress(), cache=cache or out / ".cache")


def _require_workshop() -> None:
    """Raise MissingExtra for the first package of ``[export]`` that isn't there; finds without importing."""
    import importlib.util

    from aios_edge.errors import MissingExtra

    for package in ("torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "export", why="export")
