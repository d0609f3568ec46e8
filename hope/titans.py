"""The self-modifying Titans mixer: everything around the scan (section 2, Eqs. 83-91)."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, rms_norm, silu

from hope.config import HopeConfig
from hope.convolution import CausalConvolution
from hope.init import Constant, Initialiser, Linear, Normal
from hope.scan import MemoryState, ScanWeights, scan
from hope.state import TitansState


def logit(share: float) -> float:
    """The number whose sigmoid is `share`."""
    return log(share / (1 - share))


class SelfModifyingTitans(nn.Module):
    """Projections, convolutions, the self-modifying memories, gate and output.

    forward(x [B, T, dim], state, document_starts) -> (y [B, T, dim], state). state None starts
    every row at the learned fast weights M_0. document_starts, bool [B, T], resets a row to M_0
    where it is set; with writes on these places must be multiples of projection_chunk from the
    state's last chunk boundary (ValueError otherwise).

    The learned starts M_box,0 are `memory_w1` [M, N, d, h] and `memory_w2` [M, N, h, d], boxes in
    the order k, v, eta, alpha, mem (, q).
    """

    ALIGNED_X, ALIGNED_Q = (0.7, 0.7), (1.0,)  # starting taps: a token and its predecessor; itself
    ALPHA_BIAS = 9.21  # sigmoid(9.21) = 0.9999, the fraction kept per token at the start

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        titans = config.titans
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.scan_config = titans.scan
        self.writes, self.adaptive_query = titans.writes, titans.adaptive_query
        self.norm_eps = config.norm_eps
        dim, heads, d = config.dim, config.num_heads, config.head_dim
        h = titans.memory_expansion * d
        std = dim**-0.5
        self.x_in = Linear(dim, dim, std)
        aligned = titans.start == "aligned"
        self.q_in = Linear(dim, dim, std, twin="x_in" if aligned else "")
        self.gate = Linear(dim, dim, std)
        self.out = Linear(dim, dim, std / (2 * config.num_layers) ** 0.5)
        taps = (self.ALIGNED_X, self.ALIGNED_Q) if aligned else (None, None)
        self.conv_x = CausalConvolution(dim, titans.conv_width, taps[0])
        self.conv_q = CausalConvolution(dim, titans.conv_width, taps[1])
        boxes = 6 if titans.adaptive_query else 5
        self.memory_w1 = nn.Parameter(torch.empty(boxes, heads, d, h))
        self.memory_w2 = nn.Parameter(torch.empty(boxes, heads, h, d))
        self.w_eta = nn.Parameter(torch.empty(heads, d))
        self.b_eta = nn.Parameter(torch.empty(heads))
        self.w_alpha = nn.Parameter(torch.empty(heads, d))
        self.b_alpha = nn.Parameter(torch.empty(heads))
        self.head_norm = nn.Parameter(torch.empty(heads, d))
        self.initialisers: dict[str, Initialiser] = {
            "memory_w1": Normal(0.5 * h**-0.5),
            "memory_w2": Normal(2.0 * d**-0.5),
            "w_eta": Normal(0.1 * d**-0.5),
            "b_eta": Constant(logit(titans.initial_eta / titans.scan.eta_max)),
            "w_alpha": Normal(0.1 * d**-0.5),
            "b_alpha": Constant(self.ALPHA_BIAS),
            "head_norm": Constant(1.0),
        }

    def initial_state(self, batch: int, decoding: bool) -> TitansState:
        """The state before the first token: M_0, empty convolution tails, nothing pending."""
        memory = None
        if self.writes:
            w1 = self.memory_w1.unsqueeze(1).expand(-1, batch, -1, -1, -1)
            w2 = self.memory_w2.unsqueeze(1).expand(-1, batch, -1, -1, -1)
            memory = MemoryState(w1, w2)
        tail = self.gate.weight.new_zeros(
            batch, self.conv_x.width - 1, self.num_heads * self.head_dim
        )
        pending = self.gate.weight.new_zeros(batch, self.num_heads, 0, self.head_dim)
        return TitansState(memory, tail, tail, pending, pending)

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, TitansState]:
        batch, length, dim = x.shape
        inputs, conv_x = self.conv_x(self.x_in(x), state.conv_x if state else None, document_starts)
        query, conv_q = self.conv_q(self.q_in(x), state.conv_q if state else None, document_starts)
        heads = (batch, length, self.num_heads, self.head_dim)
        inputs, query = inputs.view(heads).transpose(1, 2), query.view(heads).transpose(1, 2)
        if not self.adaptive_query:
            query = normalize(query, dim=-1)
        if self.writes:
            read, memory, inputs, query = self._scan(inputs, query, state, document_starts)
        else:
            read, memory = self._read_start(query), None
            inputs, query = inputs[:, :, :0], query[:, :, :0]
        mixed = rms_norm(read, (self.head_dim,), eps=self.norm_eps).transpose(1, 2)
        mixed = (mixed * self.head_norm).reshape(batch, length, dim)
        y = self.out(mixed.to(x.dtype) * silu(self.gate(x)))
        return y, TitansState(memory, conv_x, conv_q, inputs, query)

    def _scan(
        self,
        inputs: Tensor,
        query: Tensor,
        state: TitansState | None,
        document_starts: Tensor | None,
    ) -> tuple[Tensor, MemoryState, Tensor, Tensor]:
        """Read and write; returns (read, memory at the last chunk boundary, pending x, q)."""
        length = inputs.shape[2]
        memory = state.memory if state is not None else None
        pending = state.pending_x.shape[2] if state is not None else 0
        if state is not None and pending > 0:
            inputs = torch.cat([state.pending_x.to(inputs.dtype), inputs], dim=2)
            query = torch.cat([state.pending_q.to(query.dtype), query], dim=2)
            if document_starts is not None:
                nothing = document_starts.new_zeros(document_starts.shape[0], pending)
                document_starts = torch.cat([nothing, document_starts], dim=1)
        weights = ScanWeights(
            self.memory_w1, self.memory_w2, self.w_eta, self.b_eta, self.w_alpha, self.b_alpha
        )
        whole = inputs.shape[2] // self.scan_config.projection_chunk
        whole *= self.scan_config.projection_chunk
        if whole == inputs.shape[2] and pending == 0:
            read, memory = scan(inputs, query, weights, self.scan_config, memory, document_starts)
            return read, memory, inputs[:, :, :0], query[:, :, :0]
        head_starts = tail_starts = None
        if document_starts is not None:
            head_starts, tail_starts = document_starts[:, :whole], document_starts[:, whole:]
        reads = []
        if whole > 0:
            read, memory = scan(
                inputs[:, :, :whole], query[:, :, :whole], weights, self.scan_config, memory,
                head_starts,
            )  # fmt: skip
            reads.append(read)
        inputs, query = inputs[:, :, whole:], query[:, :, whole:]
        if inputs.shape[2] > 0:
            read, _ = scan(inputs, query, weights, self.scan_config, memory, tail_starts)
            reads.append(read)
            if memory is None:
                memory = self.initial_state(inputs.shape[0], decoding=True).memory
        assert memory is not None
        return torch.cat(reads, dim=2)[:, :, -length:], memory, inputs, query

    def _read_start(self, query: Tensor) -> Tensor:
        """o_t = M_mem,0(q_t): the memory-off control. query [B, N, T, d] -> [B, N, T, d]."""
        w1, w2 = self.memory_w1, self.memory_w2
        if self.adaptive_query:
            query = normalize(_apply(w1[5], w2[5], query), dim=-1)
        return _apply(w1[4], w2[4], query)


def _apply(w1: Tensor, w2: Tensor, z: Tensor) -> Tensor:
    """M(z) = z + W1 act(W2 z) (89), for z [B, N, T, d] and one memory of every head."""
    hidden = gelu(z @ w2.transpose(-1, -2), approximate="tanh")
    return z + hidden @ w1.transpose(-1, -2)
