"""The language model: embedding, Hope layers, final norm, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hope.config import HopeConfig
from hope.flops import Flops, product_flops, sum_flops
from hope.init import Initialiser, Linear, Normal, RMSNorm, initialise
from hope.layer import HopeLayer
from hope.sharding import Replicate, Shard, ShardPlan, within
from hope.state import ModelState, StateSpec


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
        mixers = [layer.mixer for layer in self._hope_layers()]
        return ModelState(tuple(mixer.initial_state(batch, decoding) for mixer in mixers))

    def state_spec(
        self,
        batch: int,
        decoding: bool = False,
        tokens: int = 0,
        dtype: torch.dtype | None = None,
    ) -> StateSpec:
        """Shapes, dtypes and axes of what `batch` rows carry after `tokens` tokens.

        Names as in `ModelState.named_tensors`; decoding: as in `initial_state`; dtype: the
        activations' (default: the parameters'). `hope.state.bytes_per_row` adds it up.
        """
        spec: StateSpec = {}
        for number, layer in self._numbered_layers():
            own = layer.state_spec(batch, decoding, tokens, dtype)
            spec |= {f"layers.{number}.{name}": one for name, one in own.items()}
        return spec

    def shard_plan(self) -> ShardPlan:
        """Where every parameter held here goes under tensor parallelism, each exactly once."""
        plan: ShardPlan = {
            "embedding.weight": Shard(0),
            "norm.weight": Replicate(),
            "head.weight": Shard(0),
        }
        for number, layer in self._numbered_layers():
            plan |= within(f"layers.{number}", layer.shard_plan())
        return {name: plan[name] for name, _ in self.named_parameters()}

    def flops_per_token(self, seq_len: int, executed: bool = True) -> Flops:
        """Floating-point operations per token of sequences of seq_len tokens; see `hope.flops`.

        The head is included; looking up token vectors is free.
        """
        layers = [layer.flops_per_token(seq_len, executed) for layer in self._hope_layers()]
        return sum_flops([*layers, product_flops(self.embedding.weight.numel())])

    def _hope_layers(self) -> list[HopeLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _numbered_layers(self) -> list[tuple[str, HopeLayer]]:
        """The layers held here by their number in the whole model."""
        return list(self.layers.named_children())  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits for the token after each position.

        tokens: int [B, T]; document_starts: bool [B, T], True where a row begins a new document.
        Returns (logits [B, T, vocab_size], state after the last token). Splitting a sequence into
        calls that pass the state on gives the logits of one call, where attention layers have a
        cache: with them begin from `initial_state(batch, decoding=True)`, for without one each call
        is a sequence of its own to them. Raises ValueError, in one line, for tokens, starts or a
        state that do not fit together.
        """
        if tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"tokens must be int32 or int64, got {tokens.dtype}")
        if tokens.dim() != 2 or min(tokens.shape) < 1:
            raise ValueError(f"tokens must be [B, T], none of them 0, got {list(tokens.shape)}")
        if document_starts is not None:
            given = (document_starts.dtype, document_starts.shape)
            if given != (torch.bool, tokens.shape):
                raise ValueError(
                    f"document_starts must be bool [B, T] = {list(tokens.shape)}, "
                    f"got {given[0]} {list(given[1])}"
                )
        x, after = self.transform(self.embed(tokens), state, document_starts)
        return self.logits(x), after

    def embed(self, tokens: Tensor) -> Tensor:
        """Token vectors as they enter the first layer: int [B, T] -> [B, T, dim]."""
        return self.embedding(tokens) * self.embedding_scale

    def transform(
        self, x: Tensor, state: ModelState | None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """All layers held here: x [B, T, dim] -> (x, state after the last token)."""
        before = state.layers if state is not None else (None,) * len(self.layers)
        if len(before) != len(self.layers):
            raise ValueError(f"state is of {len(before)} layers, the model has {len(self.layers)}")
        after = []
        for layer, layer_state in zip(self.layers, before, strict=True):
            x, layer_state = layer(x, layer_state, document_starts)
            after.append(layer_state)
        return x, ModelState(tuple(after))

    def logits(self, x: Tensor) -> Tensor:
        """What the last layer gave -> logits: [B, T, dim] -> [B, T, vocab_size]."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return torch.nn.functional.linear(self.norm(x), weight)


def num_parameters(config: HopeConfig) -> int:
    """Parameters of a model, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in HopeModel(config, seed=None).parameters())
