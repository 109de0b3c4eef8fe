"""Find, read and check device profiles: TOML files whose values are :class:`~aios_edge.profile.DeviceProfile`."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from aios_edge.errors import ProfileError
from aios_edge.manifest import CANDIDATES
from aios_edge.profile import DeviceProfile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROFILE_SCHEMA = "1.0"
ARCHITECTURES = ("x86_64", "aarch64", "armv7l", "any")
POWER_SOURCES = ("rapl", "ina3221", "ina238", "pmic", "estimate")

_MAX_BYTES = 1 << 18
_REMEDY = "profiles/README.md explains every field and says what it takes"
_PACKAGE = Path(__file__).parent
#: In the wheel, then in a checkout.
_FOLDERS = (_PACKAGE / "profiles", _PACKAGE.parent / "profiles")


def _folder() -> Path:
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise ProfileError("the shipped profiles are missing", where=str(_FOLDERS[0]), remedy="Install aios-edge again")


def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with AIOS Edge, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """A shipped profile by its name, or any by the path of its TOML file.

    A string with a slash or the ending ``.toml`` is a path. Raises :class:`ProfileError` naming the nearest known
    profile, or everything that is wrong in the file.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(".toml"):
        return check_profile(Path(text))
    known = shipped_profiles()
    if text not in known:
        raise ProfileError(
            f"there is no profile {text!r}{_meant(text, known)}",
            remedy=f"Known: {', '.join(known)}; or give the path of a .toml file",
        )
    return check_profile(_folder() / f"{text}.toml")


def check_profile(path: Path | str) -> DeviceProfile:
    """Read a profile and check every key and value; all faults are reported together.

    Of values that have the wrong type only the first is known, and it hides the faults of the others.
    """
    path = Path(path)
    document, faults = _without_unknown_keys(_read(path), DeviceProfile, "")
    try:
        profile = msgspec.convert(document, DeviceProfile)
    except msgspec.ValidationError as error:
        what = re.sub(r" - at `\$\.?(.*)`$", r" at '\1'", str(error))
        if not (faults and "missing required field" in what):  # most likely one of the unknown keys, mistyped
            faults.append(what)
        raise ProfileError("; ".join(faults), where=str(path), remedy=_REMEDY) from error
    if faults := [*faults, *profile_faults(profile)]:
        raise ProfileError("; ".join(faults), where=str(path), remedy=_REMEDY)
    return profile


def profile_faults(profile: DeviceProfile) -> tuple[str, ...]:
    """Everything about a profile's values that can't be, each with its dotted key. Pure."""
    faults: list[str] = []

    def require(ok: bool, key: str, what: str) -> None:
        if not ok:
            faults.append(f"{key}: {what}")

    def unique(key: str, values: tuple[object, ...]) -> None:
        require(len(values) == len(set(values)), key, "an entry is there twice")

    require(profile.schema == PROFILE_SCHEMA, "schema", f"is {profile.schema!r}, this version reads {PROFILE_SCHEMA!r}")
    require(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", profile.name) is not None, "name", "takes a-z, 0-9 and '-'")
    known = profile.arch in ARCHITECTURES
    require(known, "arch", f"{profile.arch!r} is not one of {', '.join(ARCHITECTURES)}")
    require(bool(profile.providers), "providers", 'is empty; [[providers]] name = "CPUExecutionProvider" always works')
    unique("providers", tuple(provider.name for provider in profile.providers))
    for index, provider in enumerate(profile.providers):
        fits = re.fullmatch(r"[A-Za-z0-9]+ExecutionProvider", provider.name) is not None
        require(fits, f"providers[{index}].name", f"{provider.name!r} doesn't end in 'ExecutionProvider'")
    require(bool(profile.precision_preference), "precision_preference", "is empty")
    unique("precision_preference", profile.precision_preference)
    for precision in profile.precision_preference:
        what = f"{precision!r} is not one of {', '.join(CANDIDATES)}{_meant(precision, CANDIDATES)}"
        require(precision in CANDIDATES, "precision_preference", what)
    unique("cpu_flags", profile.cpu_flags)
    workers = 1 if profile.threads.workers == "auto" else profile.threads.workers
    counts = {"intra_op": profile.threads.intra_op, "inter_op": profile.threads.inter_op, "workers": workers}
    for key, count in counts.items():
        require(count >= 1, f"threads.{key}", "is less than 1")
    alone = profile.isolation == "thread" and workers > 1
    require(not alone, "threads.workers", 'more than one needs isolation = "process"')
    cpus = profile.threads.cpu_affinity
    unique("threads.cpu_affinity", cpus)
    require(all(cpu >= 0 for cpu in cpus), "threads.cpu_affinity", "CPUs are numbered from 0")
    enough = not cpus or len(set(cpus)) >= profile.threads.intra_op
    require(enough, "threads.cpu_affinity", f"{len(set(cpus))} CPUs for {profile.threads.intra_op} threads.intra_op")
    unique("power.sources", profile.power.sources)
    for source in profile.power.sources:
        what = f"{source!r} is not one of {', '.join(POWER_SOURCES)}{_meant(source, POWER_SOURCES)}"
        require(source in POWER_SOURCES, "power.sources", what)
    estimate = profile.power.estimate
    require(estimate is not None or "estimate" not in profile.power.sources, "power.estimate", "is missing")
    if estimate is not None:
        require(0 <= estimate.idle_w < estimate.busy_w < 1e5, "power.estimate", "needs 0 <= idle_w < busy_w")
        require(bool(estimate.source.strip()), "power.estimate.source", "is empty: say whose coefficients they are")
    budgets = profile.budgets
    for key in ("latency_p95_s", "memory_bytes", "bundle_size_bytes", "power_w"):
        value = getattr(budgets, key)
        require(value is None or 0 < value < 1e15, f"budgets.{key}", f"{value} is not a positive number")
    for key in ("latency_batch", "latency_length"):
        require(getattr(budgets, key) >= 1, f"budgets.{key}", "is less than 1")
    require(0 <= budgets.max_drop < 1, "budgets.max_drop", f"{budgets.max_drop} is not between 0 and 1")
    unique("match.device_tree", profile.match.device_tree)
    unique("match.without_cpu_flags", profile.match.without_cpu_flags)
    asked = {flag for entry in profile.cpu_flags for flag in entry.split("|")}
    both = sorted(asked & set(profile.match.without_cpu_flags))
    require(not both, "match.without_cpu_flags", f"{', '.join(both)} is in cpu_flags as well")
    memory = profile.match.max_memory_bytes
    require(memory is None or memory > 0, "match.max_memory_bytes", "is not positive")
    return tuple(faults)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"can't be read ({error.strerror})", where=str(path)) from error
    if len(data) > _MAX_BYTES:
        raise ProfileError(f"is larger than {_MAX_BYTES} bytes, so it is no profile", where=str(path))
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ProfileError(f"line {line} is not UTF-8", where=str(path), remedy="Save the file as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        # the parser names line and column, except at the end of the document
        end = data.count(b"\n") + 1
        what = str(error).replace("at end of document", f"at line {end}, the end of the document")
        raise ProfileError(f"is not TOML: {what}", where=str(path)) from error


def _without_unknown_keys(
    table: dict[str, Any], struct: type[msgspec.Struct], prefix: str
) -> tuple[dict[str, Any], list[str]]:
    """The table as it can be read, and its unknown keys at any depth, each with its dotted path and the nearest known
    key."""
    known: dict[str, Any] = {}
    faults: list[str] = []

    def inside(value: Any, inner: type[msgspec.Struct], key: str) -> Any:
        if not isinstance(value, dict):
            return value
        kept, found = _without_unknown_keys(value, inner, f"{key}.")
        faults.extend(found)
        return kept

    hints = get_type_hints(struct)
    for key, value in table.items():
        if key not in hints:
            faults.append(f"unknown key '{prefix}{key}'{_meant(key, tuple(hints))}")
            continue
        known[key] = value
        if inner := _struct_in(hints[key]):
            if isinstance(value, list):
                known[key] = [inside(item, inner, f"{prefix}{key}[{index}]") for index, item in enumerate(value)]
            else:
                known[key] = inside(value, inner, f"{prefix}{key}")
    return known, faults


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    """The struct a type hint is, or holds (``X``, ``X | None``, ``tuple[X, ...]``)."""
    for candidate in (hint, *getattr(hint, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
            return candidate
    return None


def _meant(word: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f" (did you mean '{near[0]}'?)" if near else ""
