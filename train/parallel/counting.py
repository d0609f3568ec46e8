"""Bytes that a rank sends in collectives, counted where every one of them passes."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, BROADCAST, REDUCE, SEND = "all-to-all", "broadcast", "reduce", "send"

# Operator -> (what it is, which argument is the whole tensor, or all of them; None: the result).
_OPERATORS: dict[str, tuple[str, int | None]] = {
    "c10d::allreduce_": (ALL_REDUCE, 0),
    "c10d::allreduce_coalesced_": (ALL_REDUCE, 0),
    "c10d::_allgather_base_": (ALL_GATHER, 0),
    "c10d::allgather_": (ALL_GATHER, 0),
    "c10d::allgather_into_tensor_coalesced_": (ALL_GATHER, 0),
    "c10d::_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "c10d::reduce_scatter_": (REDUCE_SCATTER, 1),
    "c10d::reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "c10d::alltoall_base_": (ALL_TO_ALL, 1),
    "c10d::alltoall_": (ALL_TO_ALL, 1),
    "c10d::broadcast_": (BROADCAST, 0),
    "c10d::reduce_": (REDUCE, 0),
    "c10d::send": (SEND, 0),
    "_c10d_functional::all_reduce": (ALL_REDUCE, 0),
    "_c10d_functional::all_reduce_": (ALL_REDUCE, 0),
    "_c10d_functional::all_reduce_coalesced": (ALL_REDUCE, 0),
    "_c10d_functional::all_gather_into_tensor": (ALL_GATHER, None),
    "_c10d_functional::all_gather_into_tensor_out": (ALL_GATHER, None),
    "_c10d_functional::all_gather_into_tensor_coalesced": (ALL_GATHER, None),
    "_c10d_functional::reduce_scatter_tensor": (REDUCE_SCATTER, 0),
    "_c10d_functional::reduce_scatter_tensor_out": (REDUCE_SCATTER, 0),
    "_c10d_functional::reduce_scatter_tensor_coalesced": (REDUCE_SCATTER, 0),
    "_c10d_functional::all_to_all_single": (ALL_TO_ALL, 0),
    "_c10d_functional::broadcast": (BROADCAST, 0),
    "_c10d_functional::isend": (SEND, 0),
}
_WAITS = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")
_RECEIVES = ("recv_", "recv_any_source_", "irecv")


def sent(collective: str, size: int, whole: float) -> float:
    """Bytes that each of `size` ranks sends, by ring algorithms, for `whole` bytes.

    whole: the tensor that is summed, or put together, or taken apart; for a send, what is sent.
    all-reduce 2 (n - 1) / n of it; all-gather, reduce-scatter and all-to-all (n - 1) / n; a
    broadcast or reduce passes along a chain, so that all ranks but the last send it: (n - 1) / n
    on average.
    """
    if collective == SEND:
        return whole
    passes = 2 if collective == ALL_REDUCE else 1
    return passes * (size - 1) / size * whole


class CollectiveBytes(TorchDispatchMode):
    """A context within which every collective of this rank is counted, in backward too.

    Sees torch.distributed's calls and functional collectives, and so DTensor's, FSDP2's and the
    pipeline schedules'. bytes: by collective, as `sent` says; calls: how many. What it does not
    know is an AssertionError and not a zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, own = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and own not in _WAITS + _RECEIVES:
            self._count(func, args, result)
        return result

    def _count(self, func: Any, args: Any, result: Any) -> None:
        name = func._schema.name
        if name not in _OPERATORS:
            raise AssertionError(f"a collective that is not counted: {name}")
        collective, which = _OPERATORS[name]
        counted = result if which is None else args[which]
        whole = sum(one.nbytes for one in tree_leaves(counted) if isinstance(one, Tensor))
        self.bytes[collective] += sent(collective, _group_size(func, args), whole)
        self.calls[collective] += 1


def _group_size(func: Any, args: Any) -> int:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == "process_group":
            return dist.ProcessGroup.unbox(value).size()
        if argument.name == "group_name":
            if isinstance(value, dist.ProcessGroup):
                return value.size()
            return dist.distributed_c10d._resolve_process_group(value).size()  # type: ignore[attr-defined]
    raise AssertionError(f"a collective of no group: {func}")
