"""A smaller vocabulary: the tokenizer keeps some of its pieces and cuts every other word into those.

WordPiece takes the longest piece that fits, so a word whose piece is gone falls apart into smaller ones that stay; as
every single character stays, no word becomes unknown that wasn't before. Tokenizer and embedding table change together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aios_edge.errors import RecipeError
from aios_edge.golden import RawInput

#: Share of a class's pieces in the training rows that must stay whole.
LEAST_KEPT = 0.5
_CONTINUES = "##"


def can_prune(tokenizer: bytes) -> bool:
    """Whether the tokenizer cuts words as WordPiece does."""
    return bool(json.loads(tokenizer)["model"].get("type") == "WordPiece")


def used(tokenizer: bytes, texts: Sequence[RawInput]) -> list[Counter[int]]:
    """How often each piece occurs in each text; a pair's two texts are one."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer.decode())
    pairs = [text if isinstance(text, str) else tuple(text) for text in texts]
    return [Counter(encoding.ids) for encoding in made.encode_batch(pairs, add_special_tokens=False)]


def in_use(tokenizer: bytes, counts: Sequence[Counter[int]]) -> int:
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


def choose(tokenizer: bytes, counts: Sequence[Counter[int]], size: int) -> tuple[int, ...]:
    """``size`` ids in their order: those that must stay, then by use in the training rows, then by rank.

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
    kept: Sequence[int], counts: Sequence[Counter[int]], labels: Sequence[int], names: Sequence[str]
) -> None:
    """Raise :class:`RecipeError` naming the class that would lose most of its words' pieces."""
    stay = set(kept)
    whole, total = [0] * len(names), [0] * len(names)
    for count, label in zip(counts, labels, strict=True):
        whole[label] += sum(times for number, times in count.items() if number in stay)
        total[label] += sum(count.values())
    shares = [a / b if b else 1.0 for a, b in zip(whole, total, strict=True)]
    worst = min(range(len(names)), key=lambda index: shares[index])
    if shares[worst] < LEAST_KEPT:
        what = (
            f"a vocabulary of {len(kept)} pieces keeps {shares[worst]:.0%} of the pieces that the class "
            f"'{names[worst]}' is written with (at least {LEAST_KEPT:.0%})"
        )
        raise RecipeError(what, where="[prune]", remedy="Raise vocabulary, or leave it out to keep what is used")


def reduced(tokenizer: bytes, kept: Sequence[int]) -> bytes:
    """tokenizer.json with the ``kept`` ids only, numbered anew in their order."""
    document = json.loads(tokenizer)
    number = {old: new for new, old in enumerate(kept)}
    vocabulary = _word_pieces(document)
    document["model"]["vocab"] = {piece: number[old] for piece, old in vocabulary.items() if old in number}
    for entry in document.get("added_tokens", ()):
        entry["id"] = number[entry["id"]]
    _renumber(document.get("post_processor"), document["model"]["vocab"])
    return json.dumps(document, ensure_ascii=False).encode()


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
