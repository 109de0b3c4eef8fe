"""What a task is: raw inputs -> model tensors, model outputs -> predictions, and the protocol's natural tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from aios_edge.golden import RawInput
from aios_edge.manifest import TensorSpec
from aios_edge.oip.datatypes import Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. ``probabilities`` are in the order of the manifest's labels; ``score`` is the label's.

    Where the model's output is NaN or infinite, all of them are NaN and ``label`` is empty: there is no class.
    """

    label: str
    score: float
    probabilities: tuple[float, ...]


class Task(Protocol):
    """Pre- and post-processing of one bundle, the same for exporter and agent."""

    @property
    def natural_inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors a client may send instead of the model's own."""

    @property
    def natural_outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors it is answered with then."""

    @property
    def natural_names(self) -> tuple[str, ...]:
        """Names of ``natural_inputs``."""

    def raw_tensors(self, inputs: Mapping[str, Tensor]) -> tuple[RawInput, ...] | None:
        """Raw inputs from a request's tensors; None when none of them is natural.

        Raises :class:`~aios_edge.errors.RequestError` (400) for natural tensors that can't be used.
        """

    def encode(self, raw: Sequence[RawInput]) -> dict[str, NDArray[Any]]:
        """The model's input tensors [N, L] for N raw inputs, padded to the longest of them."""

    def lengths(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
        """The true length of each row of encoded inputs."""

    def decode(self, outputs: Mapping[str, NDArray[Any]], *, finite: bool = True) -> tuple[Prediction, ...]:
        """One prediction per row of the model's outputs.

        Raises :class:`~aios_edge.errors.BundleRefused` for outputs that contradict the manifest and, with ``finite``,
        for a row without a class.
        """

    def prediction_tensors(self, predictions: Sequence[Prediction]) -> dict[str, Tensor]:
        """The natural output tensors of N predictions."""
