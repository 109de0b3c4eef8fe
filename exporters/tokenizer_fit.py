"""Whether tokenizer, model and texts belong together; before the training, because after it nothing shows it.

A tokenizer of another vocabulary gives ids that the model takes: it learns a little all the same, and nobody knows why
it isn't more. What can be seen is that special tokens are missing or have another id than the model's configuration
says, that the same folder has two vocabularies, and that texts come out as unknown tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aios_edge.errors import DataError, RecipeError
from exporters.encode import Sample
from exporters.source import Source

#: A tenth of the tokens unknown is worth a warning; texts of which nothing is left are a mistake when nearly all are.
UNKNOWN_WARNED, MUTE_REFUSED = 0.1, 0.9
#: A few words put into a vocabulary's unused places are no other vocabulary.
MOVED_ALLOWED = 0.01
_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "bos_token", "eos_token", "mask_token")
_NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json")
#: config.json nearly always has the padding's number, and nearly everybody calls it one of these.
_USUAL_PADS = ("[PAD]", "<pad>")
_REMEDY = "Give the tokenizer that the model was trained with"


@dataclass(frozen=True)
class Coverage:
    """How much of some texts the tokenizer knows: shares of their tokens that are unknown, and of texts without any
    known token (``mute``); special tokens don't count."""

    unknown: float
    mute: float


def check_special_tokens(source: Source, tokenizer: Path) -> None:
    """Raise :class:`RecipeError` where special tokens are missing, have another number than the source says, or where
    a text doesn't begin with the one that the model reads."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    vocabulary = loaded.get_vocab(with_added_tokens=True)

    def refuse(what: str) -> RecipeError:
        return RecipeError(what, where=source.name, remedy=_REMEDY)

    named = _special_tokens(source.folder, vocabulary)
    for role, token in named.items():
        if role != "mask_token" and token not in vocabulary:  # nobody masks when classifying
            raise refuse(f"the tokenizer has no '{token}', which the source's files name as its {role}")
        for wanted, file in _numbers(source, role, token):
            if token in vocabulary and vocabulary[token] != wanted:
                raise refuse(f"'{token}' is number {vocabulary[token]} of the tokenizer and {wanted} in {file}")
    empty = loaded.encode("")
    for number, token in zip(empty.ids, empty.tokens, strict=True):
        if vocabulary.get(token) != number:
            raise refuse(f"the tokenizer adds '{token}' as number {number}, its vocabulary has {vocabulary.get(token)}")
    first = named.get("cls_token")
    if first is not None and empty.tokens[:1] != [first]:
        raise refuse(f"the tokenizer doesn't begin a text with '{first}', which the classifier reads")
    _check_word_list(source, loaded)


def coverage(samples: Sequence[Sample], tokenizer: Path) -> Coverage:
    """Of encoded texts. Tokenizers without an unknown token (bytes) know everything."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    unknown = _unknown_id(json.loads(tokenizer.read_text(encoding="utf-8")), loaded)
    special = [number for number, token in loaded.get_added_tokens_decoder().items() if token.special]
    special += loaded.encode("").ids  # what the template adds, marked as special or not
    special = [number for number in special if number != unknown]
    count = lost = mute = 0
    for sample in samples:
        ids = sample["input_ids"][0]
        ids = ids[~np.isin(ids, special)]
        bad = int((ids == unknown).sum()) if unknown is not None else 0
        count, lost, mute = count + len(ids), lost + bad, mute + (bad == len(ids))
    return Coverage(unknown=lost / max(1, count), mute=mute / max(1, len(samples)))


def check_coverage(found: Coverage, source: Source) -> None:
    """Raise :class:`DataError` where nothing is left of nearly all texts."""
    if found.mute >= MUTE_REFUSED:
        what = f"its tokenizer knows no token of {found.mute:.1%} of the validation texts"
        remedy = f"{_REMEDY}, or texts in a language that it was made for"
        raise DataError(what, where=source.name, remedy=remedy)


def _check_word_list(source: Source, loaded: Any) -> None:
    """Two vocabularies in one folder: transformers may have trained with either."""
    path = source.folder / "vocab.txt"
    if not path.is_file() or type(loaded.model).__name__ != "WordPiece":
        return
    with path.open(encoding="utf-8") as stream:
        words = {line.rstrip("\n"): number for number, line in enumerate(stream)}
    moved = [word for word, number in words.items() if loaded.token_to_id(word) != number]
    if len(moved) > MOVED_ALLOWED * len(words):
        what = (
            f"tokenizer.json and vocab.txt differ in {len(moved)} of {len(words)} tokens"
            f" ('{moved[0]}' is number {loaded.token_to_id(moved[0])} in one and {words[moved[0]]} in the other)"
        )
        raise RecipeError(what, where=source.name, remedy=_REMEDY)


def _special_tokens(folder: Path, vocabulary: dict[str, int]) -> dict[str, str]:
    """Role -> token, as the source's own files name them."""
    found: dict[str, str] = {}
    if pads := [token for token in _USUAL_PADS if token in vocabulary]:
        found["pad_token"] = pads[0]
    for name in _NAMED_IN:
        document = _json_of(folder / name)
        for role in _ROLES:
            value = document.get(role)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                found[role] = token
    return found


def _numbers(source: Source, role: str, token: str) -> list[tuple[int, str]]:
    """Which number the source's files give a special token, and the file."""
    found = [(source.config.get(f"{role}_id"), "config.json")]
    added = _json_of(source.folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(added, dict):
        named = (number for number, entry in added.items() if isinstance(entry, dict) and entry.get("content") == token)
        found += [(int(number), "tokenizer_config.json") for number in named if number.isdecimal()]
    return [(number, file) for number, file in found if isinstance(number, int)]


def _unknown_id(document: dict[str, Any], loaded: Any) -> int | None:
    model = document["model"]
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    number = loaded.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return None if number is None else int(number)


def _json_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(
            f"{path.name} is not JSON ({error})", where=path.parent.name, remedy="Save it again"
        ) from error
    return document if isinstance(document, dict) else {}
