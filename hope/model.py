"""The language model: embedding, Hope layers, final norm, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hope.config import HopeConfig
from hope.init import Initialiser, Linear, Normal, RMSNorm, initialise
from hope.layer import HopeLayer
from hope.state import ModelState


class Embedding(nn.Embedding):
    """Token vectors, N(0, std^2); its rows are also the head when embeddings are tied."""

    def __init__(self, vocab_size: int, dim: int, std: float) -> None:
        super().__init__(vocab_size, dim)
        self.initialisers: dict[str, Initialiser] = {"weight": Normal(std)}

    def reset_parameters(self) -> None:
        """Nothing: `initialise` fills the weight once the whole model is built."""


class HopeModel(nn.Module):
    """A decoder-only language model. Raises ValueError when config.vocab_size is not set.

    seed: names the initial weights; None leaves them unset, to be loaded or for the meta device.

    Token vectors enter at unit scale, so that the first mixers do not drown them. Tied ones are
    held at 1/dim, so that a token's logit for itself is of order 1 and the first loss is
    ln(vocab_size) at any width.
    """

    def __init__(self, config: HopeConfig, seed: int | None = 0) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: give it, or data whose tokenizer has it")
        self.config = config
        tied = config.tie_embeddings
        std = 1 / config.dim if tied else config.dim**-0.5
        self.embedding = Embedding(config.vocab_size, config.dim, std)
        self.embedding_scale = 1 / std
        self.layers = nn.ModuleList(HopeLayer(config, mixer) for mixer in config.mixers)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head: Linear | None = None
        if not tied:
            self.head = Linear(config.dim, config.vocab_size, 0.2 * config.dim**-0.5)
        if seed is not None:
            initialise(self, seed)

    def initial_state(self, batch: int, decoding: bool = False) -> ModelState:
        """State before the first token of `batch` rows.

        Titans layers start from M_0 either way; attention layers carry a cache only if decoding.
        """
        mixers: list[Any] = [layer.mixer for layer in self.layers]
        return ModelState(tuple(mixer.initial_state(batch, decoding) for mixer in mixers))

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits for the token after each position.

        tokens: int [B, T]; document_starts: bool [B, T], True where a row begins a new document.
        Returns (logits [B, T, vocab_size], state after the last token). Splitting a sequence into
        calls that pass the state on gives the logits of one call.
        """
        x = self.embedding(tokens) * self.embedding_scale
        before = state.layers if state is not None else (None,) * len(self.layers)
        after = []
        for layer, layer_state in zip(self.layers, before, strict=True):
            x, layer_state = layer(x, layer_state, document_starts)
            after.append(layer_state)
        x = self.norm(x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        return torch.nn.functional.linear(x, weight), ModelState(tuple(after))
