"""The export recipe: a TOML file as a frozen value, checked before anything is loaded."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from aios_edge.errors import RecipeError
from aios_edge.manifest import CANDIDATES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TASKS = ("text-classification",)
METHODS = ("full", "head", "last-n", "none")
#: Named by the recipe's format, not built yet: refused by name, never silently ignored.
LATER_METHODS = ("lora", "dora", "adalora", "ia3", "prefix")
LATER_TABLES = ("augment", "pretrain")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SEMVER = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?")


class ModelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``source``: a local directory, a hub id, or ``package:NAME`` (weights inside an installed Python package)."""

    source: str
    task: str = "text-classification"


class DataSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files relative to the recipe; ``validation`` and ``test`` are split off ``train`` where absent. ``unlabelled``:
    more texts of the same kind, which a pruned network learns to answer as its teacher does."""

    train: str
    validation: str | None = None
    test: str | None = None
    input: str | tuple[str, str] = "text"
    label: str = "label"
    unlabelled: str | None = None
    drop_empty: bool = False


class FinetuneSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``learning_rate`` None: what suits the method. ``last_n`` counts encoder layers. ``threads`` None: all cores."""

    method: str = "full"
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = None
    seed: int = 0
    max_length: int = 128
    last_n: int = 2
    max_rows: int | None = None
    threads: int | None = None


class PruneSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each layer keeps: ``heads``, ``ffn`` (neurons), ``layers``. With one of them given the others stay whole;
    with none, the profile's budget and what training recovers decide (:mod:`exporters.structure`). ``vocabulary``
    counts pieces: None keeps all, or where the budget is too small for them as many as fit, but never fewer than the
    texts use, with labels or without; 0 keeps all."""

    heads: int | None = None
    ffn: int | None = None
    layers: int | None = None
    vocabulary: int | None = None

    @property
    def explicit(self) -> bool:
        """Whether the user says how narrow the network gets."""
        return any(size is not None for size in (self.heads, self.ffn, self.layers))


class DistillSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Recovery after pruning. ``teacher_weight`` is the share of the loss that the teacher's answers have, the truth
    has the rest; ``state_weight`` is the factor of the distance between states, which comes on top.
    ``freeze_embeddings``: tables stay as they were, or a small network learns the training rows' words by heart."""

    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 2e-4
    temperature: float = 2.0
    teacher_weight: float = 0.9
    state_weight: float = 20.0
    freeze_embeddings: bool = True


class AccuracySection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``max_drop`` against the fine-tuned fp32 model; None leaves it to the profile, the stricter one counts."""

    metric: Literal["accuracy"] = "accuracy"
    max_drop: float | None = None


class SearchSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``exhaustive`` false: where the profile's preference decides (its latency can't be measured here), candidates
    after the first one that keeps its promises can't win and aren't built, and only one shape is timed. ``structures``:
    at most so many pruned networks are trained for a profile. ``trials``: short trainings that look for the
    hyper-parameters of each one's recovery (by Optuna); 0 takes those of ``[distill]``. ``candidates``: more of them
    than a profile prefers, for every profile whose first provider can run them. ``neural_compressor``: its static int8,
    at its defaults and tuned, are two more, where that is the CPU."""

    exhaustive: bool = True
    structures: int = 2
    trials: int = 0
    candidates: tuple[str, ...] = ()
    neural_compressor: bool = False


class ExportSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bundle is called. ``licence`` is that of the source weights (an SPDX id)."""

    name: str | None = None
    version: str = "1.0.0"
    licence: str = "unknown"


class ExportRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole recipe. ``folder`` is where its relative paths start; it is no part of the file."""

    model: ModelSection
    data: DataSection
    finetune: FinetuneSection = FinetuneSection()
    prune: PruneSection | None = None
    distill: DistillSection = DistillSection()
    accuracy: AccuracySection = AccuracySection()
    search: SearchSection = SearchSection()
    export: ExportSection = ExportSection()
    folder: str = "."

    def path(self, name: str) -> Path:
        """A path of the recipe, relative to the recipe's folder."""
        return Path(self.folder) / Path(name).expanduser()

    @property
    def name(self) -> str:
        """The bundle's name: as given, else made of the source's last part."""
        if self.export.name:
            return self.export.name
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", self.model.source.removeprefix("package:").rstrip("/").split("/")[-1])
        return stem.strip("-._")[:64] or "model"

    def document(self) -> dict[str, Any]:
        """What identifies the recipe: everything but the place it lies in."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        del document["folder"]
        return document


def load_recipe(path: Path) -> ExportRecipe:
    """Read and check a recipe; raises :class:`RecipeError` naming the place, the key and the nearest known one."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"can't be read ({error.strerror})", where=str(path), remedy="Check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        remedy = "Correct the place it names, and save it as UTF-8"
        raise RecipeError(f"is not TOML ({error})", where=str(path), remedy=remedy) from error
    return parse_recipe(document, folder=path.parent, where=str(path))


def parse_recipe(document: dict[str, Any], *, folder: Path, where: str = "recipe") -> ExportRecipe:
    """A recipe from its TOML document."""
    _check_keys(document, where)
    try:
        recipe = msgspec.convert({**document, "folder": str(folder)}, ExportRecipe)
    except msgspec.ValidationError as error:
        raise RecipeError(str(error).replace("`$.", "`"), where=where, remedy="See the recipe in the README") from error
    _check_values(recipe, where)
    return recipe


def _check_keys(document: dict[str, Any], where: str) -> None:
    tables = {field.name: field.type for field in msgspec.structs.fields(ExportRecipe) if field.name != "folder"}
    for table, content in document.items():
        if table in LATER_TABLES:
            raise RecipeError(f"[{table}] is not available in this version", where=where, remedy=f"Remove [{table}]")
        if table not in tables:
            raise _unknown(table, [*tables], f"{where}: top level")
        known = [field.name for field in msgspec.structs.fields(struct_of(tables[table]))]
        for key in content if isinstance(content, dict) else ():
            if key not in known:
                raise _unknown(key, known, f"{where}: [{table}]")


def struct_of(kind: Any) -> Any:
    """The struct of a table's type, of ``X | None`` too."""
    return next((part for part in get_args(kind) if part is not type(None)), kind)


def _unknown(key: str, known: list[str], where: str) -> RecipeError:
    return RecipeError(f"unknown key '{key}'", where=where, remedy=_nearest(key, known))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{near[0]}'?" if near else f"Known are: {', '.join(known)}"


def _check_values(recipe: ExportRecipe, where: str) -> None:
    tune, rate, drop = recipe.finetune, recipe.finetune.learning_rate, recipe.accuracy.max_drop
    if recipe.model.task not in TASKS:
        what = f"task '{recipe.model.task}' is not available in this version"
        raise RecipeError(what, where=f"{where}: [model]", remedy=f"Available: {', '.join(TASKS)}")
    if tune.method in LATER_METHODS:
        what = f"method '{tune.method}' is not available in this version"
        raise RecipeError(what, where=f"{where}: [finetune]", remedy=f"Use one of: {', '.join(METHODS)}")
    if tune.method not in METHODS:
        what = f"unknown method '{tune.method}'"
        raise RecipeError(what, where=f"{where}: [finetune]", remedy=f"Use one of: {', '.join(METHODS)}")
    for key in ("epochs", "batch_size", "last_n", "max_rows", "threads"):
        value = getattr(tune, key)
        if value is not None and value < 1:
            raise RecipeError(f"{key} = {value} is less than 1", where=f"{where}: [finetune]")
    if tune.max_length < 4:
        raise RecipeError(f"max_length = {tune.max_length} is less than 4", where=f"{where}: [finetune]")
    if not 0 <= tune.seed < 2**32:
        raise RecipeError(f"seed = {tune.seed} is not in 0 … 2³²-1", where=f"{where}: [finetune]")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise RecipeError(f"learning_rate = {rate} is not positive", where=f"{where}: [finetune]")
    if drop is not None and not 0 <= drop < 1:
        remedy = "It is a share: 0.01 is one point"
        raise RecipeError(f"max_drop = {drop} is not in 0 … 1", where=f"{where}: [accuracy]", remedy=remedy)
    for name in recipe.search.candidates:
        if name not in CANDIDATES:
            near = _nearest(name, CANDIDATES)
            raise RecipeError(f"unknown candidate '{name}'", where=f"{where}: [search] candidates", remedy=near)
    _check_pruning(recipe, where)
    if not _NAME.fullmatch(recipe.name):
        what = f"name '{recipe.name}' is not letters, digits, '.', '_', '-'"
        raise RecipeError(what, where=f"{where}: [export]")
    if not _SEMVER.fullmatch(recipe.export.version):
        remedy = "Write it like 1.0.0"
        raise RecipeError(f"version '{recipe.export.version}' is not SemVer", where=f"{where}: [export]", remedy=remedy)


def _check_pruning(recipe: ExportRecipe, where: str) -> None:
    """Sizes that leave nothing, and training that can't work."""
    if recipe.search.structures < 1:
        raise RecipeError(f"structures = {recipe.search.structures} is less than 1", where=f"{where}: [search]")
    if recipe.search.trials < 0:
        raise RecipeError(f"trials = {recipe.search.trials} is less than 0", where=f"{where}: [search]")
    if recipe.prune is None:
        if recipe.data.unlabelled is not None:
            what = "unlabelled texts teach a pruned network only"
            raise RecipeError(what, where=f"{where}: [data]", remedy="Add [prune], or remove unlabelled")
        if recipe.search.trials:
            raise RecipeError("trials look for a pruned network's recovery", where=where, remedy="Add [prune]")
        if recipe.distill != DistillSection():
            raise RecipeError("[distill] is the recovery of a pruned network", where=where, remedy="Add [prune]")
        return
    for key in ("heads", "ffn", "layers"):
        value = getattr(recipe.prune, key)
        if value is not None and value < 1:
            what = f"{key} = {value} would leave nothing of the network"
            raise RecipeError(what, where=f"{where}: [prune]", remedy=f"{key} is how many are kept; at least 1")
    if recipe.prune.vocabulary is not None and recipe.prune.vocabulary < 0:
        what = f"vocabulary = {recipe.prune.vocabulary} is less than 0"
        raise RecipeError(what, where=f"{where}: [prune]", remedy="It is how many pieces are kept; 0 keeps all")
    distill, place = recipe.distill, f"{where}: [distill]"
    for key in ("epochs", "batch_size"):
        if getattr(distill, key) < 1:
            raise RecipeError(f"{key} = {getattr(distill, key)} is less than 1", where=place)
    for key in ("learning_rate", "temperature"):
        value = getattr(distill, key)
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{key} = {value} is not positive", where=place)
    if not 0 <= distill.teacher_weight <= 1:
        what = f"teacher_weight = {distill.teacher_weight} is not in 0 … 1"
        raise RecipeError(what, where=place, remedy="It is a share; the truth has the rest")
    if not (math.isfinite(distill.state_weight) and distill.state_weight >= 0):
        raise RecipeError(f"state_weight = {distill.state_weight} is negative", where=place)
