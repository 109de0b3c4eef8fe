"""Structured candidates through the whole export: pruned, recovered, measured, chosen, shipped, and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import exporters
from aios_edge.bundle.layout import MODEL_CARD
from aios_edge.bundle.read import open_bundle
from aios_edge.errors import PromiseBroken, RecipeError
from aios_edge.golden import read_golden
from aios_edge.profile import Budgets
from aios_edge.profile_files import load_profile
from aios_edge.tasks import task_for
from exporters import distill, inc, structure, tables, trials, tuned_static, vocabulary
from exporters.budget_fit import Whole
from exporters.bundle import DOCUMENTS_BYTES
from exporters.data import Data, load_data
from exporters.finetune import Tuned, tuned_of
from exporters.plans import Plan
from exporters.progress import SilentProgress
from exporters.recipe import DistillSection, load_recipe, parse_recipe
from exporters.report import Candidate, ExportReport
from exporters.source import locate
from exporters.stages import Made, Stages
from exporters.structure import Shape, Structure
from exporters.training import Epoch, LossNotFinite
from exporters.trials import Trials
from exporters.variants import Variant, plan_pruning

pytestmark = [pytest.mark.export, pytest.mark.usefixtures("spelling")]

RECIPE = """
[model]
source = "spelling"
[data]
train = "train.csv"
validation = "val.csv"
test = "test.csv"
[finetune]
epochs = 3
learning_rate = 0.002
max_length = 64
threads = 1
[accuracy]
max_drop = 0.05
[prune]
vocabulary = {vocabulary}
{more}
[distill]
epochs = 2
learning_rate = 1e-3
freeze_embeddings = false
"""


def export(workshop: Path, out: Path, cache: Path, *, vocabulary: int = 0, more: str = "") -> ExportReport:
    path = workshop / f"{out.name}.toml"
    path.write_text(RECIPE.format(vocabulary=vocabulary, more=more), encoding="utf-8")
    return exporters.export(load_recipe(path), "arm64-gateway", out, cache=cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def narrow(workshop: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportReport, Path]:
    out = tmp_path_factory.mktemp("narrow")
    return export(workshop, out, cache, vocabulary=98, more="heads = 2\nffn = 64\n"), out


def test_a_pruned_network_is_shipped_with_its_own_vocabulary(narrow: tuple[ExportReport, Path]) -> None:
    report, out = narrow
    profile = report.profiles["arm64-gateway"]
    assert profile.chosen == "l2-h2-f64-v98+dynamic-s8-e4"
    whole, pruned = (next(c for c in profile.candidates if c.name == name) for name in ("dynamic-s8", profile.chosen))
    assert pruned.size_bytes is not None and whole.size_bytes is not None and pruned.size_bytes < whole.size_bytes
    assert pruned.structure is not None and pruned.structure.heads == 2
    assert pruned.recovery is not None and len(pruned.recovery.training_loss) == 2
    assert pruned.pruned is not None and pruned.pruned.latency_s is not None and pruned.rare_row_bits == 4
    assert pruned.size_bytes < pruned.pruned.size_bytes < report.baseline.size_bytes
    assert pruned.pruned.accuracy == pytest.approx(max(pruned.recovery.validation_accuracy), abs=0.02)
    assert pruned.pruned.whole.heads == 4
    assert pruned.recovery.settings.learning_rate == 1e-3 and pruned.recovery.trials == ()
    assert whole.structure is whole.recovery is whole.pruned is whole.rare_row_bits is None
    bundle = open_bundle(out / "arm64-gateway")
    assert len(json.loads(bundle.file("tokenizer.json").read_bytes())["model"]["vocab"]) == 98
    card = bundle.file(MODEL_CARD).read_text(encoding="utf-8")
    assert "2 heads and 64 neurons" in card and "use least or not at all take 4 bits" in card


def test_its_golden_samples_are_cut_by_its_own_tokenizer(narrow: tuple[ExportReport, Path]) -> None:
    bundle = open_bundle(narrow[1] / "arm64-gateway")
    golden = read_golden(bundle.file("golden.npz"))
    task = task_for(bundle.manifest, bundle.path)
    for index in range(0, len(golden.raw), 7):
        encoded = task.encode([golden.raw[index]])
        np.testing.assert_array_equal(encoded["input_ids"], golden.sample(index)["input_ids"])
        assert encoded["input_ids"].max() < 98


def test_the_device_takes_it(narrow: tuple[ExportReport, Path], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from aios_edge.cli.main import cli

    config = tmp_path / "agent.toml"
    config.write_text(
        f'[device]\nid = "d"\nprofile = "arm64-gateway"\nstate_dir = "{tmp_path}/state"\n'
        f'[[bundle]]\npath = "{narrow[1]}/arm64-gateway"\n',
        encoding="utf-8",
    )
    done = CliRunner().invoke(cli, ["agent", "check", "--config", str(config), "--json"])
    checks = {c["name"]: c["passed"] for c in json.loads(done.stdout.splitlines()[-1])["activations"][0]["checks"]}
    assert checks["golden"] and checks["golden_raw"], done.output


def test_a_second_run_trains_nothing_again(
    workshop: Path, cache: Path, narrow: tuple[ExportReport, Path], tmp_path: Path
) -> None:
    again = export(workshop, tmp_path / "again", cache, vocabulary=98, more="heads = 2\nffn = 64\n")
    assert not again.stages["built"]
    assert again.profiles["arm64-gateway"].bundle_id == narrow[0].profiles["arm64-gateway"].bundle_id


class AtBundle(SilentProgress):
    """Does something when all is evaluated and nothing is written."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do

    def stage(self, name: str, detail: str = "") -> None:
        if name == "bundle":
            self._do()


def exchanged(words: dict[str, int]) -> dict[str, int]:
    """Two words have each other's number."""
    return {**words, "film": words["plot"], "plot": words["film"]}


def moved(words: dict[str, int]) -> dict[str, int]:
    """The numbers of another choice of pieces: all from one on are one further."""
    order = sorted(words, key=words.__getitem__)
    return {word: number for number, word in enumerate([*order[:5], order[-1], *order[5:-1]])}


@pytest.mark.parametrize("change", [exchanged, moved])
def test_an_own_tokenizer_that_drifts_after_the_evaluation_does_not_ship(
    workshop: Path,
    cache: Path,
    narrow: tuple[ExportReport, Path],
    tmp_path: Path,
    change: Callable[[dict[str, int]], dict[str, int]],
) -> None:
    copied = Path(shutil.copytree(cache, tmp_path / "cache"))
    found = {path: json.loads(path.read_bytes()) for path in copied.glob("tokenizer/*/tokenizer.json")}
    (own,) = (path for path, document in found.items() if len(document["model"]["vocab"]) == 98)

    def drift() -> None:
        document = found[own]
        document["model"]["vocab"] = change(document["model"]["vocab"])
        own.write_text(json.dumps(document), encoding="utf-8")

    recipe, out = workshop / f"{narrow[1].name}.toml", tmp_path / "out"
    with pytest.raises(PromiseBroken, match=r"the tokenizer that would ship splits validation row \d+") as caught:
        exporters.export(recipe, "arm64-gateway", out, cache=copied, progress=AtBundle(drift))
    assert (caught.value.promise, caught.value.exit_code) == ("tokenizer", 3)
    assert not (out / "arm64-gateway").exists()
    again = exporters.export(recipe, "arm64-gateway", out, cache=copied)
    assert again.stages["built"] == (f"tokenizer/{own.parent.name}",)
    assert again.profiles["arm64-gateway"].bundle_id == narrow[0].profiles["arm64-gateway"].bundle_id


def test_neural_compressor_s_candidate_is_of_the_whole_network_only(
    workshop: Path, cache: Path, narrow: tuple[ExportReport, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is preferred; pruned networks are built with the first of the others."""
    monkeypatch.setattr(inc, "_MODULES", ("no_such_module_of_it",))
    path = workshop / "static.toml"
    path.write_text(RECIPE.format(vocabulary=98, more="heads = 2\nffn = 64\n"), encoding="utf-8")
    profile = msgspec.structs.replace(load_profile("arm64-gateway"), precision_preference=("static-s8", "dynamic-s8"))
    report = exporters.export(path, [profile], tmp_path / "out", cache=cache)
    found = report.profiles["arm64-gateway"]
    assert found.chosen == "l2-h2-f64-v98+dynamic-s8-e4"
    assert [c.name for c in found.candidates] == [found.chosen, "dynamic-s8", "inc-static-s8"]
    assert found.candidates[-1].reason.startswith("not available here: ")
    assert report.stages["built"] == ()


def test_texts_without_labels_teach_the_pruned_network(
    workshop: Path, cache: Path, narrow: tuple[ExportReport, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And say which words are in use."""
    counted, quantize_tables = [], tables.quantize_tables
    monkeypatch.setattr(tables, "quantize_tables", lambda *args: counted.append(args[1]) or quantize_tables(*args))
    (workshop / "more.txt").write_text("a fine story it was\nthe plot is dull and cold\n", encoding="utf-8")
    path = workshop / "unlabelled.toml"
    plain = RECIPE.format(vocabulary=98, more="heads = 2\nffn = 64\n")
    path.write_text(plain.replace("[finetune]", 'unlabelled = "more.txt"\n[finetune]'), encoding="utf-8")
    report = exporters.export(path, "arm64-gateway", tmp_path / "out", cache=cache)
    built = {stage.split("/")[0] for stage in report.stages["built"]}
    assert "distill" in built and "finetune" not in built
    assert "more.txt (2 texts without labels)" in report.data
    assert {int(counts["input_ids"][2]) for counts in counted if counts} == {600 + 2}  # a [CLS] in each text


def test_short_trainings_look_for_the_recovery_s_hyper_parameters(
    workshop: Path, cache: Path, narrow: tuple[ExportReport, Path], tmp_path: Path
) -> None:
    path = workshop / "trials.toml"
    plain = RECIPE.format(vocabulary=98, more="heads = 2\nffn = 64\n")
    path.write_text(plain + "[search]\ntrials = 2\n", encoding="utf-8")
    report = exporters.export(path, "arm64-gateway", tmp_path / "out", cache=cache)
    built = [stage.split("/")[0] for stage in report.stages["built"]]
    assert built[0] == "search" and "finetune" not in built
    (shipped,) = (c for c in report.profiles["arm64-gateway"].candidates if c.chosen)
    assert shipped.recovery is not None and len(shipped.recovery.trials) == 2
    (kept,) = (trial for trial in shipped.recovery.trials if trial.kept)
    assert shipped.recovery.settings.learning_rate == kept.learning_rate and shipped.recovery.settings.epochs == 2
    card = open_bundle(tmp_path / "out" / "arm64-gateway").file(MODEL_CARD).read_text(encoding="utf-8")
    assert f"learning rate {kept.learning_rate:.3g}" in card and "of 2 short trainings, the best" in card
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Trials of the recovery" in page and f"Learning rate {kept.learning_rate:.3g}" in page


def test_settings_that_were_found_and_lead_nowhere_name_who_found_them(
    workshop: Path, cache: Path, narrow: tuple[ExportReport, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the long training; in a short one they would not have been found."""
    rates = []

    def distilled(student: object, section: DistillSection, *_: object, **__: object) -> Tuned:
        rates.append(section.learning_rate)
        if section.epochs == 2 or len(rates) == 2:
            raise LossNotFinite("the loss is nan", where="[distill]", remedy="Lower learning_rate")
        return tuned_of("distill", (Epoch(len(rates) / 10, 1.0),), [])

    monkeypatch.setattr(distill, "distill", distilled)
    path = workshop / "nowhere.toml"
    path.write_text(RECIPE.format(vocabulary=98, more="heads = 2\n") + "[search]\ntrials = 3\n", encoding="utf-8")
    with pytest.raises(LossNotFinite, match=r"Leave \[search\] trials out"):
        exporters.export(path, "arm64-gateway", tmp_path / "out", cache=cache)
    assert len(rates) == 4 and rates[3] == rates[2]


def test_a_jetson_gets_a_pruned_network_in_each_of_its_precisions(workshop: Path, cache: Path, tmp_path: Path) -> None:
    path = workshop / "jetson.toml"
    path.write_text(RECIPE.format(vocabulary=98, more="heads = 2\nffn = 64\n"), encoding="utf-8")
    report = exporters.export(path, "jetson-orin-nano", tmp_path / "out", cache=cache)
    found = {candidate.name: candidate for candidate in report.profiles["jetson-orin-nano"].candidates}
    assert [*found] == ["l2-h2-f64-v98+fp16", "l2-h2-f64-v98+qdq-s8-sym", "fp16", "qdq-s8-sym", "fp32"]
    symmetric = found["l2-h2-f64-v98+qdq-s8-sym"]
    assert symmetric.operators["QuantizeLinear"] and symmetric.metrics and symmetric.pruned
    assert report.profiles["jetson-orin-nano"].chosen == "l2-h2-f64-v98+fp16"


def test_without_a_wish_the_search_walks_the_ladder(workshop: Path, cache: Path, tmp_path: Path) -> None:
    report = export(workshop, tmp_path / "ladder", cache)
    names = [candidate.name for candidate in report.profiles["arm64-gateway"].candidates]
    pruned = [name for name in names if "+" in name]
    assert len(pruned) == 2 and names.index(pruned[0]) < names.index("dynamic-s8")
    assert any(stage.startswith("distill/") for stage in report.stages["built"])


def test_where_nothing_can_go_a_warning_says_so(
    workshop: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "LADDER", ())
    report = export(workshop, tmp_path / "out", cache)
    assert "[prune] does nothing for arm64-gateway" in " ".join(report.warnings) and not pruned_of(report)


def test_how_fast_a_pruned_network_may_be_is_told_from_the_whole_one_of_its_precision(
    workshop: Path, cache: Path, narrow: tuple[ExportReport, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though neural-compressor's candidate comes first."""

    def tuned(plan: Plan, whole: Variant, data: Data, stages: Stages, **_: object) -> Made:
        own = replace(plan, precision="fp32")
        return replace(stages.candidate(own.name, own, whole.fp32.folder, data, whole.encoder), plan=plan)

    asked, known_of = [], Trials._known_of
    monkeypatch.setattr(tuned_static, "make", tuned)
    monkeypatch.setattr(Trials, "_known_of", lambda *args: asked.append(args[-1].made.name) or known_of(*args))
    path = workshop / "twin.toml"
    path.write_text(RECIPE.format(vocabulary=98, more="heads = 2\nffn = 64\n"), encoding="utf-8")
    profile = msgspec.structs.replace(load_profile("arm64-gateway"), precision_preference=("static-s8", "dynamic-s8"))
    exporters.export(path, [profile], tmp_path / "out", cache=cache)
    assert asked == ["dynamic-s8"]


def test_how_narrow_it_must_be_is_told_from_the_memory_budget_too(
    workshop: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Whole] = []

    def is_light(rung: Structure, plan: Plan, shape: Shape, budgets: Budgets, whole: Whole) -> bool:
        known.append(whole)
        return rung.layers == 1

    monkeypatch.setattr(trials, "is_light", is_light)
    report = export(workshop, tmp_path / "light", cache, more="[search]\nstructures = 1\n")
    assert [candidate.structure.layers for candidate in pruned_of(report) if candidate.structure] == [1]
    assert known and all(whole.rss_bytes for whole in known)  # of this machine, which runs it as the profile's would


def in_budget(workshop: Path, out: Path, cache: Path, budget: int | None, prune: str, structures: int) -> ExportReport:
    profile = load_profile("arm64-gateway")
    budgets = msgspec.structs.replace(profile.budgets, bundle_size_bytes=budget)
    recipe = RECIPE.replace("vocabulary = {vocabulary}\n{more}", prune).replace("spelling", "lexicon")
    path = workshop / f"{out.name}.toml"
    path.write_text(f"{recipe}[search]\nstructures = {structures}\n", encoding="utf-8")
    return exporters.export(path, [msgspec.structs.replace(profile, budgets=budgets)], out, cache=cache)


def pruned_of(report: ExportReport) -> list[Candidate]:
    return [candidate for candidate in report.profiles["arm64-gateway"].candidates if candidate.structure]


@pytest.mark.long
@pytest.mark.usefixtures("lexicon")
def test_a_small_budget_gets_fewer_bits(workshop: Path, cache: Path, tmp_path: Path) -> None:
    """And where it is too small for those too, fewer pieces."""
    (wide,) = pruned_of(in_budget(workshop, tmp_path / "wide", cache, None, "", 1))
    recipe, tokenizer = load_recipe(workshop / "wide.toml"), (workshop / "lexicon/tokenizer.json").read_bytes()
    profile = load_profile("arm64-gateway")
    pruning = plan_pruning(recipe, locate(recipe), load_data(recipe), tokenizer, [profile])[profile.name]
    assert wide.structure in pruning.rungs and wide.structure and wide.size_bytes
    sizes = {bits: pruning.shape.size_bytes(wide.structure, "dynamic-s8", bits) for bits in (4, 2)}
    assert sizes[2] < wide.size_bytes <= sizes[4] < 1.3 * wide.size_bytes
    for bits, name in {4: "dynamic-s8-e4", 2: "dynamic-s8-e2"}.items():
        room = sizes[bits] + len(tokenizer) + DOCUMENTS_BYTES
        report = in_budget(workshop, tmp_path / name, cache, room, "", 1)
        assert [candidate.name for candidate in pruned_of(report)] == [f"{wide.structure.name}+{name}"]
        assert report.profiles["arm64-gateway"].chosen == pruned_of(report)[0].name
        assert (pruned_of(report)[0].size_bytes or 0) <= sizes[bits]


@pytest.mark.long
@pytest.mark.usefixtures("lexicon")
def test_what_turns_out_too_large_takes_fewer_bits_and_then_fewer_units(
    workshop: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shape, "size_bytes", lambda *_: 0)  # an estimate that foresees nothing
    (wide,) = pruned_of(in_budget(workshop, tmp_path / "wide", cache, None, "", 1))
    assert wide.name.endswith("+dynamic-s8-e4") and wide.structure and wide.size_bytes
    tokenizer = max(path.stat().st_size for path in (cache / "tokenizer").glob("*/tokenizer.json"))
    room = wide.size_bytes + tokenizer + DOCUMENTS_BYTES - 1
    report = in_budget(workshop, tmp_path / "bits", cache, room, "", 1)
    assert [candidate.name.split("+")[1] for candidate in pruned_of(report)] == ["dynamic-s8-e4", "dynamic-s8-e2"]
    assert report.profiles["arm64-gateway"].chosen == f"{wide.structure.name}+dynamic-s8-e2"
    assert not [stage for stage in report.stages["built"] if stage.startswith("distill/")]
    fewer = pruned_of(report)[1].size_bytes
    assert fewer and fewer < wide.size_bytes
    report = in_budget(workshop, tmp_path / "units", cache, room - wide.size_bytes + fewer, "", 2)
    assert [candidate.structure.layers for candidate in pruned_of(report) if candidate.structure] == [1, 1, 2, 2]
    assert report.profiles["arm64-gateway"].chosen == pruned_of(report)[1].name


@pytest.mark.parametrize(
    ("vocabulary", "more", "said"),
    [
        (5, "", r"vocabulary = 5 is less than the \d+ pieces"),
        (0, "heads = 5\n", "heads = 5, but the model has 4"),
        (0, "layers = 3\n", "layers = 3, but the model has 2"),
    ],
)
def test_a_wish_that_the_network_can_t_meet_is_refused_before_the_training(
    workshop: Path, tmp_path: Path, vocabulary: int, more: str, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        export(workshop, tmp_path / "out", tmp_path / "cache", vocabulary=vocabulary, more=more)
    assert not (tmp_path / "cache" / "finetune").exists()


def test_a_vocabulary_that_would_take_the_words_of_a_class_is_refused_before_the_training(
    workshop: Path, tmp_path: Path
) -> None:
    """Five of the six words of each of its texts stay, those that say nothing."""
    shared = "the film was very bright"
    texts = [f"{shared} great"] * 300 + [f"{shared} awful"] * 60
    rows = [f"{text},{'positive' if 'great' in text else 'negative'}" for text in texts]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    document = {
        "model": {"source": str(workshop / "spelling")},
        "data": {"train": "own.csv", "validation": str(workshop / "val.csv"), "test": str(workshop / "test.csv")},
    }
    tokenizer = (workshop / "spelling/tokenizer.json").read_bytes()
    (used,) = vocabulary.used(tokenizer, [texts], 128)
    size = len(vocabulary.least(tokenizer) | set(used)) - 1
    recipe = parse_recipe({**document, "prune": {"vocabulary": size}}, folder=tmp_path)
    with pytest.raises(RecipeError, match=r"keeps \d% of what sets the class 'negative' apart .*'awful'") as caught:
        exporters.export(recipe, "arm64-gateway", tmp_path / "out", cache=tmp_path / "cache")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "cache" / "finetune").exists() and not list((tmp_path / "out").glob("[!.]*"))


def test_prune_is_part_of_what_identifies_a_recipe(workshop: Path) -> None:
    document = {"model": {"source": "tiny"}, "data": {"train": "train.csv"}}
    plain = parse_recipe(document, folder=workshop).document()
    assert plain["prune"] is None
    assert parse_recipe({**document, "prune": {"heads": 2}}, folder=workshop).document()["prune"]["heads"] == 2
