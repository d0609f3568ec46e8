"""The part of a model that a rank computes: all of it, or some layers (a pipeline stage)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hope import HopeConfig, HopeModel, ModelState
from hope.state import concatenate_rows
from hope.titans import SelfModifyingTitans
from train.parallel.context import Pieces


def cut_layers(config: HopeConfig, layers: range) -> HopeModel:
    """A model on the meta device that holds only `layers`; names are those of the whole.

    The embedding is there with the first layer, and with the last where it is also the head; norm
    and head with the last.
    """
    with torch.device("meta"):
        model = HopeModel(config, seed=None)
    first, last = layers.start == 0, layers.stop == config.num_layers
    kept = nn.ModuleList()
    for number in layers:
        kept.add_module(str(number), model.layers[number])
    model.layers = kept
    if not first and not (last and model.head is None):
        del model.embedding
    if not last:
        del model.norm
        model.head = None
    return model


def parameter_names(config: HopeConfig) -> set[str]:
    """The names of all parameters of a model."""
    with torch.device("meta"):
        return {name for name, _ in HopeModel(config, seed=None).named_parameters()}


def unused_parameters(model: HopeModel) -> set[str]:
    """Those that no gradient ever reaches."""
    mixers = {path: m for path, m in model.named_modules() if isinstance(m, SelfModifyingTitans)}
    return {f"{path}.{name}" for path, mixer in mixers.items() for name in mixer.unused}


class Part(nn.Module):
    """Layers `layers` of a model, called like any stage of a pipeline.

    forward(x, rows, document_starts): x int [b, T], tokens, where the model begins here, else
    [b, T, dim]; rows int [b], which of the rank's rows these are. Returns logits [b, T, vocab]
    where the model ends here, else [b, T, dim].

    before: the state that the rows of this step begin with, None for fresh ones; keeps_state: what
    they end with in training is kept until `take_after`, at hundreds of megabytes a row for a large
    model.
    """

    def __init__(self, model: HopeModel, layers: range, pieces: Pieces | None = None) -> None:
        super().__init__()
        self.model = model
        self.layers, self.first = layers, layers.start == 0
        self.last = layers.stop == model.config.num_layers
        self.pieces = pieces
        self.before: ModelState | None = None
        self.keeps_state = True
        self._after: dict[int, ModelState] = {}

    def forward(self, x: Tensor, rows: Tensor, document_starts: Tensor | None = None) -> Tensor:
        begin = int(rows[0])
        before = None
        if self.before is not None:
            before = self.before.rows(begin, begin + rows.shape[0])
        if self.first:
            x = self.model.embed(x)
        x, after = self.model.transform(x, before, document_starts)
        if self.keeps_state and torch.is_grad_enabled():
            self._after[begin] = after.detach()
        if self.pieces is not None:
            x = self.pieces.attach(x)
        return self.model.logits(x) if self.last else x

    def take_after(self) -> ModelState:
        """The state of all rows after the last token of this step."""
        parts = [self._after[begin] for begin in sorted(self._after)]
        self._after = {}
        return concatenate_rows(parts)
