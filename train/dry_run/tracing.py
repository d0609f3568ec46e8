"""What a part of the model keeps and touches, found by running it on the meta device.

Tensors there have shapes and no memory; a dispatch mode sees every one of them come and go. What an
operator uses inside itself it doesn't see: of the scan's, this module runs the body too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from hope.attention import Attention
from hope.scan import chunked
from hope.scan.native import operators as native
from hope.scan.operators import config_of, empty_outputs
from hope.scan.run import Run
from train.parallel.part import Part

_SEGMENTS = 2
"""Segments of the scan after which what it uses inside repeats itself."""


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made within this context that are still alive, and their peak.

    scan: "native", or of which device type PyTorch's scan is to be, "cpu" or another. ignored:
    tensors whose storages don't count.
    """

    def __init__(self, scan: str = "cpu", ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._scan = scan
        self._known: Any = WeakIdKeyDictionary()
        self._references: set[Any] = set()
        for tensor in ignored:
            self._known[tensor.untyped_storage()] = True

    def reset_peak(self) -> None:
        """Let the peak begin again from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0.0
        if func._schema.name in _THE_SAME:
            return args[0]
        if func._schema.name in _BODIES:
            inside = scan_scratch(func._schema.name, args, self._scan)
            self.peak = max(self.peak, self.live + inside)
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.is_meta:
                self._add(_local(one))
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        self.live += size

        def gone(reference: Any) -> None:
            self.live -= size
            self._references.discard(reference)

        self._references.add(weakref.ref(storage, gone))


_THE_SAME = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
"""Operators that give back what they take; on the meta device they would make another tensor."""

_BODIES: dict[str, Any] = {
    "hope::scan_chunked": chunked.forward,
    "hope::scan_chunked_backward": chunked.backward,
}
_scratch_of: dict[Any, int] = {}


_NATIVE_BODIES = {
    "hope::scan_chunked": native.forward,
    "hope::scan_chunked_backward": native.backward,
}


def scan_scratch(name: str, args: tuple[Any, ...], scan: str) -> int:
    """Bytes that a call of one of the scan's operators has at its peak, its results included; scan
    as of `LiveBytes`.

    PyTorch's buffers are used again for every chunk and slice of heads, so that a slice and two
    segments tell of all; the results are as long as the sequence.
    """
    key = (name, scan, torch.get_num_threads(), tree_map(_shape_of, args))
    if key not in _scratch_of and scan == "native":
        with torch.no_grad(), LiveBytes() as counted:
            _NATIVE_BODIES[name](*args)
        _scratch_of[key] = counted.peak
    if key not in _scratch_of:
        operator = torch.ops.hope.scan_chunked.default._schema
        if name.endswith("backward"):
            operator = torch.ops.hope.scan_chunked_backward.default._schema
        bound = dict(zip([a.name for a in operator.arguments], args, strict=False))
        whole = _results(name, bound)
        some = _first_heads_and_segments(bound, scan)
        with torch.no_grad(), LiveBytes() as counted:
            _BODIES[name](*some.values())
        _scratch_of[key] = max(0, counted.peak - _results(name, some)) + whole
    return _scratch_of[key]


def _shape_of(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _results(name: str, bound: dict[str, Any]) -> int:
    """Bytes of the tensors that the operator returns."""
    if name.endswith("backward"):
        names = ("x", "q", "w1", "w2", "w_eta", "b_eta", "w_alpha", "b_alpha", "state1", "state2")
        return sum(bound[one].nbytes for one in names if bound[one] is not None)
    config = _scan_config(bound)
    made = empty_outputs(bound["x"], bound["w1"], config, bound["save"])
    return sum(one.nbytes for one in made)


def _scan_config(bound: dict[str, Any]) -> Any:
    names = ("memory_chunk", "projection_chunk", "eta_max", "delta_rule", "decay_to", "read")
    return config_of(
        **{one: bound[one] for one in names}, checkpoint_chunks=bound["checkpoint_chunks"]
    )


def _first_heads_and_segments(bound: dict[str, Any], device: str) -> dict[str, Any]:
    """The same call for the heads that are worked on together, and the first segments."""
    config, x = _scan_config(bound), bound["x"]
    weights = [bound[one] for one in ("w1", "w2", "w_eta", "b_eta", "w_alpha", "b_alpha")]
    run = Run(config, x, bound["q"], weights, bound["reset"])
    heads = run.head_slices(device)[0]
    segment = config.segment_chunks * config.projection_chunk
    tokens = slice(0, min(x.shape[2], _SEGMENTS * segment))
    segments = slice(0, -(-tokens.stop // segment) - 1)
    cuts: dict[str, Callable[[Tensor], Tensor]] = {
        **{one: lambda z: z[:, heads, tokens] for one in ("x", "q", "d_out")},
        **{one: lambda z: z[:, heads] for one in ("w1", "w2")},
        **{one: lambda z: z[heads] for one in ("w_eta", "b_eta", "w_alpha", "b_alpha")},
        **{one: lambda z: z[:, :, heads] for one in ("state1", "state2", "d_final1", "d_final2")},
        **{one: lambda z: z[segments, :, heads] for one in ("saved1", "saved2")},
        "reset": lambda z: z[:, tokens],
    }
    return {
        name: cuts[name](value) if isinstance(value, Tensor) else value
        for name, value in bound.items()
    }


class FusedAttention:
    """Softmax attention as fused kernels do it, of which the meta device knows nothing; it takes
    the place of flash-attn in `hope.attention.Attention`. Documents cost a mask, as in torch's."""

    def takes(self, q: Tensor) -> bool:
        """Any."""
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> Tensor:
        mask = None
        if document_starts is not None:
            rows, length = document_starts.shape
            mask = q.new_empty(rows, 1, length, length)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask
        )[0]


@dataclass(frozen=True)
class PartBytes:
    """Bytes of one micro-batch in a part of the model, beside parameters and what is given.

    forward: at the peak of its forward pass; kept: after it; backward: at the peak of its backward
    pass, `kept` included, with gradients of parameters that appear as it goes; again: the same
    where they are there already and are added to (they don't count); left: after it, for the rest
    of the step (carried state); gradients: those of the parameters. Where gradients don't stay
    (`released`) backward is its peak from the first of them on, early that before. With a backward
    pass in halves
    (zero-bubble schedules): backward and between, at the peak of the first half, by the inputs, and
    after it; weights, weights_again, at the peak of the second, by the parameters.
    """

    forward: int
    kept: int
    backward: int
    again: int
    left: int
    gradients: int
    between: int = 0
    weights: int = 0
    weights_again: int = 0
    early: int = 0


def trace_part(
    part: Part,
    inputs: tuple[Any, ...],
    loss: Callable[[Tensor], Tensor] | None,
    scan: str,
    given: Iterable[Tensor] = (),
    released: Callable[[str], bool] | None = None,
    halves: bool = False,
    piped: bool = False,
) -> PartBytes:
    """Run one micro-batch of a part on the meta device, twice.

    inputs: of `part`; loss: of its logits where the model ends here; scan: as of `LiveBytes`;
    given: more tensors that are not to be counted; released: the names of parameters whose
    gradients don't stay (FSDP2 takes a layer's as soon as it is done); halves: backward by the
    inputs first, then by the parameters; piped: what goes out, logits too, is held until backward
    is over, as torch's schedules do.
    """
    parameters = dict(part.model.named_parameters())
    ignored = [_local(p) for p in parameters.values()]
    ignored += [one for one in (*inputs, *given) if isinstance(one, Tensor) and one.is_meta]
    early: list[int] = []
    handles = []

    def release(parameter: Tensor) -> None:
        if not early:
            early.append(counted.peak)
            counted.reset_peak()
        parameter.grad = None

    for name, parameter in parameters.items():
        parameter.grad = None
        if released is not None and released(name):
            handles.append(parameter.register_post_accumulate_grad_hook(release))
    for module in part.model.modules():
        if isinstance(module, Attention):
            module.flash = FusedAttention()  # type: ignore[assignment]
    with LiveBytes(scan, ignored) as counted:
        once, twice = (
            _trace_pass(part, inputs, loss, counted, early, halves, piped) for _ in range(2)
        )
    for handle in handles:
        handle.remove()
    return replace(once, again=twice.backward, weights_again=twice.weights)


def _trace_pass(
    part: Part,
    inputs: tuple[Any, ...],
    loss: Callable[[Tensor], Tensor] | None,
    counted: LiveBytes,
    early: list[int],
    halves: bool,
    piped: bool,
) -> PartBytes:
    """One micro-batch, forward and backward; see `trace_part`. `again` is as `backward`, and
    `weights_again` as `weights`. early: taken for where the hooks of released gradients note the
    peak before the first of them."""
    before, had = counted.live, _gradients(part)
    early.clear()
    counted.reset_peak()
    y = part(*inputs)
    held = y if piped else None
    y = y if loss is None else loss(y)
    forward, kept = counted.peak - before, counted.live - before
    counted.reset_peak()
    backward, between, groups = kept, kept, None
    if halves and not part.first:
        # As torch's schedules do it; a first stage has no inputs to derive by.
        _, groups = stage_backward_input([y], [torch.empty_like(y)], [inputs[0]], _of(part))
        backward, between = counted.peak - before, counted.live - before
        counted.reset_peak()
    if groups is not None:
        stage_backward_weight(_of(part), groups)
        del groups
    else:
        y.backward(torch.empty_like(y))
    last = counted.peak - before
    del y, held
    if isinstance(inputs[0], Tensor):
        inputs[0].grad = None
    gradients = _gradients(part)
    left = counted.live - before - (gradients - had)
    part._after.clear()
    first = backward if halves else last
    return PartBytes(
        forward=forward,
        kept=kept,
        backward=first,
        again=first,
        left=left,
        gradients=gradients,
        between=between,
        weights=last,
        weights_again=last,
        early=early[0] - before if early else first,
    )


def _gradients(part: Part) -> int:
    """Bytes of the gradients that parameters have."""
    return sum(_local(p.grad).nbytes for p in _of(part) if p.grad is not None)


def _of(part: Part) -> Iterator[Parameter]:
    return part.model.parameters()


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
