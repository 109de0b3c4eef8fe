"""A stage's digest names all code that can change its result: changed code never meets an old result.

Read off the sources: what the modules of a digest import, and what those import, must be in it too, or in the digest of
a stage that it is built on, whose name is among its ingredients.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import exporters

FOLDER = Path(exporters.__file__).parent
MODULES = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}

#: Function with a digest -> the function whose result's name is among the ingredients. What builds on candidates builds
#: on the baseline too, which is the conversion itself.
BUILT_ON = {
    "stages.finetune": None,
    "stages.tokenizer": None,
    "stages.convert": "stages.finetune",
    "stages.candidate": "stages.convert",
    "stages.answers": "stages.convert",
    "stages.measured": "stages.convert",
    "tuned_static._static": "stages.convert",
    "variants.pruned": "stages.finetune",
    "variants._searched": "variants.pruned",
    "variants._own_tokenizer": "stages.tokenizer",
    "variants._importance": "stages.finetune",
}
#: Modules that decide no stage's result, because ...
HARMLESS = {
    "cache": "it says where results lie; digests are among the ingredients by their value",
    "data": "rows are among the ingredients by what they say, and those that a stage picks as it picked them",
    "memory": "it words errors",
    "plans": "a plan is among the ingredients by its value",
    "progress": "it tells how far a stage is",
    "recipe": "a section is among the ingredients by its value",
}
#: Imports of a type or a constant, which are no code that a result is made with.
VALUES_ONLY = {
    ("prune", "structure"): {"Shape", "Structure"},
    ("sensitivity", "evaluate"): {"Logits"},
    ("inc", "quantize"): {"Built", "Tuned"},
    ("inc_worker", "quantize"): {"Tuned"},
    ("measure", "encode"): {"Sample"},
}


def imports_of(module: str) -> set[str]:
    """The exporters modules that it imports, within functions too, for more than values."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "exporters":
            found.update({entry.name: {"all of it"} for entry in node.names if entry.name in MODULES})
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("exporters."):
            found.setdefault((node.module or "").split(".")[1], set()).update(entry.name for entry in node.names)
    return {name for name, what in found.items() if not what <= VALUES_ONLY.get((module, name), set())}


def reached(modules: set[str]) -> set[str]:
    """These modules and all that they import in turn, but what is harmless."""
    found: set[str] = set()
    left = set(modules)
    while left:
        found.add(module := left.pop())
        left |= imports_of(module) - found - set(HARMLESS)
    return found


def digests() -> dict[str, set[str]]:
    """Function that asks for a digest -> the modules of it that are exporters'."""
    found: dict[str, set[str]] = {}
    for module in sorted(MODULES):
        tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id == "code_digest":
                    found.setdefault(f"{module}.{function.name}", set()).update(_names(module, call.args))
    return found


def _names(module: str, arguments: list[ast.expr]) -> set[str]:
    names: set[str] = set()
    for argument in arguments:
        if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
            listed = getattr(importlib.import_module(f"exporters.{module}"), argument.value.id)
            names |= {entry.__name__.removeprefix("exporters.") for entry in listed}
        elif isinstance(argument, ast.Name):
            names.add(argument.id)
        else:  # the task's module, which is none of ours and imports none
            assert isinstance(argument, ast.Attribute) and argument.attr == "task", ast.unparse(argument)
    return names


FOUND = digests()


def test_every_digest_is_known_here() -> None:
    assert FOUND.keys() == BUILT_ON.keys()
    assert set().union(*FOUND.values()) <= MODULES >= set(HARMLESS)


@pytest.mark.parametrize("stage", sorted(BUILT_ON))
def test_a_digest_names_all_code_that_can_change_the_result(stage: str) -> None:
    covered, under = set(FOUND[stage]), BUILT_ON[stage]
    while under:
        covered |= FOUND[under]
        under = BUILT_ON[under]
    assert reached(FOUND[stage]) - covered == set()


def test_exceptions_are_in_use() -> None:
    every = set().union(*(reached(modules) for modules in FOUND.values()))
    for (module, other), names in VALUES_ONLY.items():
        text = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        assert module in every and any(f"exporters.{other} import" in line for line in text.splitlines()), names
