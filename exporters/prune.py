"""Structured pruning: attention heads, feed forward neurons and layers leave the tensors, the least important first.

Neurons and layers go by what the loss would change, to first order, if they gave nothing: activation x gradient summed
over tokens, its magnitude summed over rows (Molchanov et al., "Importance Estimation for Neural Network Pruning",
2019). Heads go one after the other, each time the one that the others stand in for best, by second-order statistics
(Hassibi and Stork, "Optimal Brain Surgeon", 1993; whole heads at once as in ZipLM, Kurtic et al., 2023). Every layer
keeps as many of both as the others, so that a pruned model is an ordinary configuration of its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aios_edge.errors import RecipeError
from exporters.finetune import encoder_layers
from exporters.structure import Shape, Structure

Figures = NDArray[np.float64]
Moments = NDArray[np.float32]
#: Keeps the least squares solvable, as a share of the mean moment.
_RIDGE = 1e-4


@dataclass(frozen=True)
class Importance:
    """``heads`` [layers, heads] and ``neurons`` [layers, F]: what would be lost with each.

    ``joined_moments`` [H + 1, H + 1] and ``neuron_moments`` [F + 1, F + 1] of each layer: mean products over tokens of
    what the heads, the neurons give, and of a constant 1, with each other; they say how well the units that stay can
    stand in for those that go. A layer each and in float32, because those of a large model take gigabytes at once.
    """

    heads: Figures
    neurons: Figures
    joined_moments: Sequence[Moments]
    neuron_moments: Sequence[Moments]

    def save(self, folder: Path) -> None:
        """Write ``importance.npz``, with an entry for each layer's moments."""
        arrays: dict[str, Any] = {"heads": self.heads, "neurons": self.neurons}
        for layer, (joined, neurons) in enumerate(zip(self.joined_moments, self.neuron_moments, strict=True)):
            arrays |= {f"joined_moments_{layer}": joined, f"neuron_moments_{layer}": neurons}
        np.savez(folder / "importance.npz", **arrays)

    @staticmethod
    def load(folder: Path) -> Importance:
        """Read ``importance.npz``."""
        with np.load(folder / "importance.npz", allow_pickle=False) as arrays:
            layers = range(len(arrays["heads"]))
            return Importance(
                heads=arrays["heads"],
                neurons=arrays["neurons"],
                joined_moments=[arrays[f"joined_moments_{layer}"] for layer in layers],
                neuron_moments=[arrays[f"neuron_moments_{layer}"] for layer in layers],
            )

    @property
    def layers(self) -> Figures:
        """[layers]: what would be lost with all of a layer's units."""
        found: Figures = self.heads.sum(axis=1) + self.neurons.sum(axis=1)
        return found


@dataclass(frozen=True)
class _Block:
    """One encoder layer: who can drop heads, the product that reads them, and the two of the feed forward network."""

    attention: Any
    joined: Any
    widen: Any
    narrow: Any


def shape_of(model: Any) -> Shape:
    """The sizes that pruning changes; raises :class:`RecipeError` for an architecture it doesn't know."""
    blocks = _blocks(model)
    config = model.config
    if any((getattr(config, "pruned_heads", None) or {}).values()):
        what, remedy = "the source was pruned before", "Prune the network that it was made of"
        raise RecipeError(what, where="[prune]", remedy=remedy)
    whole = Structure(
        layers=len(blocks),
        heads=heads_kept(config),
        ffn=int(blocks[0].widen.out_features),
        vocabulary=int(config.vocab_size),
    )
    return Shape(
        whole=whole,
        hidden=int(config.hidden_size),
        positions=int(getattr(config, "max_position_embeddings", 0)),
        labels=int(config.num_labels),
    )


def importance(
    model: Any, batches: Iterable[tuple[dict[str, Any], Any]], loss_of: Callable[[Any, Any], Any]
) -> Importance:
    """Measured on batches of (inputs, truth) with ``loss_of(logits, truth)``; the model is left as it was."""
    blocks = _blocks(model)
    heads = int(model.config.num_attention_heads)
    seen: dict[tuple[str, int], Any] = {}

    def keep(kind: str, index: int) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            inputs[0].retain_grad()
            seen[kind, index] = inputs[0]

        return hook

    hooks = []
    for index, block in enumerate(blocks):
        hooks.append(block.joined.register_forward_pre_hook(keep("heads", index)))
        hooks.append(block.narrow.register_forward_pre_hook(keep("neurons", index)))
    by_head = np.zeros((len(blocks), heads))
    by_neuron = np.zeros((len(blocks), blocks[0].narrow.in_features))
    sums = {
        "heads": [np.zeros([block.joined.in_features + 1] * 2) for block in blocks],
        "neurons": [np.zeros([block.narrow.in_features + 1] * 2) for block in blocks],
    }
    tokens = 0.0
    model.eval()
    try:
        for inputs, truth in batches:
            model.zero_grad(set_to_none=True)
            loss_of(model(**inputs).logits, truth).backward()
            tokens += float(inputs["attention_mask"].sum())
            for (kind, index), activation in seen.items():
                sums[kind][index] += _moments(activation, inputs["attention_mask"])
            for index in range(len(blocks)):
                by_head[index] += _change(seen["heads", index]).unflatten(1, (heads, -1)).sum(2).abs().sum(0).numpy()
                by_neuron[index] += _change(seen["neurons", index]).abs().sum(0).numpy()
    finally:
        for handle in hooks:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return Importance(by_head, by_neuron, _means(sums["heads"], tokens), _means(sums["neurons"], tokens))


def prune(model: Any, structure: Structure, found: Importance) -> None:
    """Take all but the most important units out, in place; the vocabulary is :mod:`exporters.vocabulary`'s."""
    stay = most_important(found.layers, structure.layers)
    _keep_layers(model, stay)
    blocks = _blocks(model)
    heads = int(model.config.num_attention_heads)
    gone = {}
    for index, (layer, block) in enumerate(zip(stay, blocks, strict=True)):
        weight, _ = _linear(block.joined)
        stays = dispensed_last(weight, _exact(found.joined_moments[layer]), heads, structure.heads)
        gone[index] = sorted(set(range(heads)) - set(stays))
        _keep_neurons(block, most_important(found.neurons[layer], structure.ffn), _exact(found.neuron_moments[layer]))
    if structure.heads < heads:
        joined = [_linear(block.joined) for block in blocks]
        model.prune_heads(gone)
        for index, (layer, block) in enumerate(zip(stay, _blocks(model), strict=True)):
            width = len(joined[index][0][0]) // heads
            columns = [
                head * width + place for head in range(heads) if head not in gone[index] for place in range(width)
            ]
            _set_linear(block.joined, *stand_in(*joined[index], _exact(found.joined_moments[layer]), columns))
    ffn_key = "hidden_dim" if model.config.model_type == "distilbert" else "intermediate_size"
    setattr(model.config, ffn_key, structure.ffn)


def dispensed_last(weight: Figures, moments: Figures, groups: int, count: int) -> list[int]:
    """Which ``count`` of the ``groups`` equal parts of ``weight`` [out, units] are left when always that part is taken
    out which the rest stands in for with the least squared error; in their own order. Pure.

    ``moments`` [units + 1, units + 1] are of the units and a constant.
    """
    width = weight.shape[1] // groups
    left = np.concatenate([weight, np.zeros((len(weight), 1))], axis=1)
    inverse = np.linalg.inv(_ridged(moments))
    places = {group: slice(group * width, (group + 1) * width) for group in range(groups)}

    def cost(group: int) -> float:
        part = left[:, places[group]]
        return float(np.sum((part @ np.linalg.inv(inverse[places[group], places[group]])) * part))

    while len(places) > count:
        out = places[worst := min(places, key=cost)]
        taken = np.linalg.inv(inverse[out, out])
        left = left - left[:, out] @ taken @ inverse[out]
        inverse = inverse - inverse[:, out] @ taken @ inverse[out]
        del places[worst]
    return sorted(places)


def stand_in(weight: Figures, bias: Figures, moments: Figures, stay: Sequence[int]) -> tuple[Figures, Figures]:
    """Weight [out, kept] and bias [out] with which the units that stay come closest to what all gave with ``weight``
    [out, units] and ``bias``: least squares over the tokens that ``moments`` [units + 1, units + 1] are of. Pure."""
    whole = np.concatenate([weight, bias[:, None]], axis=1)
    kept = [*stay, len(moments) - 1]
    found = np.linalg.solve(_ridged(moments[np.ix_(kept, kept)]), moments[kept] @ whole.T).T
    return found[:, :-1], found[:, -1]


def _ridged(moments: Figures) -> Figures:
    count = len(moments)
    found: Figures = moments + _RIDGE * float(np.trace(moments)) / count * np.eye(count)
    return found


def most_important(figures: Sequence[float] | Figures, count: int) -> list[int]:
    """Indexes of the ``count`` largest figures in their own order; of equals the first. Pure."""
    order = np.argsort(-np.asarray(figures), kind="stable")[:count]
    return sorted(int(index) for index in order)


def heads_kept(config: Any) -> int:
    """Heads that each layer of a saved model still has."""
    pruned = getattr(config, "pruned_heads", None) or {}
    gone = {len(heads) for heads in pruned.values()} or {0}
    return int(config.num_attention_heads) - max(gone)


def _moments(activation: Any, mask: Any) -> Figures:
    """Sums over the tokens that are no padding, of products with each other and with 1."""
    import torch

    rows = activation.detach()[mask.bool()].double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    found: Figures = (rows.T @ rows).numpy()
    return found


def _means(sums: list[Figures], tokens: float) -> list[Moments]:
    """Empties ``sums`` layer by layer, so that both never are there at once."""
    means = []
    while sums:
        total = sums.pop(0)
        total /= tokens
        means.append(total.astype(np.float32))
    return means


def _exact(moments: Moments) -> Figures:
    """What is solved for needs more digits than what it is made of."""
    return moments.astype(np.float64)


def _change(activation: Any) -> Any:
    """[rows, units]: the loss's change, to first order, if a unit gave nothing."""
    return (activation * activation.grad).detach().sum(dim=1)


def _blocks(model: Any) -> list[_Block]:
    found = []
    for layer in encoder_layers(model):
        if hasattr(layer, "intermediate"):  # BERT and those made after it
            attention = layer.attention
            found.append(_Block(attention, attention.output.dense, layer.intermediate.dense, layer.output.dense))
        elif hasattr(layer, "ffn"):  # DistilBERT
            found.append(_Block(layer.attention, layer.attention.out_lin, layer.ffn.lin1, layer.ffn.lin2))
        else:
            what = f"a {type(model).__name__} can't be pruned"
            raise RecipeError(what, where="[prune]", remedy="Use a BERT-class encoder, or remove [prune]")
    return found


def _keep_layers(model: Any, stay: Sequence[int]) -> None:
    base, config = model.base_model, model.config
    stack = base.encoder if hasattr(base, "encoder") else base.transformer
    stack.layer = type(stack.layer)([stack.layer[index] for index in stay])
    config.num_hidden_layers = len(stay)
    if hasattr(config, "n_layers"):
        config.n_layers = len(stay)


def _keep_neurons(block: _Block, stay: Sequence[int], moments: Figures) -> None:
    weight, bias = _linear(block.widen)
    _set_linear(block.widen, weight[list(stay)], bias[list(stay)])
    _set_linear(block.narrow, *stand_in(*_linear(block.narrow), moments, stay))


def _linear(layer: Any) -> tuple[Figures, Figures]:
    """Weight [out, in] and bias [out]."""
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def _set_linear(layer: Any, weight: Figures, bias: Figures) -> None:
    import torch

    layer.weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight)).float())
    layer.bias = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(bias)).float())
    layer.out_features, layer.in_features = weight.shape
