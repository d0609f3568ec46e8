"""Parameter initialisation, keyed by name so that no layout of ranks can change it.

A module that owns parameters lists in `initialisers` how each starts. `initialise` draws every
parameter from its own generator, seeded by (seed, its full name): the same weights come out
whatever the order of construction, the device, or the part of the model that is built.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Normal:
    """Zero-mean Gaussian of the given standard deviation.

    twin: a module beside the parameter's own whose draw is repeated here: both start equal.
    """

    std: float
    twin: str = ""

    def fill(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Uniform on [-bound, bound]."""

    bound: float

    def fill(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float

    def fill(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(self.value)


@dataclass(frozen=True)
class Taps:
    """One value per row, the last row first, the same in every column; further rows get 0."""

    values: tuple[float, ...]

    def fill(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.zero_()
        for row, value in zip(reversed(tensor.unbind()), self.values, strict=False):
            row.fill_(value)


Initialiser = Normal | Uniform | Constant | Taps


class Linear(nn.Linear):
    """A linear map without bias that knows how it starts: N(0, std^2)."""

    def __init__(self, in_features: int, out_features: int, std: float, twin: str = "") -> None:
        super().__init__(in_features, out_features, bias=False)
        self.initialisers: dict[str, Initialiser] = {"weight": Normal(std, twin)}

    def reset_parameters(self) -> None:
        """Nothing: `initialise` fills the weight once the whole model is built."""


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last axis, with a learned gain that starts at 1."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.initialisers: dict[str, Initialiser] = {"weight": Constant(1.0)}


def seed_from(*coordinates: int | str) -> int:
    """A 63-bit seed from any coordinates, the same on every machine and Python."""
    text = "\x1f".join(str(part) for part in coordinates)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill every parameter of `model` in place. Raises KeyError for one with no initialiser."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(model, name, parameter.shape, seed))


def initial_value(model: nn.Module, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The value, float32 of `shape`, that the parameter called `name` starts from.

    Only the names of `model` and its modules' `initialisers` matter, not what it holds: this is how
    a model whose parameters lie in parts on many ranks gets the weights of the whole one.
    """
    path, _, own = name.rpartition(".")
    initialiser: Initialiser = model.get_submodule(path).initialisers[own]  # type: ignore[index, assignment]
    drawn = name
    if isinstance(initialiser, Normal) and initialiser.twin:
        drawn = ".".join([*path.split(".")[:-1], initialiser.twin, own])
    generator = torch.Generator().manual_seed(seed_from(seed, "init", drawn))
    draft = torch.empty(shape, dtype=torch.float32, device="cpu")
    initialiser.fill(draft, generator)
    return draft
