"""The networks that candidates are built from: the fine-tuned one, and smaller ones pruned out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aios_edge.profile import DeviceProfile
from exporters import distill, encode, finetune, prune, recovery_search, source, structure, training, vocabulary
from exporters.bundle import DOCUMENTS_BYTES, Identity, text_input
from exporters.cache import code_digest
from exporters.data import Data, Labelled
from exporters.encode import TOKENIZER, Encoder
from exporters.evaluate import Logits, check_reference
from exporters.finetune import Tuned
from exporters.plans import Plan, of_pruned, plans_for
from exporters.prune import Importance
from exporters.recipe import DistillSection, ExportRecipe, PruneSection
from exporters.recovery_search import Chosen
from exporters.source import Source
from exporters.stages import Made, Stages
from exporters.structure import Shape, Structure

#: Training rows that importance is measured on.
_IMPORTANCE_ROWS = 1024
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network in torch and ONNX. ``structure`` None: the whole one. ``tokenizer`` and ``trained`` are folders, the
    latter's ``model`` is the network in torch.

    ``recovery``: what a pruned one was trained with. ``fp32``: as converted; ``reference``: its answers to the
    validation rows; ``parity``: with torch.
    """

    structure: Structure | None
    identity: Identity
    encoder: Encoder
    tokenizer: Path
    tuned: Tuned
    trained: Path
    recovery: Chosen | None
    fp32: Made
    reference: Logits
    parity: float

    def candidate(self, plan: str) -> str:
        """A candidate's name."""
        return plan if self.structure is None else self.structure.candidate(plan)

    @property
    def tokenizer_bytes(self) -> int:
        """Size of tokenizer.json."""
        return (self.tokenizer / TOKENIZER).stat().st_size


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What a recipe's ``[prune]`` and a profile's budget allow: the network's shape, the ids of the ``pieces`` that
    stay of its vocabulary, the smaller networks to try, mildest first, and what may be built of each, largest first."""

    shape: Shape
    pieces: tuple[int, ...]
    rungs: tuple[Structure, ...]
    plans: tuple[Plan, ...]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The names of all that may come of it."""
        return tuple(rung.candidate(plan.name) for rung in self.rungs for plan in self.plans)


def plan_pruning(
    recipe: ExportRecipe, origin: Source, data: Data, tokenizer: bytes, profiles: Sequence[DeviceProfile]
) -> dict[str, Pruning]:
    """Read the wish and check it against source and data, before anything is trained. By profile, whatever others are
    exported with it; empty without a wish.

    Raises :class:`RecipeError` for more than there is, for an architecture or tokenizer that can't be pruned, and for a
    vocabulary that would take a class's words; :class:`MissingExtra` for ``search.trials`` without Optuna.
    """
    section = recipe.prune
    if section is None:
        return {}
    if recipe.search.trials:
        recovery_search.check_available()
    shape = prune.shape_of(source.load_torch(origin.folder, labels=data.labels))
    counts = vocabulary.used(tokenizer, data.by_class, min(recipe.finetune.max_length, origin.max_length))
    shape = replace(
        shape,
        in_use=vocabulary.in_use(tokenizer, counts),
        tokenizer=len(tokenizer),
        beside_pieces=vocabulary.beside_pieces(tokenizer),
    )
    whole = structure.ladder(shape, shape.whole.vocabulary)
    if section.explicit:
        whole = (structure.asked_for(section, shape, shape.whole.vocabulary),)
    found = {}
    for profile in profiles:
        plans, size = of_pruned(plans_for(profile)), profile.budgets.bundle_size_bytes
        fit = shape.whole.vocabulary
        if size is not None and plans and vocabulary.can_prune(tokenizer):
            room, first = size - DOCUMENTS_BYTES, whole[structure.beginning(whole)] if whole else shape.whole
            fit = max(shape.pieces_within(room, first, plan.precision, plan.rare_row_bits) for plan in plans)
        pieces = _pieces(section, fit, shape, data, tokenizer, counts)
        rungs = tuple(replace(rung, vocabulary=len(pieces)) for rung in whole)
        found[profile.name] = Pruning(shape=shape, pieces=pieces, rungs=rungs, plans=plans)
    return found


def _pieces(
    section: PruneSection, fit: int, shape: Shape, data: Data, tokenizer: bytes, counts: Sequence[Counter[int]]
) -> tuple[int, ...]:
    """All, unless the recipe says otherwise or only so many ``fit`` the budget: words that training didn't see lose by
    it for good. ``counts``: of each class's training texts, then of others."""
    asked, whole = section.vocabulary, shape.whole.vocabulary
    if asked == 0 or (asked is None and fit >= whole):
        return tuple(range(whole))
    if asked is None:
        asked = max(fit, len(vocabulary.least(tokenizer).union(*counts)))
    kept = vocabulary.choose(tokenizer, counts, min(asked, whole))
    vocabulary.check_classes(tokenizer, kept, counts[: len(data.labels)], data.labels)
    return kept


class Variants:
    """Makes variants; what is already made comes from the cache."""

    def __init__(self, stages: Stages, data: Data, identity: Identity, tokenizer: Path, tuned: Path) -> None:
        self._stages, self._data, self._identity = stages, data, identity
        self._tokenizer, self._tuned = tokenizer, tuned
        self._recipe = stages.recipe

    @cached_property
    def whole(self) -> Variant:
        """The fine-tuned network."""
        return self._variant(None, self._identity, self._tokenizer, self._tuned)

    def pruned(self, wanted: Structure, pruning: Pruning) -> Variant:
        """A smaller network, pruned out of the whole one and recovered by distillation."""
        kept = pruning.pieces
        own = len(kept) < pruning.shape.whole.vocabulary
        tokenizer = self._own_tokenizer(kept) if own else self._tokenizer
        identity = self._identity
        if own:
            text = identity.text
            pad = kept.index(text.pad_id) if text.pad_id in kept else 0
            identity = replace(identity, text=text_input(max_length=text.max_length, pad_id=pad, pair=text.pair))
        encoder = self._stages.encoder(identity, tokenizer)
        data, tune = self._data, self._recipe.finetune
        lesson_rows, found_folder = self._lesson_rows(), self._importance()
        ingredients = {
            "finetune": self._tuned.name,
            "structure": msgspec.to_builtins(wanted),
            "pieces": [tokenizer.name, kept if own else None],
            "seed": tune.seed,
            "importance": found_folder.name,
            "lesson": lesson_rows.digest(),
            "validation": data.validation.digest(),
            "tools": self._stages.tools,
            "code": code_digest(distill, finetune, training, prune, vocabulary, source, encode),
        }

        def recover(section: DistillSection, work: Path) -> Tuned:
            found = Importance.load(found_folder)
            student = source.load_torch(self._tuned / "model")
            prune.prune(student, wanted, found)
            if own:
                vocabulary.slice_embeddings(student, kept)
            teacher = distill.Teacher(
                model=source.load_torch(self._tuned / "model"),
                encoder=self.whole.encoder,
                layers=prune.most_important(found.layers, wanted.layers),
                same_pieces=not own,
            )
            return distill.distill(
                student,
                section,
                teacher,
                lesson_rows,
                data.validation,
                encoder,
                work,
                self._stages.progress,
                seed=tune.seed,
                threads=tune.threads,
            )

        chosen = self._searched(wanted, ingredients, recover)

        def build(work: Path) -> None:
            self._stages.progress.stage("distill", f"{wanted.name}, {len(lesson_rows)} rows")
            try:
                recovered = recover(chosen.settings, work)
            except training.LossNotFinite as error:
                if chosen.settings != self._recipe.distill:  # nobody wrote them
                    error.remedy = "Leave [search] trials out: it found these settings, by shorter trainings"
                raise
            finetune.save_tuned(recovered, work)

        own_section = {"distill": msgspec.to_builtins(chosen.settings)}
        folder = self._stages.produce("distill", {**ingredients, **own_section}, build, resumes=True)
        return self._variant(wanted, identity, tokenizer, folder, chosen)

    def _searched(
        self, wanted: Structure, ingredients: dict[str, Any], recover: Callable[[DistillSection, Path], Tuned]
    ) -> Chosen:
        """The hyper-parameters of a recovery: the recipe's, or what short trainings found better."""
        base, trials = self._recipe.distill, self._recipe.search.trials
        if not trials:
            return Chosen(settings=base)

        def trial(section: DistillSection, folder: Path) -> float:
            folder.mkdir(exist_ok=True)
            return max(recover(section, folder).validation_accuracy)

        def build(work: Path) -> None:
            progress = self._stages.progress
            progress.stage("search", f"{wanted.name}, {trials} short trainings")
            recovery_search.search(base, trials, trial, work, progress, seed=self._recipe.finetune.seed)

        asked = {"base": msgspec.to_builtins(base), "trials": trials, "search": code_digest(recovery_search)}
        return recovery_search.load_found(self._stages.produce("search", {**ingredients, **asked}, build, resumes=True))

    def _variant(
        self,
        wanted: Structure | None,
        identity: Identity,
        tokenizer: Path,
        tuned: Path,
        recovery: Chosen | None = None,
    ) -> Variant:
        stages, rows = self._stages, self._data.validation
        encoder = stages.encoder(identity, tokenizer)
        converted, parity = stages.convert(tuned, identity, encoder.samples(rows.texts), encoder)
        fp32 = stages.baseline(converted)
        reference = stages.answers(fp32, "validation", rows, encoder)
        check_reference(reference, len(rows), len(self._data.labels))
        return Variant(
            structure=wanted,
            identity=identity,
            encoder=encoder,
            tokenizer=tokenizer,
            tuned=finetune.load_tuned(tuned),
            trained=tuned,
            recovery=recovery,
            fp32=fp32,
            reference=reference,
            parity=parity,
        )

    def _own_tokenizer(self, kept: tuple[int, ...]) -> Path:
        ingredients = {"whole": self._tokenizer.name, "pieces": kept, "code": code_digest(vocabulary)}

        def build(work: Path) -> None:
            whole = (self._tokenizer / TOKENIZER).read_bytes()
            (work / TOKENIZER).write_bytes(vocabulary.reduced(whole, kept))

        return self._stages.produce("tokenizer", ingredients, build)

    def _lesson_rows(self) -> Labelled:
        rows, more = self._data.train, self._data.unlabelled
        return Labelled(texts=rows.texts + more, labels=rows.labels + (distill.NO_LABEL,) * len(more))

    def _importance(self) -> Path:
        rows = self._importance_rows()
        ingredients = {
            "finetune": self._tuned.name,
            "tools": self._stages.tools,
            "code": code_digest(prune, source, encode),
            "rows": [rows.digest(), _BATCH],
        }

        def build(work: Path) -> None:
            import torch

            self._stages.progress.stage("importance", f"{len(rows)} rows")
            self._prepare()
            model = source.load_torch(self._tuned / "model")
            prune.importance(model, self._batches(rows), torch.nn.functional.cross_entropy).save(work)

        return self._stages.produce("importance", ingredients, build)

    def _prepare(self) -> None:
        tune = self._recipe.finetune
        training.prepare(seed=tune.seed, threads=tune.threads)

    def _importance_rows(self) -> Labelled:
        """Some training rows, picked at random but always the same."""
        rows = self._data.train
        picked = np.random.default_rng(0).permutation(len(rows))[:_IMPORTANCE_ROWS]
        return Labelled(tuple(rows.texts[row] for row in picked), tuple(rows.labels[row] for row in picked))

    def _batches(self, rows: Labelled) -> Iterator[tuple[dict[str, Any], Any]]:
        import torch

        encoder = self.whole.encoder
        for start in range(0, len(rows), _BATCH):
            some = slice(start, start + _BATCH)
            yield training.tensors(encoder.pad(encoder.samples(rows.texts[some]))), torch.tensor(rows.labels[some])
