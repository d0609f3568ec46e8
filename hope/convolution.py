"""Causal depthwise convolution that respects documents and can be continued (section 2: conv4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hope.fused import Implementation, causal_convolution
from hope.init import Initialiser, Taps, Uniform


class CausalConvolution(nn.Module):
    """y_t = sum_j weight[width - 1 - j] * x_{t-j}, over the x of the same document only.

    x: [B, T, channels]. `tail`, the width - 1 inputs before x, makes a split sequence equal to
    the whole; without it the sequence starts from zeros. taps: the starting weights of x_t,
    x_{t-1}, ... in every channel (further ones 0); None starts each channel at random.
    fused: what computes it, as in `hope.fused.causal_convolution`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        taps: tuple[float, ...] | None = None,
        fused: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.width, self.fused = width, fused
        self.weight = nn.Parameter(torch.empty(width, channels))
        start = Uniform(width**-0.5) if taps is None else Taps(taps)
        self.initialisers: dict[str, Initialiser] = {"weight": start}

    def forward(
        self, x: Tensor, tail: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve x; also return the tail for the next call, in memory of its own.

        tail: [B, width - 1, channels] or None; document_starts: bool [B, T] or None.
        """
        y = causal_convolution(x, self.weight, tail, document_starts, self.fused)
        last, reach = x, self.width - 1
        if x.shape[1] < reach:
            before = x.new_zeros(x.shape[0], reach, x.shape[2]) if tail is None else tail
            last = torch.cat([before.to(x.dtype), x], dim=1)
        return y, self.next_tail(last, document_starts)

    def next_tail(self, x: Tensor, document_starts: Tensor | None) -> Tensor:
        """The tail after x [B, >= width - 1, channels]: its last inputs, zero where they are of an
        earlier document. document_starts: bool [B, T] of the last T of them, or None.
        """
        reach = self.width - 1
        last = x[:, x.shape[1] - reach :]
        if document_starts is None:
            return last.clone()
        document = torch.cumsum(document_starts, dim=1)
        document = torch.cat([document.new_zeros(x.shape[0], reach), document], dim=1)
        earlier = document[:, document.shape[1] - reach :] != document[:, -1:]
        return last.masked_fill(earlier.unsqueeze(-1), 0)
