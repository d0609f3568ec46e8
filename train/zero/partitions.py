"""The flat pieces into which ZeRO cuts parameters, and where in them each parameter lies.

Parameters come in groups; ZeRO lays each group out as one line of numbers (stages 1 and 2) or cuts
every parameter by itself (stage 3), and gives every data-parallel rank a piece of each, in float32:
a partition. Of a parameter a rank has one run of numbers, a fragment, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """`size` numbers of a parameter from its `first` on, which lie in partition `partition` from
    `start` on."""

    partition: int
    start: int
    first: int
    size: int


class Partitions:
    """This rank's partitions under one of DeepSpeed's optimizers.

    zero: ZeRO 1 and 2, ZeRO 3, or its BF16_Optimizer, which is ZeRO 1 in bfloat16. parameters: by
    name, with their shapes as this rank computes with them. The group is DeepSpeed's: the ranks
    that each have a piece of the same line.
    """

    def __init__(
        self,
        zero: Any,
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, torch.Size],
    ) -> None:
        self._zero, self._shapes = zero, shapes
        self._group: dist.ProcessGroup = zero.dp_process_group
        self._stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
        self._bf16 = hasattr(zero, "fp32_groups_flat_partition")
        if self._stage_3:
            self.tensors: list[nn.Parameter] = zero.fp32_partitioned_groups_flat
            lines = zero.fp16_groups
        elif self._bf16:
            self.tensors, lines = zero.fp32_groups_flat_partition, zero.bf16_groups
        else:
            self.tensors, lines = zero.single_partition_of_fp32_groups, zero.bit16_groups
        names = {parameter: name for name, parameter in parameters.items()}
        self.names = [[names[parameter] for parameter in line] for line in lines]
        where = zero.sub_group_to_group_id if self._stage_3 else {}
        self.group_of = [where.get(index, index) for index in range(len(lines))]
        self.fragments = {
            names[parameter]: self._fragment(index, parameter)
            for index, line in enumerate(lines)
            for parameter in line
        }

    def _fragment(self, index: int, parameter: Any) -> Fragment:
        if self._stage_3:
            place, start, most = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = most * dist.get_rank(self._group)
            size = min(most, max(0, parameter.ds_numel - first))
            return Fragment(place, start, first, size)
        held = parameter._hp_mapping
        if held is None:
            return Fragment(index, 0, 0, 0)
        own, flat = held.lp_fragment_address, held.hp_fragment_address
        return Fragment(index, flat.start, own.start, own.numel)

    def gradients(self) -> list[Tensor]:
        """Of every partition what DeepSpeed has reduced, averaged over the ranks; float32 copies,
        for DeepSpeed uses its own again."""
        if self._bf16:
            return [piece.clone() for piece in self._zero.fp32_groups_gradient_flat_partition]
        found = []
        for index, tensor in enumerate(self.tensors):
            pieces = self._zero.averaged_gradients[index]
            flat = getattr(pieces, "flat_partition", None)
            if flat is None:
                flat = torch.cat([piece.reshape(-1) for piece in pieces])
            whole = torch.zeros_like(tensor)
            whole[: flat.numel()].copy_(flat)  # the last rank's gradients have no padding
            found.append(whole)
        return found

    def whole(self, name: str, partition: Tensor) -> Tensor:
        """A parameter, or a state of its optimizer, out of what every rank has of it in the
        partition it lies in; a collective call of the group."""
        one, shape = self.fragments[name], self._shapes[name]
        line = torch.zeros(shape.numel(), dtype=torch.float32, device=partition.device)
        line[one.first : one.first + one.size] = partition[one.start : one.start + one.size]
        dist.all_reduce(line, group=self._group)
        return line.view(shape)

    def put(self, name: str, whole: Tensor, partition: Tensor) -> None:
        """Lay this rank's fragment of `whole` into the partition it lies in."""
        one, shape = self.fragments[name], self._shapes[name]
        if whole.shape != shape:
            raise ValueError(f"{name} is {list(whole.shape)}, and {list(shape)} is needed")
        line = whole.reshape(-1)[one.first : one.first + one.size]
        partition[one.start : one.start + one.size] = line.to(partition)

    @torch.no_grad()
    def publish(self) -> None:
        """Let every rank compute with the partitions as they are now; a collective call."""
        zero = self._zero
        if not self._stage_3:
            zero.update_lp_params()
            return
        for index in range(len(self.tensors)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if kept := zero.persistent_parameters:  # small ones, which every rank keeps whole
            kept[0].partition(kept)
            kept[0].all_gather(kept)
