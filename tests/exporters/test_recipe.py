"""Recipes: what is accepted, and that nothing in them is silently ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from aios_edge.errors import RecipeError
from exporters.recipe import load_recipe

GOOD = '[model]\nsource = "m"\n[data]\ntrain = "train.csv"\n'


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_paths_relative_to_the_recipe(tmp_path: Path) -> None:
    value = load_recipe(recipe(tmp_path, GOOD))
    assert value.finetune.method == "full"
    assert value.accuracy.metric == "accuracy"
    assert value.path(value.data.train) == tmp_path / "train.csv"
    assert value.name == "m"
    assert str(tmp_path) not in str(value.document())


def test_pairs_are_two_columns(tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, GOOD + 'input = ["a", "b"]\n')).data.input == ("a", "b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + 'lable = "x"\n', "'label'"),
        (GOOD + "[finetun]\nepochs = 1\n", "'finetune'"),
        (GOOD + "[finetune]\nepoch = 1\n", "'epochs'"),
        (GOOD + '[finetune]\nmethod = "lora"\n', "not available in this version"),
        (GOOD + '[finetune]\nmethod = "fulll"\n', "unknown method"),
        (GOOD + "[augment]\n", "[augment] is not available in this version"),
        (GOOD + "[prune]\nhead = 4\n", "Did you mean 'heads'?"),
        (GOOD + "[prune]\nheads = 0\n", "heads = 0 would leave nothing of the network"),
        (GOOD + "[prune]\nvocabulary = -1\n", "0 keeps all"),
        (GOOD + "[prune]\n[distill]\nteacher_weight = 2\n", "the truth has the rest"),
        (GOOD + "[prune]\n[distill]\ntemperature = 0\n", "temperature = 0.0 is not positive"),
        (GOOD + "[distill]\nepochs = 2\n", "Add [prune]"),
        (GOOD + "[search]\nstructures = 0\n", "structures = 0 is less than 1"),
        (GOOD + "[search]\ntrials = 5\n", "Add [prune]"),
        (GOOD + "[prune]\n[search]\ntrials = -1\n", "trials = -1 is less than 0"),
        (GOOD + "[distill]\nteacher = 'x'\n", "Did you mean 'teacher_weight'?"),
        (GOOD + 'unlabelled = "u.txt"\n', "unlabelled texts teach a pruned network only"),
        (GOOD + "[accuracy]\nmax_drop = 2\n", "0.01 is one point"),
        (GOOD + "[accuracy]\nmetric = 'f1'\n", "accuracy.metric"),
        (GOOD + "[finetune]\nepochs = 0\n", "less than 1"),
        (GOOD + "[finetune]\nepochs = 'two'\n", "finetune.epochs"),
        (GOOD + "[finetune]\nlearning_rate = nan\n", "not positive"),
        (GOOD + "[export]\nversion = 'one'\n", "SemVer"),
        (GOOD + "[export]\nname = '../up'\n", "name"),
        ('[model]\nsource = "m"\ntask = "fill-mask"\n[data]\ntrain = "t.csv"\n', "text-classification"),
        ('[model]\nsource = "m"\n', "data"),
        ("[model\n", "TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, text))
    assert said in str(caught.value)
    assert "recipe.toml" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_recipe_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / "none.toml")
