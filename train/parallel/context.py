"""Context parallelism: rank c of n has the c-th of n pieces of every sequence.

Memories are not linear, so that pieces can't be composed by a scan. A Titans layer passes its state
on, from piece to piece: forward, rank c waits for the state that piece c - 1 left in this layer;
backward, for the gradient of the state that it left itself. Layers and micro-batches fill the time:
a rank begins a layer one layer's time after its predecessor. Softmax attention gives every rank
some heads of the whole sequence and takes back its piece of all of them (arXiv 2309.14509).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from hope import HopeModel
from hope.attention import Attention
from hope.scan import MemoryState
from hope.state import AttentionState, TitansState
from hope.titans import SelfModifyingTitans
from train.parallel.collectives import exchange
from train.parallel.ranks import Ranks


class _Receive(Function):
    """What the rank before sent; its gradient goes back there. The anchor only asks for one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.like = ranks, like
        came = torch.empty_like(like)
        dist.recv(came, ranks.global_rank(ranks.rank - 1), group=ranks.group)
        return came

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ranks = ctx.ranks
        dist.send(grad.contiguous(), ranks.global_rank(ranks.rank - 1), group=ranks.group)
        return grad.new_zeros(()), None, None


class _Send(Function):
    """Send to the rank after; gives a zero through which its gradient is fetched in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, sent: list[Any]) -> Tensor:
        ctx.ranks, ctx.shape = ranks, x.shape
        payload = x.detach().contiguous()
        work = dist.isend(payload, ranks.global_rank(ranks.rank + 1), group=ranks.group)
        sent.append((work, payload))
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        ranks = ctx.ranks
        came = grad.new_empty(ctx.shape)
        dist.recv(came, ranks.global_rank(ranks.rank + 1), group=ranks.group)
        return came, None, None


class _Attach(Function):
    """x itself; the zeros get a gradient of zero when x gets one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *zeros: Tensor) -> Tensor:
        ctx.zeros = len(zeros)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad, *(torch.zeros((), device=grad.device) for _ in range(ctx.zeros))


class Pieces:
    """The exchange of one rank with its neighbours along the sequence."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._zeros: list[Tensor] = []
        self._sent: list[Any] = []

    @property
    def is_first(self) -> bool:
        """Whether sequences begin here."""
        return self.ranks.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether sequences end here."""
        return self.ranks.rank == self.ranks.size - 1

    def receive(self, like: TitansState) -> TitansState:
        """The state that the piece before left; `like` has its shapes and dtypes."""
        tensors = _tensors(like)
        flat = torch.cat([tensor.detach().flatten().to(_carrier(tensors)) for tensor in tensors])
        anchor = torch.zeros((), device=flat.device, requires_grad=torch.is_grad_enabled())
        came = _Receive.apply(anchor, flat, self.ranks)
        parts = came.split([tensor.numel() for tensor in tensors])
        found = [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]
        return _with_tensors(like, found)

    def send(self, state: TitansState) -> None:
        """Hand the state over to the piece after."""
        tensors = _tensors(state)
        flat = torch.cat([tensor.flatten().to(_carrier(tensors)) for tensor in tensors])
        self._zeros.append(_Send.apply(flat, self.ranks, self._sent))

    def attach(self, x: Tensor) -> Tensor:
        """x, whose backward also fetches the gradients of everything sent since the last call."""
        zeros, self._zeros = self._zeros, []
        return _Attach.apply(x, *zeros) if zeros and torch.is_grad_enabled() else x

    def settle(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def wrap_around(self, named: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Carry what the last piece left to the first, where the next sequence begins.

        named: what this rank's piece left, by name. Returns it on the first rank, None elsewhere.
        """
        if named is None:
            return None
        last, first = self.ranks.global_rank(self.ranks.size - 1), self.ranks.global_rank(0)
        for name, tensor in named.items():
            if tensor.numel() == 0:
                continue
            if self.is_last:
                dist.send(tensor.contiguous(), first, group=self.ranks.group)
            elif self.is_first:
                named[name] = came = torch.empty_like(tensor)
                dist.recv(came, last, group=self.ranks.group)
        return named if self.is_first else None


def _tensors(state: TitansState) -> list[Tensor]:
    memory = [] if state.memory is None else list(state.memory)
    return [*memory, state.conv_x, state.conv_q]


def _with_tensors(like: TitansState, tensors: list[Tensor]) -> TitansState:
    *memory, conv_x, conv_q = tensors
    return like._replace(
        memory=MemoryState(*memory) if memory else None, conv_x=conv_x, conv_q=conv_q
    )


def _carrier(tensors: list[Tensor]) -> torch.dtype:
    return torch.promote_types(tensors[0].dtype, torch.float32)


class PassingTitans(nn.Module):
    """Mixed into a Titans mixer: it continues the piece before, and is continued by the next."""

    pieces: Pieces

    def forward(
        self, x: Tensor, state: TitansState | None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        if not self.pieces.is_first:
            with torch.no_grad():
                like = self.initial_state(x.shape[0], decoding=False)  # type: ignore[operator]
            state = self.pieces.receive(like)
        y, after = super().forward(x, state, document_starts)
        if not self.pieces.is_last:
            self.pieces.send(after)
        return y, after


class ExchangingAttention(nn.Module):
    """Mixed into attention: heads for tokens before the softmax, tokens for heads after it."""

    pieces: Pieces

    def forward(
        self, x: Tensor, state: None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        assert isinstance(self, Attention)
        ranks = self.pieces.ranks
        assert state is None
        group = ranks.group or dist.distributed_c10d._get_default_group()
        projected = [self.q(x), self.k(x), self.v(x)]
        tails: tuple[Tensor | None, ...] = (None,) * 3
        if self.convs is not None:
            left = [
                conv.next_tail(part, document_starts)  # type: ignore[operator]
                for conv, part in zip(self.convs, projected, strict=True)
            ]
            tails = _Shift.apply(torch.stack(left), ranks).unbind(0)
        first = ranks.rank * x.shape[1]
        q, k, v, _ = self.prepare(projected, tails, document_starts, first)
        q, k, v = (exchange(part, 1, 2, group) for part in (q, k, v))
        if document_starts is not None:
            parts = [torch.empty_like(document_starts) for _ in range(ranks.size)]
            dist.all_gather(parts, document_starts.contiguous(), group=group)
            document_starts = torch.cat(parts, dim=1)
        mixed = exchange(self.attend(q, k, v, document_starts), 2, 1, group)
        return self.finish(mixed), None


class _Shift(Function):
    """Every rank's x goes to the rank after; the first gets zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _shifted(x, ranks, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _shifted(grad, ctx.ranks, -1), None


def _shifted(x: Tensor, ranks: Ranks, by: int) -> Tensor:
    came, x = torch.zeros_like(x), x.contiguous()
    operations = []
    if 0 <= ranks.rank + by < ranks.size:
        to = ranks.global_rank(ranks.rank + by)
        operations.append(dist.P2POp(dist.isend, x, to, group=ranks.group))
    if 0 <= ranks.rank - by < ranks.size:
        source = ranks.global_rank(ranks.rank - by)
        operations.append(dist.P2POp(dist.irecv, came, source, group=ranks.group))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return came


def pass_on(model: HopeModel, ranks: Ranks) -> Pieces:
    """Let every mixer of `model` work on its rank's piece of the sequences."""
    pieces = Pieces(ranks)
    for module in model.modules():
        mixin: type[nn.Module]
        if isinstance(module, SelfModifyingTitans):
            mixin = PassingTitans
        elif isinstance(module, Attention):
            mixin = ExchangingAttention
        else:
            continue
        kind = type(module)
        module.__class__ = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {})
        module.__dict__["pieces"] = pieces
    return pieces
