"""A block of C tokens of one memory: write, read, and their derivatives (Eqs. 83-90).

The closed form of `hope.scan.writes`, `reads` and `writes_backward`, which say more about it, for
one memory of one head and row, on tensors that a program holds. W2 and all that is shaped like it
are transposed here: w1 and w2 are both [D, H]. f1, f2: the frozen W; b1, b2: M_0, used where
INITIAL (decay towards it); d1, d2: Delta = W - M_0 (W itself without INITIAL) before the block.
DELTA1, DELTA2: does the rule have a delta term of W1, of W2; TARGET: is it `target`, which
does not write W2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope.scan.kernels.primitives import (
    NORM_EPS,
    STEP_FLOOR,
    dot,
    exact_dot,
    gelu,
    inverse_length,
    log_decay_gradient,
    unit_backward,
    unit_lower_inverse,
)


@triton.jit
def key_inverse(k, eta, ratio, C: tl.constexpr, DELTA2: tl.constexpr, DOT: tl.constexpr):
    """(I + T)^-1 of W2's system, which all memories share: from k [C, D], eta [C], ratio [C, C]."""
    if DELTA2:
        strict = dot(k, tl.trans(k), DOT) * ratio * eta[:, None]
        inverse = unit_lower_inverse(strict, C, DOT)
    else:
        inverse = ratio  # not looked at
    return inverse


@triton.jit
def frozen_terms(k, v, f1, f2, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr):
    """What keys and values [C, D] give at the frozen state.

    act, slope, curvature: of W2 k [C, H]; act_v, slope_v: of W2 v; r [C, D]; pulled [C, H], W1^T r
    (not with TARGET); short [C], one over the target's length (TARGET only); e [C, H], W1's keys;
    length, step [C], with DELTA1 only.
    """
    act, slope, curvature = gelu(dot(k, f2, DOT))
    act_v, slope_v, _ = gelu(dot(v, f2, DOT))
    if TARGET:
        goal = v + dot(act_v, tl.trans(f1), DOT)
        short = inverse_length(goal)
        r = k - goal * short[:, None]
        pulled = act
    else:
        r = k - v + dot(act - act_v, tl.trans(f1), DOT)
        pulled = dot(r, f1, DOT)
        short = tl.sum(r, 1)
    length = tl.sqrt(tl.sum(act * act, 1))
    if DELTA1:
        e = act / tl.maximum(length, NORM_EPS)[:, None]
        step = length / (length * length + STEP_FLOOR)
    else:
        e = act
        step = length
    return act, slope, curvature, act_v, slope_v, r, pulled, short, e, length, step


@triton.jit
def solve(
    k, eta, prev, ratio, inverse2, r, slope, pulled, e, step, d1, d2, b1, b2,
    C: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """U1 [C, D] and U2 [C, H] (not with TARGET) of the recurrences, and W1's inverse [C, C]."""
    if DELTA1:
        g1 = r * step[:, None] + dot(e * prev[:, None], tl.trans(d1), DOT)
        if INITIAL:
            g1 += dot(e, tl.trans(b1), DOT)
        strict = dot(e, tl.trans(e), DOT) * ratio * eta[:, None]
        inverse1 = unit_lower_inverse(strict, C, DOT)
        u1 = exact_dot(inverse1, g1 * eta[:, None], DOT)
    else:
        inverse1 = ratio  # not looked at
        u1 = r * eta[:, None]
    if TARGET:
        u2 = pulled  # not looked at
    else:
        g2 = slope * pulled
        if DELTA2:
            g2 += dot(k * prev[:, None], d2, DOT)
            if INITIAL:
                g2 += dot(k, b2, DOT)
            u2 = exact_dot(inverse2, g2 * eta[:, None], DOT)
        else:
            u2 = g2 * eta[:, None]
    return u1, u2, inverse1


@triton.jit
def advance(k, end, total, e, u1, u2, d1, d2, TARGET: tl.constexpr, DOT: tl.constexpr):
    """Delta after the block."""
    d1 = d1 * total - dot(tl.trans(u1), e * end[:, None], DOT)
    d2 = d2 * total
    if not TARGET:
        d2 -= dot(tl.trans(k * end[:, None]), u2, DOT)
    return d1, d2


@triton.jit
def write(
    k, v, eta, prev, end, total, ratio, inverse2, f1, f2, d1, d2, b1, b2,
    C: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr,
    TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Write a block: Delta after it, U1, U2 and W1's keys."""
    _, slope, _, _, _, r, pulled, _, e, _, step = frozen_terms(k, v, f1, f2, DELTA1, TARGET, DOT)
    u1, u2, _ = solve(
        k, eta, prev, ratio, inverse2, r, slope, pulled, e, step, d1, d2, b1, b2,
        C, INITIAL, DELTA1, DELTA2, TARGET, DOT,
    )  # fmt: skip
    d1, d2 = advance(k, end, total, e, u1, u2, d1, d2, TARGET, DOT)
    return d1, d2, u1, u2, e


@triton.jit
def read_causal(
    q, k, prev, ratio, e, u1, u2, d1, d2, b1, b2,
    INITIAL: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The memory of each token's predecessor applied to q [C, D] (Eq. 83): out [C, D]; act and
    slope [C, H]; across1, across2 [C, C]: ratio * (act e^T) and ratio * (q k^T)."""
    z = dot(q * prev[:, None], d2, DOT)
    across2 = ratio
    if not TARGET:
        across2 = dot(q, tl.trans(k), DOT) * ratio
        z -= dot(across2, u2, DOT)
    if INITIAL:
        z += dot(q, b2, DOT)
    act, slope, _ = gelu(z)
    across1 = dot(act, tl.trans(e), DOT) * ratio
    out = q + dot(act * prev[:, None], tl.trans(d1), DOT) - dot(across1, u1, DOT)
    if INITIAL:
        out += dot(act, tl.trans(b1), DOT)
    return out, act, slope, across1, across2


@triton.jit
def read_causal_backward(
    d_out, q, k, prev, ratio, e, u1, u2, d1, d2, b1, b2,
    INITIAL: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `read_causal` from d_out [C, D], but for the matrices; see `read_outer`.

    dq, dk [C, D]; into U1 [C, D], U2 [C, H] (not with TARGET), e [C, H]; rows [C], what decay
    before t multiplies; act and dz [C, H], the hidden layer and the gradient before it.
    """
    _, act, slope, across1, across2 = read_causal(
        q, k, prev, ratio, e, u1, u2, d1, d2, b1, b2, INITIAL, TARGET, DOT
    )
    d_across = -dot(d_out, tl.trans(u1), DOT) * ratio
    d_act = dot(d_out, d1, DOT) * prev[:, None] + dot(d_across, e, DOT)
    rows = tl.sum(d_act * act, 1)
    de = dot(tl.trans(d_across), act, DOT)
    du1 = -dot(tl.trans(across1), d_out, DOT)
    if INITIAL:
        d_act += dot(d_out, b1, DOT)
    dz = d_act * slope
    dq = dot(dz, tl.trans(d2), DOT) * prev[:, None]
    if TARGET:
        dk, du2 = dq * 0.0, dz
    else:
        d_across = -dot(dz, tl.trans(u2), DOT) * ratio
        dq += dot(d_across, k, DOT)
        dk = dot(tl.trans(d_across), q, DOT)
        du2 = -dot(tl.trans(across2), dz, DOT)
    rows += tl.sum(dq * q, 1)
    if INITIAL:
        dq += dot(dz, tl.trans(b2), DOT)
    return dq + d_out, dk, du1, du2, de, rows, act, dz


@triton.jit
def read_outer(d_out, q, act, dz, share, DOT: tl.constexpr):
    """The matrices [D, H] of `read_causal_backward`: of W with share = prev [C], of M_0 at a
    fixed W with share = prev_lost."""
    d1 = dot(tl.trans(d_out), act * share[:, None], DOT)
    return d1, dot(tl.trans(q * share[:, None]), dz, DOT)


@triton.jit
def read_start(q, f1, f2, DOT: tl.constexpr):
    """The frozen memory applied to q [C, D] (Eq. 90): out [C, D], act and slope [C, H]."""
    act, slope, _ = gelu(dot(q, f2, DOT))
    return q + dot(act, tl.trans(f1), DOT), act, slope


@triton.jit
def read_start_backward(d_out, q, f1, f2, DOT: tl.constexpr):
    """Derivative of `read_start` from d_out [C, D]: dq, and into the frozen W [D, H] twice."""
    _, act, slope = read_start(q, f1, f2, DOT)
    dz = dot(d_out, f1, DOT) * slope
    dq = d_out + dot(dz, tl.trans(f2), DOT)
    return dq, dot(tl.trans(d_out), act, DOT), dot(tl.trans(q), dz, DOT)


@triton.jit
def through_recurrence(
    k, eta, prev, end, total, ratio, inverse1, inverse2, e, u1, u2, d1, d2, s1, s2, more1, more2,
    READ: tl.constexpr, DELTA1: tl.constexpr, DELTA2: tl.constexpr, TARGET: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """From the gradient s1, s2 of W after the block, and with READ more1 [C, D] and more2 [C, H]
    of U, to x1 [C, D] and x2 [C, H], those of the right-hand sides; to de [C, H] and dk [C, D] of
    the keys; p [C] = <dU, U> and boundary = <s, Delta after the block>."""
    du1 = -dot(e * end[:, None], tl.trans(s1), DOT)
    boundary = total * (tl.sum(s1 * d1) + tl.sum(s2 * d2)) + tl.sum(du1 * u1)
    if READ:
        du1 += more1
    if DELTA1:
        du1 = exact_dot(tl.trans(inverse1), du1, DOT)
    p = tl.sum(du1 * u1, 1)
    x1 = du1 * eta[:, None]
    de = -dot(u1 * end[:, None], s1, DOT)
    if DELTA1:
        gram = dot(x1, tl.trans(u1), DOT) * ratio
        de += dot(x1 * prev[:, None], d1, DOT) - dot(gram + tl.trans(gram), e, DOT)
    dk = k * 0.0
    x2 = u2
    if not TARGET:
        du2 = -dot(k * end[:, None], s2, DOT)
        boundary += tl.sum(du2 * u2)
        if READ:
            du2 += more2
        if DELTA2:
            du2 = exact_dot(tl.trans(inverse2), du2, DOT)
        p += tl.sum(du2 * u2, 1)
        x2 = du2 * eta[:, None]
        dk = -dot(u2 * end[:, None], tl.trans(s2), DOT)
        if DELTA2:
            gram = dot(x2, tl.trans(u2), DOT) * ratio
            dk += dot(x2 * prev[:, None], tl.trans(d2), DOT)
            dk -= dot(gram + tl.trans(gram), k, DOT)
    return x1, x2, de, dk, p, boundary


@triton.jit
def through_frozen(
    k, v, f1, f2, act, slope, curvature, act_v, slope_v, r, pulled, short, e, length, step,
    x1, x2, de, DELTA1: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """From the gradients x1, x2 of the frozen terms and de of W1's keys to dk, dv [C, D] and the
    frozen W [D, H] twice; rows [C]: <x, frozen terms>."""
    if DELTA1:
        floor = length * length + STEP_FLOOR
        d_step = tl.sum(x1 * r, 1)
        rows = d_step * step
        dr = x1 * step[:, None]
        da = unit_backward(de, e, 1.0 / tl.maximum(length, NORM_EPS))
        da += e * (d_step * (2.0 * STEP_FLOOR - floor) / (floor * floor))[:, None]
    else:
        rows = tl.sum(x1 * r, 1)
        dr, da = x1, de
    if TARGET:
        d_value = -unit_backward(dr, k - r, short)
        df1 = dot(tl.trans(d_value), act_v, DOT)
        dz_k = da * slope
        dz_v = dot(d_value, f1, DOT) * slope_v
        d_key = dr
    else:
        through = x2 * pulled
        rows += tl.sum(through * slope, 1)
        d_pulled = x2 * slope
        dr += dot(d_pulled, tl.trans(f1), DOT)
        df1 = dot(tl.trans(r), d_pulled, DOT) + dot(tl.trans(dr), act - act_v, DOT)
        d_act = dot(dr, f1, DOT)
        dz_k = through * curvature + (da + d_act) * slope
        dz_v = -d_act * slope_v
        d_key, d_value = dr, -dr
    df2 = dot(tl.trans(k), dz_k, DOT) + dot(tl.trans(v), dz_v, DOT)
    dk = d_key + dot(dz_k, tl.trans(f2), DOT)
    dv = d_value + dot(dz_v, tl.trans(f2), DOT)
    return dk, dv, df1, df2, rows


@triton.jit
def write_backward(
    k, v, q, d_out, eta, prev, end, total, prev_lost, total_lost, ratio, inverse2,
    f1, f2, d1, d2, b1, b2, s1, s2,
    C: tl.constexpr, READ: tl.constexpr, INITIAL: tl.constexpr, DELTA1: tl.constexpr,
    DELTA2: tl.constexpr, TARGET: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Derivative of `write` from s1, s2, the gradient of W after the block, and with READ of
    `read_causal` from d_out.

    dq (d_out without READ), dk, dv [C, D]; d log eta, d log alpha [C]; s1, s2 before the block;
    gradients of M_0 at fixed W (INITIAL only) and of the frozen W, [D, H] twice each.
    """
    act, slope, curvature, act_v, slope_v, r, pulled, short, e, length, step = frozen_terms(
        k, v, f1, f2, DELTA1, TARGET, DOT
    )
    u1, u2, inverse1 = solve(
        k, eta, prev, ratio, inverse2, r, slope, pulled, e, step, d1, d2, b1, b2,
        C, INITIAL, DELTA1, DELTA2, TARGET, DOT,
    )  # fmt: skip
    dq, more1, more2 = d_out, u1, u2
    rows = eta * 0.0
    if READ:
        dq, dk_read, more1, more2, de_read, rows, act_q, dz_q = read_causal_backward(
            d_out, q, k, prev, ratio, e, u1, u2, d1, d2, b1, b2, INITIAL, TARGET, DOT
        )
    x1, x2, de, dk, p, boundary = through_recurrence(
        k, eta, prev, end, total, ratio, inverse1, inverse2, e, u1, u2, d1, d2, s1, s2,
        more1, more2, READ, DELTA1, DELTA2, TARGET, DOT,
    )  # fmt: skip
    db1, db2 = total_lost * s1, total_lost * s2
    s1, s2 = s1 * total, s2 * total
    if READ:
        de += de_read
        dk += dk_read
        add1, add2 = read_outer(d_out, q, act_q, dz_q, prev, DOT)
        s1 += add1
        s2 += add2
        if INITIAL:
            add1, add2 = read_outer(d_out, q, act_q, dz_q, prev_lost, DOT)
            db1 += add1
            db2 += add2
    if DELTA1:
        s1 += dot(tl.trans(x1), e * prev[:, None], DOT)
        if INITIAL:
            db1 += dot(tl.trans(x1), e * prev_lost[:, None], DOT)
            own = dot(x1, b1, DOT)
            de += own
            rows -= tl.sum(own * e, 1)
    if DELTA2:
        s2 += dot(tl.trans(k * prev[:, None]), x2, DOT)
        if INITIAL:
            db2 += dot(tl.trans(k * prev_lost[:, None]), x2, DOT)
            own = dot(x2, tl.trans(b2), DOT)
            dk += own
            rows -= tl.sum(own * k, 1)
    dk_frozen, dv, df1, df2, rows_frozen = through_frozen(
        k, v, f1, f2, act, slope, curvature, act_v, slope_v, r, pulled, short, e, length, step,
        x1, x2, de, DELTA1, TARGET, DOT,
    )  # fmt: skip
    d_log_alpha = log_decay_gradient(p, rows - rows_frozen, boundary, C)
    return dq, dk + dk_frozen, dv, p, d_log_alpha, s1, s2, db1, db2, df1, df2
