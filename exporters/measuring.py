"""Bundles for measuring: every candidate of a profile, to be timed on its device before one is chosen.

Their accuracy was seen on validation rows; candidates that lose never meet the test split. So the manifest says
``purpose = "measure"``, and an agent refuses to serve them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from aios_edge.bundle.write import check_replaceable
from aios_edge.errors import UsageError
from aios_edge.profile import DeviceProfile
from exporters.calibration import fit_temperature
from exporters.contest import Contest
from exporters.plans import plans_for
from exporters.recipe import SearchSection
from exporters.ship import Making, Seen, assemble
from exporters.variants import Pruning

FOLDER = "candidates"


def check_measuring_places(profiles: Sequence[DeviceProfile], out: Path, search: SearchSection) -> None:
    """Fail before the training where a bundle would meet somebody's files. Raises :class:`UsageError`."""
    for profile in profiles:
        if profile.name == FOLDER:
            what = f"has the name of the folder that --{FOLDER} writes"
            raise UsageError(what, where=f"profile {profile.name}", remedy="Rename the profile")
        for plan in plans_for(profile, search):
            check_replaceable((out / FOLDER / profile.name / plan.name).absolute())


def check_pruned_places(prunings: Mapping[str, Pruning], out: Path) -> None:
    """The same for the bundles of pruned networks, as soon as their names are known; ``prunings`` by profile."""
    for profile, pruning in prunings.items():
        for name in pruning.candidates:
            check_replaceable((out / FOLDER / profile / name).absolute())


def write_for_measuring(contest: Contest, making: Making, out: Path) -> dict[str, str]:
    """Write one profile's candidates below ``out``; their folders by name, relative to ``out``. A candidate without
    accuracy (outputs that are not finite) is left out."""
    folders: dict[str, str] = {}
    labels = making.common.data.validation.labels
    for tried in contest.tried:
        if tried.quality.metrics is None:
            continue
        name = tried.made.name
        folders[name] = f"{FOLDER}/{contest.profile.name}/{name}"
        seen = Seen(
            quality=tried.quality,
            rows=len(labels),
            split="validation",
            temperature=fit_temperature(tried.logits, labels),
        )
        assemble(tried, contest, making, seen, out / folders[name], purpose="measure")
    return folders
