"""The workshop: labelled data and a source model in, one bundle per device profile out.

>>> import exporters
>>> report = exporters.export("recipe.toml", ["rpi5", "x86-gateway"])

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
    recipe: ExportRecipe | Path | str,
    profiles: Sequence[DeviceProfile | Path | str],
    out: Path | str = "out",
    *,
    progress: Progress | None = None,
    cache: Path | str | None = None,
    measured: Sequence[Path | str] = (),
    candidates: bool = False,
) -> ExportReport:
    """Make one verified bundle per profile under ``out/<profile>/`` and a report beside them.

    ``recipe`` is a value or the path of a TOML file. Each of ``profiles`` is a value, the name of a shipped profile or
    the path of a TOML file; one name alone is one profile. ``out`` is relative to the working directory, as for the
    command. ``cache`` (default ``out/.cache``) keeps finished stages, so an interrupted export resumes and a further
    profile reuses what it can.

    ``measured`` are files with what ``aios-edge bench --json`` printed on devices of the profiles: their figures count
    in the choice. ``candidates`` writes every candidate as a bundle to be measured so, under
    ``out/candidates/<profile>/<candidate>/``.

    Raises ``RecipeError``, ``ProfileError`` and ``DataError`` for bad input, ``MeasurementRefused`` for a
    measurement of something else, ``MissingExtra`` without the workshop's
    packages, ``PromiseBroken`` when no candidate keeps accuracy, parity or size; then no bundle is written at all.
    ``ResourceError`` when the machine says no: memory, disk, another export that writes to ``out``.
    """
    from aios_edge.profile_files import load_profile
    from exporters.progress import SilentProgress
    from exporters.recipe import load_recipe

    names = [profiles] if isinstance(profiles, str) else profiles  # a str is a sequence too: of letters
    devices = tuple(load_profile(name) if isinstance(name, str | Path) else name for name in names)
    value = load_recipe(Path(recipe)) if isinstance(recipe, str | Path) else recipe
    _require_workshop()
    from exporters.memory import running_out_said
    from exporters.out_folder import alone_in
    from exporters.pipeline import run

    folder = Path(out)
    kept = Path(cache) if cache is not None else folder / ".cache"
    with alone_in(folder), running_out_said():
        return run(
            value,
            devices,
            folder,
            progress=progress or SilentProgress(),
            cache=kept,
            measured=tuple(Path(path) for path in measured),
            candidates=candidates,
        )


def _require_workshop() -> None:
    """Raise MissingExtra for the first package of ``[export]`` that isn't there; finds without importing."""
    import importlib.util

    from aios_edge.errors import MissingExtra

    for package in ("torch", "transformers", "onnx", "onnxruntime", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "export", why="export")
