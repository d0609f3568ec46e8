"""The machine that runs PTX: its arithmetic, and that it finds what a device must not do."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from hope.scan.cuda.nvrtc import library
from tools.ptx import arithmetic, matrices
from tools.ptx.group import ProgramError
from tools.ptx.machine import Machine
from tools.ptx.memory import GlobalMemory, SharedMemory
from tools.ptx.parsing import parse, split_operands

THREADS = 64
PREAMBLE = """
	ld.param.b64 	%rd1, [k_param_0];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;     // this thread's word of the buffer
	shl.b32 	%r3, %r1, 2;
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r3;        // ... and of shared memory
	xor.b32 	%r6, %r5, 128;        // the other warp's
"""


def launch(body: str, buffer: torch.Tensor, programs: int = 1, shared: int = 4 * THREADS) -> None:
    """Run a body of statements on a buffer; %rd3 and %r5 are a thread's words."""
    text = (
        ".version 8.7\n.target sm_90a\n.visible .entry k(\n"
        "	.param .u64 .ptr .global .align 1 k_param_0\n)\n"
        f".reqntid {THREADS}\n{{\n	.reg .b32 	%r<9>;\n{PREAMBLE}{body}\n	ret;\n}}\n"
    )
    storage = buffer.untyped_storage()
    memory = GlobalMemory([(storage.data_ptr(), storage.nbytes(), "buffer")])
    Machine(parse(text)).launch((programs, 1, 1), [storage.data_ptr()], shared, memory)


def numbers(count: int = 2 * THREADS) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


SEND = "st.shared.b32 [%r5], %r1;\n"
RECEIVE = "ld.shared.b32 %r7, [%r6];\n"
BARRIER = "bar.sync 0;\n"
STORE = "st.global.b32 [%rd3], %r7;\n"
COPY = "cp.async.ca.shared.global [%r5], [%rd3+256], 0x4;\ncp.async.commit_group;\n"
WAIT = "cp.async.wait_group 0;\n"


def test_warps_that_meet_at_a_barrier_may_exchange() -> None:
    buffer = numbers()
    launch(SEND + BARRIER + RECEIVE + STORE, buffer)
    assert buffer[:THREADS].tolist() == [i ^ 32 for i in range(THREADS)]


def test_what_nothing_has_written_is_a_nan() -> None:
    buffer = numbers()
    launch("ld.shared.b32 %r8, [%r5];\nadd.f32 %r7, %r6, %r8;\n" + STORE, buffer)
    assert buffer[:THREADS].view(torch.float32).isnan().all()
    launch("add.f32 %r7, %r1, %r8;\n" + STORE, buffer)
    assert buffer[:THREADS].view(torch.float32).isnan().all()


def test_an_asynchronous_copy_brings_what_is_waited_for() -> None:
    buffer = numbers()
    launch(COPY + WAIT + BARRIER + RECEIVE + STORE, buffer)
    assert buffer[:THREADS].tolist() == [THREADS + (i ^ 32) for i in range(THREADS)]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (SEND + RECEIVE, "read of what another warp has written since the last barrier"),
        (
            SEND + BARRIER + RECEIVE + SEND + "add.s32 %r8, %r1, 1;\nst.shared.b32 [%r5], %r8;",
            "write of what another warp has read since the last barrier",
        ),
        (
            "and.b32 %r7, %r5, -129;\nst.shared.b32 [%r7], %r1;",
            "two values written at once",
        ),
        ("st.shared.b32 [%r5+256], %r1;", "4 B at 256 of 256 B of shared memory"),
        ("st.shared.b32 [%r5+2], %r1;", "misaligned address of shared memory"),
        ("ld.global.b32 %r7, [%rd3+512];", "4 B at byte 512 of buffer (512)"),
        ("ld.global.v4.b32 {%r7,%r8,%r7,%r8}, [%rd3];", "misaligned address of global memory"),
        (COPY + "ld.shared.b32 %r7, [%r5];", "an asynchronous copy is still bringing"),
        (COPY + WAIT + RECEIVE, "read of what another warp has written since the last barrier"),
        (
            COPY + "st.global.b32 [%rd3+256], %r1;\n" + WAIT,
            "the source of an asynchronous copy changed while it ran",
        ),
        (COPY + SEND, "write over what an asynchronous copy is bringing"),
        ("selp.b32 %r7, %r1, %r2, %p1;", "%p1 is read before it is written"),
        (
            "setp.lt.u32 %p1, %r1, 40;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:",
            "a barrier of threads that are not together",
        ),
        (
            "setp.lt.u32 %p1, %r1, 40;\n@%p1 bra $L1;\n"
            "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r4];\n$L1:",
            "a part of a warp",
        ),
    ],
)
def test_what_a_device_must_not_do_is_found(body: str, complaint: str) -> None:
    with pytest.raises(ProgramError) as error:
        launch(body, numbers())
    assert complaint in str(error.value)
    assert "; line " in str(error.value)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("st.global.b32 [%rd3], %r2;", "two values written at once"),
        (
            "ld.global.b32 %r7, [%rd3];\nsetp.eq.b32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd3], %r2;",
            "write of what another program reads",
        ),
        (
            "setp.eq.b32 %p1, %r2, 0;\n@%p1 st.global.b32 [%rd3], %r2;\nld.global.b32 %r7, [%rd3];",
            "read of what another program writes",
        ),
    ],
)
def test_programs_must_not_meet_in_memory(body: str, complaint: str) -> None:
    with pytest.raises(ProgramError) as error:
        launch(body, numbers() + 7, programs=2)
    assert complaint in str(error.value)


MEET = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
PARTED = "setp.eq.b32 %p1, %r2, 0;\n@%p1 bra $L1;\nadd.s32 %r1, %r1, 100;\n$L1:\n"
OWN_AND_OTHER = (
    "mul.wide.u32 %rd5, %r2, 256;\nadd.s64 %rd6, %rd3, %rd5;\n"
    "xor.b32 %r7, %r2, 1;\nmul.wide.u32 %rd7, %r7, 256;\nadd.s64 %rd8, %rd3, %rd7;\n"
)


def test_programs_of_a_cluster_exchange_at_its_barrier() -> None:
    """Those that have branched apart too."""
    exchange = "st.global.b32 [%rd6], %r1;\n{}ld.global.b32 %r8, [%rd8];\n"
    keep = MEET + "st.global.b32 [%rd6], %r8;\n"
    buffer = numbers()
    launch(OWN_AND_OTHER + PARTED + exchange.format(MEET) + keep, buffer, programs=2)
    assert buffer.tolist() == [*range(100, 164), *range(64)]
    with pytest.raises(ProgramError, match=r"of what another program (reads|writes)"):
        launch(OWN_AND_OTHER + PARTED + exchange.format("") + keep, numbers(), programs=2)
    with pytest.raises(ProgramError, match="a cluster that some programs do not reach"):
        launch(f"setp.eq.b32 %p1, %r2, 0;\n@%p1 bra $L1;\n{MEET}$L1:\n", numbers(), programs=2)


def test_numbers_are_added_where_they_lie() -> None:
    buffer = torch.arange(2.0 * THREADS)
    two = "shl.b32 %r7, %r1, 3;\ncvt.u64.u32 %rd4, %r7;\nadd.s64 %rd5, %rd1, %rd4;\n"
    value = "mov.b32 %r8, 0f3F000000;\n"
    launch(two + value + "red.global.add.v2.f32 [%rd5], {%r8, %r8};\n" * 2, buffer)
    assert torch.equal(buffer, torch.arange(2.0 * THREADS) + 1)
    with pytest.raises(ProgramError, match="write of what another program"):
        launch(value + "red.global.add.f32 [%rd3], %r8;", buffer, programs=2)


def test_the_last_byte_of_an_odd_buffer_is_inside() -> None:
    buffer = torch.arange(4 * THREADS + 1, dtype=torch.int32).to(torch.uint8)
    load = "setp.eq.u32 %p1, %r1, 63;\n@%p1 ld.global.b8 {%rs1}, [%rd3+4];\n"
    launch(load + "@%p1 cvt.u32.u16 %r7, %rs1;\n@%p1 st.global.b32 [%rd3], %r7;\n", buffer)
    assert buffer[-5:].tolist() == [0, 0, 0, 0, 0]
    buffer[-1] = 9
    launch(load + "@%p1 cvt.u32.u16 %r7, %rs1;\n@%p1 st.global.b32 [%rd3], %r7;\n", buffer)
    assert buffer[-5:].tolist() == [9, 0, 0, 0, 9]


def test_programs_that_branch_apart_end_each_on_their_own() -> None:
    buffer = numbers(4 * THREADS)
    launch(
        """
        mul.wide.u32 %rd4, %r2, 256;
        add.s64 %rd3, %rd3, %rd4;
        mov.b32 %r7, 5;
        setp.eq.b32 %p1, %r2, 2;
        @%p1 bra $L_end;
        add.s32 %r7, %r7, %r2;
        $L_end:
        st.global.b32 [%rd3], %r7;
        """,
        buffer,
        programs=4,
    )
    assert buffer.view(4, THREADS).unique(dim=1).flatten().tolist() == [5, 6, 5, 8]


def test_threads_that_branch_apart_meet_again() -> None:
    """A loop of as many rounds as a thread's number has bits, and a branch within it."""
    buffer = numbers()
    launch(
        """
        mov.b32 %r6, %r1;
        mov.b32 %r7, 0;
        $L_again:
        setp.eq.u32 %p1, %r6, 0;
        @%p1 bra $L_end;
        and.b32 %r8, %r6, 1;
        setp.eq.u32 %p2, %r8, 0;
        @%p2 bra $L_even;
        add.s32 %r7, %r7, 1;
        $L_even:
        shr.u32 %r6, %r6, 1;
        bra.uni $L_again;
        $L_end:
        bar.sync 0;
        """
        + STORE,
        buffer,
    )
    assert buffer[:THREADS].tolist() == [i.bit_count() for i in range(THREADS)]


def test_a_parameter_may_be_a_structure() -> None:
    """Numbers at their offsets, also from a place that was computed; one kernel of two."""
    buffer = numbers()
    body = """
        ld.param.u64 %rd1, [k_param_0];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd2, %r1, 4;
        add.s64 %rd3, %rd1, %rd2;
        mov.b64 %rd4, k_param_0;
        add.s64 %rd5, %rd4, 8;
        ld.param.v2.u32 {%r2, %r3}, [%rd5+4];
        add.s32 %r7, %r2, %r3;
    """
    kernels = (
        f".visible .entry {name}(\n	.param .align 8 .b8 k_param_0[24]\n)\n"
        f".maxntid {THREADS}, 1, 1\n{{\n	.reg .b32 	%r<9>;\n{body}\n{more}{STORE}	ret;\n}}\n"
        for name, more in (("k", ""), ("k_other", "neg.s32 %r7, %r7;\n"))
    )
    storage = buffer.untyped_storage()
    memory = GlobalMemory([(storage.data_ptr(), storage.nbytes(), "buffer")])
    structure = struct.pack("=qiiii", storage.data_ptr(), 1, 20, 300, 4000)
    machine = Machine(parse(f".version 8.7\n{''.join(kernels)}", "k"))
    machine.launch((1, 1, 1), [structure], 4, memory)
    assert buffer[:THREADS].unique().tolist() == [320]


def test_an_instruction_that_is_missing_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"line \d+ .*: vadd4\.u32"):
        launch("vadd4.u32 %r7, %r1, %r1, %r1;", numbers())


def test_operands_are_split_outside_of_brackets() -> None:
    assert split_operands("{%r1, %r2}, [ %rd1 + 4 ], 0x10") == (
        "{%r1, %r2}",
        "[ %rd1 + 4 ]",
        "0x10",
    )


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("add.s32", [0x7FFFFFFF, 1], 0x80000000),
        ("mul.hi.u32", [0xFFFFFFFF, 0xFFFFFFFF], 0xFFFFFFFE),
        ("mul.wide.s32", [0xFFFFFFFF, 3], (1 << 64) - 3),
        ("mad.wide.u32", [0xFFFFFFFF, 2, 5], 0x200000003),
        ("rem.s32", [0xFFFFFFF9, 4], 0xFFFFFFFD),
        ("div.s32", [0xFFFFFFF9, 4], 0xFFFFFFFF),
        ("shl.b32", [1, 32], 0),
        ("shr.u32", [0x80000000, 31], 1),
        ("shr.s32", [0x80000000, 99], 0xFFFFFFFF),
        ("bfe.u32", [0x12345678, 8, 8], 0x56),
        ("bfe.s32", [0x00000080, 7, 1], 0xFFFFFFFF),
        ("prmt.b32", [0x33221100, 0x77665544, 0x7531], 0x77553311),
        ("prmt.b32", [0x00008000, 0, 0x9999], 0xFFFFFFFF),
        ("min.s32", [0xFFFFFFFF, 1], 0xFFFFFFFF),
        ("max.u32", [0xFFFFFFFF, 1], 0xFFFFFFFF),
        ("not.b32", [0], 0xFFFFFFFF),
    ],
)
def test_integers(name: str, values: list[int], expected: int) -> None:
    function, kinds = arithmetic.operation(name)  # type: ignore[misc]
    arrays = [
        np.array([value], f"u{arithmetic.TYPES[kind](0).itemsize}").view(arithmetic.TYPES[kind])
        for value, kind in zip(values, kinds, strict=True)
    ]
    found = np.asarray(function(*arrays))
    assert found.view(f"u{found.itemsize}").tolist() == [expected]


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (10_000,), generator=torch.manual_seed(0))
    ties = torch.arange(0x3F800000, 0x3F900000, 0x8000)
    x = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.tensor([torch.inf, -torch.inf, 3.4e38, 0.0, -0.0])])
    found = arithmetic.bfloat16(x.numpy())
    np.testing.assert_array_equal(found.view(np.int16), x.bfloat16().view(torch.int16).numpy())
    assert np.isnan(arithmetic.from_bfloat16(arithmetic.bfloat16(np.float32([np.nan])))).all()


def test_pairs_of_bfloat16_are_multiplied_as_torch_does() -> None:
    a, b = torch.randn(2, 64, generator=torch.manual_seed(0)).bfloat16()
    function, kinds = arithmetic.operation("mul.bf16x2")  # type: ignore[misc]
    assert kinds == ["b32", "b32"]
    found = function(*(z.view(torch.int32).numpy().view(np.uint32) for z in (a, b)))
    assert torch.equal(torch.from_numpy(found.view(np.int16)).view(torch.bfloat16), a * b)


def test_comparisons_with_nan() -> None:
    a, b = np.float32([1, np.nan]), np.float32([1, 1])
    for name, expected in {"eq": [True, False], "neu": [False, True], "geu": [True, True]}.items():
        function, _ = arithmetic.operation(f"setp.{name}.f32")  # type: ignore[misc]
        assert function(a, b).tolist() == expected


def test_sums_go_into_registers_and_back() -> None:
    d = np.arange(2 * 16 * 32, dtype=np.float32).reshape(2, 16, 32)
    registers = matrices.scatter_sums(d)
    assert len(registers) == 16
    # PTX ISA, m64nNk16: d0, d1 are row lane / 4, columns 2 (lane % 4); d2, d3 eight rows below.
    lane = 5
    assert [r.view(np.float32)[lane] for r in registers[:6]] == [
        d[0, row, column] for row, column in ((1, 2), (1, 3), (9, 2), (9, 3), (1, 10), (1, 11))
    ]
    np.testing.assert_array_equal(matrices.sums(registers, 32), d)


def test_wgmma_sees_only_what_a_fence_has_published() -> None:
    from tools.ptx.memory import Access, AccessError

    shared = SharedMemory(1, 64)
    index = shared.index(np.array([SharedMemory.BASE]), 2, np.array([0]))
    lane = Access(np.array([0]), np.array([0]), 1)
    shared.write(index, np.array([[1, 2]], np.uint16), lane)
    with pytest.raises(AccessError, match="fence"):
        shared.read(index, lane, by_tensor_cores=True)
    shared.fence += 1
    assert shared.read(index, lane, by_tensor_cores=True).tolist() == [[1, 2]]


def emulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.emulate_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_compiled_kernels_agree_with_torch() -> None:
    pytest.importorskip("triton")
    only = ("--kernels", "triton", "--dtypes", "bfloat16")
    done = emulate("--cases", "convolution", "gated_norm", "cross_entropy", *only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all agree"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["machine", "d64_h64_c16_resets", "d64_h64_c32_start_zero"])
def test_the_compiled_scan_in_bfloat16_agrees_with_float64(name: str) -> None:
    pytest.importorskip("triton")
    done = emulate("--cases", name, "--kernels", "triton", "--dtypes", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(isinstance(library(), str), reason=f"{library()}")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ("--cases", "d64_h64_c16", "--tokens", "40"), id="one", marks=pytest.mark.slow
        ),
        pytest.param((), id="all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_the_compiled_cuda_kernels_agree_with_float64(arguments: tuple[str, ...]) -> None:
    """... and no warp reads or writes what another has since the last barrier."""
    pytest.importorskip("triton")
    done = emulate("--kernels", "cuda", "--dtypes", "bfloat16", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_compiled_kernels_the_tool_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from tools import emulate_kernels

    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("kernels are compiled here")
    assert emulate_kernels.main([]) == 2
    assert capsys.readouterr().err.startswith("emulate_kernels: kernels are interpreted")
