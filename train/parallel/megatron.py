"""Tensor parallelism by megatron-core's layers: `parallel.tensor_backend: megatron`.

The plan, the parameters (DTensors) and their names are those of `train.parallel.tensor`; the layers
that compute are megatron-core's, which bring their collectives with them: a column-parallel product
sums the gradient of its input, a row-parallel one its output. Only the final norm, whose consumer
is the head, keeps ours. They run on the tensor-parallel group they are given, not on its globals.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hope import HopeModel
from hope.init import Linear
from hope.model import Embedding
from hope.sharding import Shard
from train.parallel.collectives import enter
from train.section import ConfigError


def swap(model: HopeModel, mesh: DeviceMesh) -> None:
    """Let megatron-core's layers take the place of ours in a model that `divide` has divided.

    Raises ConfigError where megatron-core is not installed.
    """
    layers = _layers()
    group = mesh.get_group()
    if mesh.device_type == "cpu":  # it asks for a setting of CUDA's
        warnings.filterwarnings("ignore", message="When using async grad allreduce")
    plan = model.shard_plan()
    for path, module in list(model.named_modules()):
        placement = plan.get(f"{path}.weight")
        if isinstance(module, Linear) and isinstance(placement, Shard):
            kind = ("column", "row")[placement.dim]
            sizes = module.in_features, module.out_features
        elif isinstance(module, Embedding):
            kind, sizes = "vocabulary", (module.num_embeddings, module.embedding_dim)
        else:
            continue
        if path == "head":
            continue  # the model reads its weight alone
        with torch.device("meta"):
            other = layers[kind](*sizes, group)
        other.weight = module.weight
        other.initialisers = module.initialisers
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, other)
    if hasattr(model, "norm"):

        def into(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            return enter(y, group, False)

        model.norm.register_forward_hook(into)


def _layers() -> dict[str, Any]:
    """How to make each kind of layer: (sizes, group) -> a module whose weight is to be given."""
    try:
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import (
            ColumnParallelLinear,
            RowParallelLinear,
            VocabParallelEmbedding,
        )
    except ImportError as error:
        raise ConfigError(
            "parallel.tensor_backend=megatron needs the package megatron-core, which can't be "
            f"imported ({error}): pip install -r requirements.txt, or tensor_backend=native"
        ) from None

    def common(group: dist.ProcessGroup) -> dict[str, Any]:
        settings = ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        return {"config": settings, "init_method": nn.init.zeros_, "tp_group": group}

    class Column(ColumnParallelLinear):
        """[..., in] -> this rank's [..., out / ranks]."""

        def __init__(self, inputs: int, outputs: int, group: dist.ProcessGroup) -> None:
            super().__init__(inputs, outputs, bias=False, **common(group))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Row(RowParallelLinear):
        """This rank's [..., in / ranks] -> [..., out], summed over the ranks."""

        def __init__(self, inputs: int, outputs: int, group: dist.ProcessGroup) -> None:
            super().__init__(
                inputs,
                outputs,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                **common(group),
            )

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Vocabulary(VocabParallelEmbedding):
        """Tokens [...] -> [..., dim], of whichever rank has them."""

        def __init__(self, tokens: int, dim: int, group: dist.ProcessGroup) -> None:
            super().__init__(tokens, dim, **common(group))

    return {"column": Column, "row": Row, "vocabulary": Vocabulary}
