"""A smaller vocabulary: the tokenizer keeps some of its pieces and cuts every other word into those.

WordPiece takes the longest piece that fits, so a word whose piece is gone falls apart into smaller ones that stay; as
every single character stays, no word becomes unknown that wasn't before. Tokenizer and embedding table change together.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from aios_edge.errors import RecipeError
from aios_edge.golden import RawInput

#: Share of what sets a class apart in the training rows that must stay.
LEAST_KEPT = 0.5
_SHOWN = 5
_TEXTS_AT_ONCE = 1024  # bounds the memory that counting takes
_CONTINUES = "##"


def can_prune(tokenizer: bytes) -> bool:
    """Whether the tokenizer cuts words as WordPiece does."""
    return bool(json.loads(tokenizer)["model"].get("type") == "WordPiece")


def used(tokenizer: bytes, groups: Sequence[Sequence[RawInput]], max_length: int) -> list[Counter[int]]:
    """How often each piece occurs in each group of texts, in what is read of them: ``max_length`` tokens, those that
    every text is put between included, but not counted. A pair's two texts are one."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer.decode())
    made.no_padding()
    counts = []
    for texts in groups:
        found: Counter[int] = Counter()
        pair = bool(texts) and not isinstance(texts[0], str)
        made.enable_truncation(max_length - made.num_special_tokens_to_add(pair))
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = [text if isinstance(text, str) else tuple(text) for text in texts[start : start + _TEXTS_AT_ONCE]]
            for encoding in made.encode_batch(some, add_special_tokens=False):
                found.update(encoding.ids)
        counts.append(found)
    return counts


def in_use(tokenizer: bytes, counts: Iterable[Counter[int]]) -> int:
    """How many pieces a model meets in these texts, those that every text is put between included."""
    from tokenizers import Tokenizer

    around = Tokenizer.from_str(tokenizer.decode()).encode("").ids
    return len(set(around).union(*counts))


def least(tokenizer: bytes) -> set[int]:
    """Ids that can't go: special ones, single characters, and pieces with a character that has no piece of its own.

    Raises :class:`RecipeError` for another kind of tokenizer than WordPiece.
    """
    document = json.loads(tokenizer)
    vocabulary = _word_pieces(document)
    stay = {entry["id"] for entry in document.get("added_tokens", ())}
    stay.add(vocabulary[document["model"]["unk_token"]])
    for piece, number in vocabulary.items():
        text = piece.removeprefix(_CONTINUES)
        inner = piece.startswith(_CONTINUES)
        alone = [
            f"{_CONTINUES}{character}" if inner or position else character for position, character in enumerate(text)
        ]
        if len(text) == 1 or not all(character in vocabulary for character in alone):
            stay.add(number)
    return stay


def choose(tokenizer: bytes, counts: Iterable[Counter[int]], size: int) -> tuple[int, ...]:
    """``size`` ids in their order: those that must stay, then by use in the texts that were counted, then by rank.

    A vocabulary is written with its most frequent pieces first, so rank stands for use elsewhere. Raises
    :class:`RecipeError` where ``size`` is too small for what must stay.
    """
    must = least(tokenizer)
    if size < len(must):
        what = f"vocabulary = {size} is less than the {len(must)} pieces that every text may need"
        raise RecipeError(what, where="[prune]", remedy=f"Give at least {len(must)}, better some thousands more")
    total: Counter[int] = Counter()
    for count in counts:
        total.update(count)
    ranked = sorted(_word_pieces(json.loads(tokenizer)).values(), key=lambda number: (-total[number], number))
    chosen = [*must, *(number for number in ranked if number not in must)][:size]
    return tuple(sorted(chosen))


def check_classes(
    tokenizer: bytes,
    kept: Sequence[int],
    by_class: Sequence[Counter[int]],
    names: Sequence[str],
) -> None:
    """Raise :class:`RecipeError` naming the class that would lose most of the words that set it apart, and some of
    them. Words that occur in all classes alike count for nothing. Pure."""
    stay = set(kept)
    weights = _markings(by_class)
    marks = [{number: times * weights[number] for number, times in found.items()} for found in by_class]
    shares = [_share(found, stay) for found in marks]
    worst = min(range(len(names)), key=lambda index: shares[index])
    if shares[worst] < LEAST_KEPT:
        gone = sorted((number for number in marks[worst] if number not in stay), key=lambda n: (-marks[worst][n], n))
        pieces = {number: piece for piece, number in _word_pieces(json.loads(tokenizer)).items()}
        shown = ", ".join(f"'{pieces[number]}'" for number in gone[:_SHOWN]) + (", …" if len(gone) > _SHOWN else "")
        what = (
            f"a vocabulary of {len(kept)} pieces keeps {shares[worst]:.0%} of what sets the class '{names[worst]}' "
            f"apart (at least {LEAST_KEPT:.0%}); it would lose {shown}"
        )
        raise RecipeError(what, where="[prune]", remedy="Raise vocabulary, or leave it out to keep what is used")


def _markings(by_class: Sequence[Counter[int]]) -> dict[int, float]:
    """How much each piece tells of the class: 1 where it occurs in one only, 0 where it is as frequent in all (one less
    the entropy of the class, of equally large classes, as a share of the largest)."""
    lengths = [found.total() for found in by_class]
    most = math.log(max(2, sum(length > 0 for length in lengths)))
    weights = {}
    for number in set().union(*by_class):
        rates = [found[number] / length for found, length in zip(by_class, lengths, strict=True) if found[number]]
        total = sum(rates)
        entropy = sum(rate / total * math.log(total / rate) for rate in rates)
        weights[number] = round(1 - entropy / most, 6)  # what is as frequent in all classes must count for nothing
    return weights


def _share(marks: Mapping[int, float], stay: Set[int]) -> float:
    whole = sum(marks.values())
    return sum(mark for number, mark in marks.items() if number in stay) / whole if whole else 1.0


def reduced(tokenizer: bytes, kept: Sequence[int]) -> bytes:
    """tokenizer.json with the ``kept`` ids only, numbered anew in their order."""
    document = json.loads(tokenizer)
    number = {old: new for new, old in enumerate(kept)}
    vocabulary = _word_pieces(document)
    document["model"]["vocab"] = {piece: number[old] for piece, old in vocabulary.items() if old in number}
    for entry in document.get("added_tokens", ()):
        entry["id"] = number[entry["id"]]
    _renumber(document.get("post_processor"), document["model"]["vocab"])
    return _written(document)


def beside_pieces(tokenizer: bytes) -> int:
    """Bytes of tokenizer.json that stay whatever pieces go."""
    document = json.loads(tokenizer)
    document["model"].pop("vocab", None)
    return len(_written(document))


def slice_embeddings(model: Any, kept: Sequence[int]) -> None:
    """The same for the model, in place: its table [pieces, width], and the ids that its configuration names."""
    import torch

    old = model.get_input_embeddings()
    table = torch.nn.Embedding(len(kept), old.embedding_dim)
    table.weight = torch.nn.Parameter(old.weight.detach()[torch.tensor(list(kept))].clone())
    number = {before: after for after, before in enumerate(kept)}
    if old.padding_idx is not None:
        table.padding_idx = number[old.padding_idx]
    model.set_input_embeddings(table)
    model.config.vocab_size = len(kept)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        before = getattr(model.config, name, None)
        if before is not None:
            setattr(model.config, name, number.get(before))


def _written(document: dict[str, Any]) -> bytes:
    """Without blanks: they would be a tenth of what a device stores."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _word_pieces(document: dict[str, Any]) -> dict[str, int]:
    model = document["model"]
    kind = model.get("type")
    if kind != "WordPiece":
        what = f"a {kind} tokenizer's vocabulary can't be pruned"
        raise RecipeError(what, where="[prune]", remedy="Use vocabulary = 0 to leave it as it is")
    found: dict[str, int] = model["vocab"]
    return found


def _renumber(processor: dict[str, Any] | None, vocabulary: dict[str, int]) -> None:
    """The post-processor names special tokens with their ids: a template, BERT's pairs, or a sequence of such."""
    if not processor:
        return
    for entry in processor.get("processors", ()):
        _renumber(entry, vocabulary)
    special = processor.get("special_tokens")
    for entry in special.values() if isinstance(special, dict) else ():
        entry["ids"] = [vocabulary[token] for token in entry["tokens"]]
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name] = [processor[name][0], vocabulary[processor[name][0]]]
