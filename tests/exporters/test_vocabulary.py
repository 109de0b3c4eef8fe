"""A smaller vocabulary: words are cut anew, none becomes unknown, and the model answers the same for what stayed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from aios_edge.errors import RecipeError
from exporters import vocabulary
from exporters.source import load_torch

LETTERS = "abcdef"
PIECES = ("abc", "##def", "fed", "##cba", "cab", "##ab", "bead", "##face")


def tokenizer() -> bytes:
    words = ["[PAD]", "[UNK]", *PIECES, *LETTERS, *(f"##{letter}" for letter in LETTERS), "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    cls, sep = (words.index(name) for name in ("[CLS]", "[SEP]"))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return made.to_str().encode()


def encode(document: bytes, text: str) -> list[str]:
    return list(Tokenizer.from_str(document.decode()).encode(text).tokens)


@settings(max_examples=40)
@given(st.sets(st.sampled_from(range(len(PIECES)))), st.lists(st.text(LETTERS, min_size=1), min_size=1))
def test_no_word_becomes_unknown_and_letters_stay_the_same(gone: set[int], words: list[str]) -> None:
    whole = tokenizer()
    every = range(Tokenizer.from_str(whole.decode()).get_vocab_size())
    kept = tuple(number for number in every if number - 2 not in gone)
    small = vocabulary.reduced(whole, kept)
    tokens = encode(small, " ".join(words))
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "[UNK]" not in tokens
    assert "".join(token.removeprefix("##") for token in tokens[1:-1]) == "".join(words)


def test_ids_are_numbered_anew_everywhere() -> None:
    whole = tokenizer()
    kept = vocabulary.choose(whole, [], len(vocabulary.least(whole)))
    small = Tokenizer.from_str(vocabulary.reduced(whole, kept).decode())
    ids = small.encode("abcdef", "fed").ids
    assert max(ids) < len(kept) == small.get_vocab_size()
    assert small.id_to_token(ids[0]) == "[CLS]"
    assert small.token_to_id("[SEP]") == len(kept) - 1


def test_what_training_uses_is_kept_first_then_the_most_frequent() -> None:
    whole = tokenizer()
    counts = vocabulary.used(whole, [["bead bead"], ["cabface"]], 32)
    vocab = json.loads(whole)["model"]["vocab"]
    assert counts[0] == Counter({vocab["bead"]: 2})
    least = len(vocabulary.least(whole))
    kept = vocabulary.choose(whole, counts, least + 3)
    assert {vocab["bead"], vocab["cab"], vocab["##face"]} <= set(kept) and vocab["abc"] not in kept
    assert vocab["abc"] in vocabulary.choose(whole, counts, least + 4)


def test_what_is_cut_off_is_not_counted() -> None:
    """As the encoder cuts: [CLS] and [SEP] take two or three of the places."""
    whole = tokenizer()
    vocab = json.loads(whole)["model"]["vocab"]
    counts = vocabulary.used(whole, [["bead fed cab", "fed"], [("bead fed", "cab abc cab")], []], 4)
    single, pair = Tokenizer.from_str(whole.decode()), ("bead fed", "cab abc cab")
    single.enable_truncation(4)
    around = {vocab["[CLS]"], vocab["[SEP]"]}
    assert counts[0] == Counter({vocab["bead"]: 1, vocab["fed"]: 2})
    assert counts[1] == Counter(number for number in single.encode(*pair).ids if number not in around)
    assert counts[2] == Counter()


def test_counting_holds_a_few_texts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(list[str]):
        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            taken.append(len(found) if isinstance(at, slice) else 1)
            return found

    whole, texts, taken = tokenizer(), ["bead fed", "cab", "abc fed", "cabface", "bead"], list[int]()
    wanted = vocabulary.used(whole, [texts], 32)
    monkeypatch.setattr(vocabulary, "_TEXTS_AT_ONCE", 2)
    assert vocabulary.used(whole, [Watched(texts)], 32) == wanted
    assert taken[-3:] == [2, 2, 1] and max(taken) == 2


def test_a_piece_whose_letters_have_none_of_their_own_stays() -> None:
    document = json.loads(tokenizer())
    number = document["model"]["vocab"].pop("##f")
    document["model"]["vocab"]["##x"] = number
    assert document["model"]["vocab"]["##def"] in vocabulary.least(json.dumps(document).encode())


def test_a_vocabulary_that_is_too_small_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"vocabulary = 3 is less than the \d+ pieces"):
        vocabulary.choose(tokenizer(), [], 3)


def test_a_class_that_would_lose_its_words_is_named_with_them() -> None:
    """However many words it shares with the others; those tell nothing of it."""
    whole = tokenizer()
    counts, names = vocabulary.used(whole, [["fed abc bead"] * 2, ["fed abc cab"]], 32), ("beads", "cabs")
    every = vocabulary.choose(whole, counts, len(vocabulary.least(whole)) + 4)
    vocabulary.check_classes(whole, every, counts, names)
    kept = vocabulary.choose(whole, counts, len(every) - 1)  # the least frequent one: two of its three pieces stay
    with pytest.raises(RecipeError, match=r"keeps 0% of what sets the class 'cabs' apart .*; it would lose 'cab'"):
        vocabulary.check_classes(whole, kept, counts, names)


def test_a_word_counts_for_a_class_as_far_as_others_do_without_it() -> None:
    whole = tokenizer()
    # "fed" is in every row of three of the four classes, "bead" and "cab" are one's own; the last one is ten times as
    # large, which makes nothing of its words.
    texts = [["fed bead bead"], ["fed cab"], ["fed abc"], ["abc"] * 10]
    counts, vocab = vocabulary.used(whole, texts, 32), json.loads(whole)["model"]["vocab"]
    names = ("beads", "cabs", "both", "abc")

    def check(*gone: str) -> None:
        stay = [number for piece, number in vocab.items() if piece not in gone]
        vocabulary.check_classes(whole, stay, counts, names)

    check("fed")
    vocabulary.check_classes(whole, (), vocabulary.used(whole, [["fed cab"]] * 3, 32), ("a", "b", "c"))
    with pytest.raises(RecipeError, match=r"keeps \d% of what sets the class 'beads' apart .*'bead', 'fed'"):
        check("fed", "bead")
    with pytest.raises(RecipeError, match="'abc'"):
        check("abc")


def test_another_kind_of_tokenizer_is_refused() -> None:
    other = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str().encode()
    assert not vocabulary.can_prune(other) and vocabulary.can_prune(tokenizer())
    with pytest.raises(RecipeError, match="WordLevel tokenizer's vocabulary can't be pruned"):
        vocabulary.least(other)


@pytest.mark.export
def test_the_model_answers_the_same_with_the_pieces_that_stay(workshop: Path) -> None:
    import torch

    model = load_torch(workshop / "tiny", labels=("a", "b")).eval()
    kept = (0, 1, 2, 3, 7, 9, 20)
    with torch.inference_mode():
        before = model(input_ids=torch.tensor([[2, 7, 20, 3]])).logits.numpy()
        vocabulary.slice_embeddings(model, kept)
        after = model(input_ids=torch.tensor([[2, 4, 6, 3]])).logits.numpy()
    np.testing.assert_allclose(before, after, atol=1e-6)
    assert model.config.vocab_size == 7 and model.config.pad_token_id == 0
