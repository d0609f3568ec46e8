"""Two streams of a GPU: whatever launches on both have in hand is in an order that they wait for.

Without a GPU everything runs in the order it is given in, and a wait that is missing shows nowhere.
Here no kernel runs: what each would read and write, and what torch's own operators do, is noted
with a vector clock of the streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hope.scan import ScanConfig
from hope.scan.contract import MEM
from tests.hope.scan.cases import make_problem

pytest.importorskip("triton")

from hope.scan import launch, segments
from hope.scan.cuda import device
from hope.scan.cuda.launch import CudaLauncher

STATES = {"state", "frozen", "deltas", "work", "frames", "systems", "sums"}
MADE = {"k", "v", "eta", "log_alpha", "query"}
SENT = {"dk", "dv", "d_log_eta", "d_log_alpha", "d_base", "d_state", "work", "scratch", "stash"}
OF_GATES = {"d_readout", "d_bias"}
WRITTEN = {
    "make_frames": {"frames"},
    "project_forward": MADE,
    "project_backward": {"dx", "d_state"} | OF_GATES,
    "write_forward": STATES,
    "write_forward_mem": STATES | {"out"},
    "write_backward": SENT | {"sums"},
    "write_backward_mem": SENT | {"sums", "dq"},
    "on chip write_forward": MADE | STATES,
    "on chip write_forward_mem": STATES | {"out"},
    "on chip write_backward": SENT | {"sums", "dx"} | OF_GATES,
    "on chip write_backward_mem": SENT | {"sums", "dq"},
}
"""By kernel ("_mem": on M_mem)."""


class Stream:
    """What it and those it has waited for had done, as far as a launch on it can know."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.done: Counter[Stream] = Counter()

    def record_event(self) -> Counter[Stream]:
        return self.done.copy()

    def wait_event(self, event: Counter[Stream]) -> None:
        self.done |= event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.done)


class Access(NamedTuple):
    """By a launch: the nth of a stream, to memory from .. to."""

    what: str
    stream: Stream
    nth: int
    start: int
    stop: int
    writes: bool


class Order(TorchDispatchMode):
    """Notes accesses of launches and operators, and those that nothing keeps apart."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.gpu = torch.device("cuda", 0)
        self.stream = Stream(self.gpu)
        self.accesses: list[Access] = []
        self.races: set[tuple[str, str]] = set()
        self._inputs = {z.untyped_storage().data_ptr() for z in inputs}  # which none writes to
        self._alive: list[Any] = []  # so that no memory is handed out twice

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def note(self, what: str, tensors: dict[str, Any], written: set[str]) -> None:
        stream = self.stream
        stream.done[stream] += 1
        self._alive.append(tensors)
        mine = []
        for name, z in tensors.items():
            if isinstance(z, Tensor) and z.numel():
                writes = name in written and z.untyped_storage().data_ptr() not in self._inputs
                span = sum((n - 1) * step for n, step in zip(z.shape, z.stride(), strict=True))
                stop = z.data_ptr() + (span + 1) * z.element_size()
                place = (stream.done[stream], z.data_ptr(), stop)
                mine.append(Access(f"{what}: {name}", stream, *place, writes))
        for old in self.accesses:
            if stream.done[old.stream] < old.nth:
                for new in mine:
                    if old.start < new.stop and new.start < old.stop and old.writes | new.writes:
                        self.races.add((old.what, new.what))
        self.accesses += mine

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view and "empty" not in function.__name__:
            given = function._schema.arguments
            named = {a.name: z for a, z in zip(given, args, strict=False)} | kwargs
            written = {a.name for a in given if a.alias_info and a.alias_info.is_write}
            flat = {f"{k} {n}": z for k, v in named.items() for n, z in enumerate(tree_leaves(v))}
            made = {} if written else {f"result {n}": z for n, z in enumerate(tree_leaves(result))}
            self.note(function.__name__, flat | made, {f"{k} 0" for k in written} | made.keys())
        return result


@pytest.mark.parametrize("memories", [5, 6])
@pytest.mark.parametrize("tokens", [30, 96])
@pytest.mark.parametrize("on_chip", [False, True])
def test_whatever_both_streams_touch_is_waited_for(
    on_chip: bool, tokens: int, memories: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = ((0, 0),)
    p = make_problem(1, 2, tokens, 64, memories=memories, resets=resets).to(torch.float32)
    weights, reset = [z.detach() for z in p.weights], p.reset
    x, q, given = p.x.detach(), p.q.detach(), tuple(z.detach() for z in p.state or ())
    d_out = torch.ones_like(x)
    order = Order([x, q, *weights, *given, d_out])

    def launched(self, kernel, grid, segment, mem, **arguments):  # type: ignore
        name = kernel.__name__ + "_mem" * (mem and kernel.__name__.startswith("write"))
        if name == "project_backward":
            arguments["d_state"] = arguments["d_state"][: grid[0]]
        unused = {"dq"} if name == "write_backward" else set()
        note(name, {"x": self.x} | arguments, unused)

    def launched_on_chip(name, options, grid, told):  # type: ignore
        unused = {"dq"} | (set() if memories > MEM + 1 else {"d_query"})
        if options.read > 0:
            name, unused = f"{name}_mem", OF_GATES | {"d_query"}
        note(f"on chip {name}", told, unused)

    def note(name: str, given: dict[str, Any], unused: set[str]) -> None:
        order.note(name, {k: z for k, z in given.items() if k not in unused}, WRITTEN[name])

    monkeypatch.setattr(launch.Launcher, "launch", launched)
    monkeypatch.setattr(device, "launch", launched_on_chip)
    monkeypatch.setattr(launch, "Beside", lambda _: segments.Beside(order.gpu))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", order.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: order.stream)

    config = ScanConfig(16, 16, checkpoint_chunks=1)
    kind = CudaLauncher if on_chip else launch.Launcher
    with order:
        launcher = kind(config, x, q, weights, reset)
        for kept in (0, launcher.segments - 1):
            out = torch.empty_like(x)
            saved = x.new_empty(kept, memories, 2, 2, 64, 64)
            launcher.add_base(launcher.forward(given, out, saved))
            out.clone()
        dx, dq = torch.empty_like(x), torch.empty_like(q)
        d_state = launcher.pack_gradient(None, None)
        made = launcher.backward(given, d_out, d_state, saved, dx, dq)
        for z in (dx, dq, d_state, *made):
            z.clone()
    assert {access.stream is order.stream for access in order.accesses} == {False, True}
    assert not order.races
