"""The self-modifying Titans mixer: everything around the scan (section 2, Eqs. 83-91)."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from hope.config import HopeConfig
from hope.convolution import CausalConvolution
from hope.flops import Flops, linear_flops, product_flops, scan_flops, sum_flops
from hope.fused import Implementation, gated_rms_norm
from hope.init import Constant, Initialiser, Linear, Normal
from hope.scan import MemoryState, ScanWeights, initial_state, scan
from hope.sharding import Shard, ShardPlan, within
from hope.state import StateSpec, TensorSpec, TitansState, check_held, check_kind

FUSED: dict[str, Implementation] = {
    "auto": "auto",
    "native": "native",
    "triton": "triton",
    "cuda": "auto",
}
"""What computes convolutions, norm and gate, by the scan's implementation; torch with the rest."""


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
    the order k, v, eta, alpha, mem (, q). `num_heads` counts the heads held here: all of them, or
    this rank's when the parameters were divided by `shard_plan`.

    With writes off only M_mem,0 (and M_q,0) is read, and nothing looks at x: `x_in`, `conv_x`,
    `w_eta`, `b_eta`, `w_alpha` and `b_alpha` stay, so that the control has the model's parameters,
    but they are not used and get no gradient (`.grad` stays None).
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
        self.fused = FUSED.get(titans.scan.implementation, "torch")
        dim, heads, d = config.dim, config.num_heads, config.head_dim
        h = titans.memory_expansion * d
        std = dim**-0.5
        self.x_in = Linear(dim, dim, std)
        aligned = titans.start == "aligned"
        self.q_in = Linear(dim, dim, std, twin="x_in" if aligned else "")
        self.gate = Linear(dim, dim, std)
        self.out = Linear(dim, dim, std / (2 * config.num_layers) ** 0.5)
        taps = (self.ALIGNED_X, self.ALIGNED_Q) if aligned else (None, None)
        self.conv_x = CausalConvolution(dim, titans.conv_width, taps[0], self.fused)
        self.conv_q = CausalConvolution(dim, titans.conv_width, taps[1], self.fused)
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

    @property
    def unused(self) -> tuple[str, ...]:
        """The parameters that `forward` does not look at, which never get a gradient."""
        if self.writes:
            return ()
        return ("x_in.weight", "conv_x.weight", "w_eta", "b_eta", "w_alpha", "b_alpha")

    def initial_state(self, batch: int, decoding: bool) -> TitansState:
        """The state before the first token: M_0, empty convolution tails, nothing pending.

        M_0 as it is now: the memory is not the parameters'.
        """
        weight, channels = self.gate.weight, self.num_heads * self.head_dim
        memory = self._own_start(batch, weight.dtype) if self.writes else None
        tail_x = weight.new_zeros(batch, self.conv_x.width - 1 if self.writes else 0, channels)
        tail_q = weight.new_zeros(batch, self.conv_q.width - 1, channels)
        pending = weight.new_zeros(batch, self.num_heads, 0, self.head_dim)
        return TitansState(memory, tail_x, tail_q, pending, pending)

    def state_spec(
        self,
        batch: int,
        decoding: bool = False,
        tokens: int = 0,
        dtype: torch.dtype | None = None,
    ) -> StateSpec:
        """What `batch` rows carry after `tokens` tokens, by name within `TitansState`.

        dtype: the activations' (default: the parameters'). Fast weights are float32 whatever it
        is, float64 for float64; inputs since the last chunk boundary wait for the next call.
        """
        dtype = dtype or self.gate.weight.dtype
        channels, reach = self.num_heads * self.head_dim, self.conv_q.width - 1
        spec = {}
        waiting = 0
        if self.writes:
            fast = torch.promote_types(dtype, torch.float32)
            for name, start in (("w1", self.memory_w1), ("w2", self.memory_w2)):
                shape = (start.shape[0], batch, self.num_heads, *start.shape[2:])
                spec[f"memory.{name}"] = TensorSpec(shape, fast, row_axis=1, shard_axis=2)
            waiting = tokens % self.scan_config.projection_chunk
        pending = (batch, self.num_heads, waiting, self.head_dim)
        tail_x = (batch, reach if self.writes else 0, channels)
        spec["conv_x"] = TensorSpec(tail_x, dtype, row_axis=0, shard_axis=2)
        spec["conv_q"] = TensorSpec((batch, reach, channels), dtype, row_axis=0, shard_axis=2)
        spec["pending_x"] = TensorSpec(pending, dtype, row_axis=0, shard_axis=1)
        spec["pending_q"] = TensorSpec(pending, dtype, row_axis=0, shard_axis=1)
        return spec

    def shard_plan(self) -> ShardPlan:
        """Heads are divided: projections in by column, the output by row."""
        plan: ShardPlan = {}
        for name in ("x_in", "q_in", "gate"):
            plan |= within(name, {"weight": Shard(0)})
        for name in ("conv_x", "conv_q"):
            plan |= within(name, {"weight": Shard(1)})
        for name in ("memory_w1", "memory_w2"):
            plan[name] = Shard(1)
        for name in ("w_eta", "b_eta", "w_alpha", "b_alpha", "head_norm"):
            plan[name] = Shard(0)
        return plan | within("out", {"weight": Shard(1)})

    def flops_per_token(self, seq_len: int, executed: bool = True) -> Flops:
        """Matrix products per token of a sequence of seq_len tokens; see `hope.flops`."""
        linears = [linear_flops(one) for one in (self.q_in, self.gate, self.out)]
        memories, _, d, h = self.memory_w1.shape
        if not self.writes:
            read = 2 + 2 * self.adaptive_query
            return sum_flops([*linears, product_flops(read * self.num_heads * d * h)])
        return sum_flops(
            [
                linear_flops(self.x_in),
                *linears,
                scan_flops(self.scan_config, self.num_heads, d, h, memories, seq_len, executed),
            ]
        )

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, TitansState]:
        batch, length, _ = x.shape
        check_kind(state, TitansState)
        if state is not None and (state.memory is not None) != self.writes:
            theirs, ours = str(not self.writes).lower(), str(self.writes).lower()
            raise ValueError(f"state: of a layer with titans.writes={theirs}, this one has {ours}")
        heads = (batch, length, self.num_heads, self.head_dim)
        query, conv_q = self.conv_q(self.q_in(x), state.conv_q if state else None, document_starts)
        query = query.view(heads).transpose(1, 2)
        if not self.adaptive_query:
            query = normalize(query, dim=-1)
        if self.writes:
            inputs, conv_x = self.conv_x(
                self.x_in(x), state.conv_x if state else None, document_starts
            )
            inputs = inputs.view(heads).transpose(1, 2)
            read, memory, inputs, query = self._scan(inputs, query, state, document_starts)
        else:
            read, memory = self._read_start(query), None
            conv_x = conv_q.new_zeros(batch, 0, conv_q.shape[2])
            inputs = query = query.new_zeros(batch, self.num_heads, 0, self.head_dim)
        mixed = gated_rms_norm(read, self.head_norm, self.gate(x), self.norm_eps, self.fused)
        return self.out(mixed), TitansState(memory, conv_x, conv_q, inputs, query)

    def _scan(
        self,
        inputs: Tensor,
        query: Tensor,
        state: TitansState | None,
        document_starts: Tensor | None,
    ) -> tuple[Tensor, MemoryState, Tensor, Tensor]:
        """Read and write; returns (read, memory at the last chunk boundary, pending x, q).

        What is returned to be carried has memory of its own, and none of the parameters'.
        """
        length = inputs.shape[2]
        memory = state.memory if state is not None else None
        pending = state.pending_x.shape[2] if state is not None else 0
        if state is not None and pending > 0:
            check_held("pending_x", state.pending_x, inputs)
            check_held("pending_q", state.pending_q, query)
            inputs = torch.cat([state.pending_x.to(inputs.dtype), inputs], dim=2)
            query = torch.cat([state.pending_q.to(query.dtype), query], dim=2)
            if document_starts is not None:
                nothing = document_starts.new_zeros(document_starts.shape[0], pending)
                document_starts = torch.cat([nothing, document_starts], dim=1)
        weights = self._weights()
        whole = inputs.shape[2] // self.scan_config.projection_chunk
        whole *= self.scan_config.projection_chunk
        if whole == inputs.shape[2] and pending == 0:
            read, memory = scan(inputs, query, weights, self.scan_config, memory, document_starts)
            return read, memory, inputs[:, :, :0].clone(), query[:, :, :0].clone()
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
            # A document that starts with what is pending starts from M_0 in the next call too.
            if memory is None:
                memory = self._own_start(inputs.shape[0], inputs.dtype)
            elif tail_starts is not None:
                start = self._start(inputs.shape[0], inputs.dtype)
                again = tail_starts[:, 0].view(1, -1, 1, 1, 1)
                memory = MemoryState(
                    *(torch.where(again, z0, z) for z0, z in zip(start, memory, strict=True))
                )
        assert memory is not None
        return torch.cat(reads, dim=2)[:, :, -length:], memory, inputs.clone(), query.clone()

    def _weights(self) -> ScanWeights:
        return ScanWeights(
            self.memory_w1, self.memory_w2, self.w_eta, self.b_eta, self.w_alpha, self.b_alpha
        )

    def _start(self, batch: int, dtype: torch.dtype) -> MemoryState:
        """M_0 for every row, a view where it can be, as activations of that dtype need it."""
        return initial_state(self._weights(), batch, torch.promote_types(dtype, torch.float32))

    def _own_start(self, batch: int, dtype: torch.dtype) -> MemoryState:
        """The same in memory of its own, which no optimizer step moves."""
        return MemoryState(*(z.clone() for z in self._start(batch, dtype)))

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
