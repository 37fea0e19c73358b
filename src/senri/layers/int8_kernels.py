"""What ``int8_step.py`` does with a token, compiled by numba: products with weights in eight bits, and Llama's layers.

Shapes as there. Tensors come by their addresses: numba takes a microsecond to look at each array, and a layer has
thirty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

GROUP = 32  # weights of a row that share a scale and an offset: GGUF's blocks
BLOCK = GROUP + 8  # bytes of such a group: its levels, its scale and its offset, in the order in which they are read
PART = 256  # keys that one thread attends to at a time
MOST = 32767  # of sixteen bits: inputs are rounded to that many parts of the greatest one of their group
TINY = 1e-30  # instead of 0, to divide by


def _keeps() -> bool:
    """Whether there is a folder in which numba may keep what it compiled for the next process."""
    try:
        njit(cache=True)(_keeps)
    except RuntimeError:
        return False
    return True


_LONG, _INT, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_COMPILED = {"fastmath": True, "error_model": "numpy", "cache": _keeps()}


# Below numba's own language: loops over vectors as long as a group, which LLVM cuts into what the processor has. Its
# vectoriser adds up the lanes at the end of each inner loop, which for short ones takes as long as the loop.


def _loop(builder: Any, count: Any, start: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> Any:
    """``carried = body(index, carried)`` for each index below ``count``, once at least; the last ones carried."""
    entry, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    index, carried = builder.phi(_LONG), [builder.phi(value.type) for value in start]
    new = body(index, carried)
    following = builder.add(index, ir.Constant(_LONG, 1))
    for phi, before, value in zip((index, *carried), (ir.Constant(_LONG, 0), *start), (following, *new), strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return new


def _load(builder: Any, base: Any, index: Any, size: Any, kind: Any, align: int) -> Any:
    """What is ``index`` times ``size`` bytes behind ``base``."""
    size = ir.Constant(_LONG, size) if isinstance(size, int) else size
    address = builder.inttoptr(builder.add(base, builder.mul(index, size)), kind.as_pointer())
    return builder.load(address, align=align)


def _part(builder: Any, vector: Any, order: Sequence[int]) -> Any:
    """The lanes of ``vector`` in this ``order``."""
    lanes = ir.Constant(ir.VectorType(_INT, len(order)), list(order))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), lanes)


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    """A vector of equal numbers."""
    one = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    return _part(builder, builder.insert_element(one, number, ir.Constant(_INT, 0)), [0] * lanes)


def _plus_product(builder: Any, total: Any, a: Any, b: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=("fast",)), flags=("fast",))


def _zeros(lanes: int) -> Any:
    return ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)


def _add_up(builder: Any, vector: Any, start: Any) -> Any:
    kind = ir.FunctionType(_FLOAT, [_FLOAT, vector.type])
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return builder.call(builder.module.declare_intrinsic(name, (), kind), [start, vector], fastmath=("fast",))


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    """To float32 numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _pointer_to_bfloat16(typing_context: Any, address: Any) -> Any:
    """To the bits of such numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _from_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 number that has these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typing_context: Any, number: Any) -> Any:
    """Of a float32 number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _INT)

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _dot_of_groups(typing_context: Any, blocks: Any, x: Any, x_scale: Any, sums: Any, groups: Any) -> Any:
    """Sum over ``groups`` of scale * x_scale * (levels . x) + offset * sum; all but ``groups`` are addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        blocks, x, x_scale, sums, groups = arguments
        small, short, whole = (ir.VectorType(ir.IntType(bits), GROUP) for bits in (8, 16, 32))
        lanes = GROUP // 4

        def body(group: Any, carried: Sequence[Any]) -> Sequence[Any]:
            total, rest = carried
            weights = builder.zext(_load(builder, blocks, group, BLOCK, small, 1), short)
            inputs = _load(builder, x, group, 2 * GROUP, short, 2)
            product = builder.mul(builder.sext(weights, whole), builder.sext(inputs, whole))
            # with the sum of neighbours one instruction on x86
            pairs = builder.add(*(_part(builder, product, range(i, GROUP, 2)) for i in (0, 1)))
            found = builder.add(*(_part(builder, pairs, range(i, i + lanes)) for i in (0, lanes)))
            scale, offset = (
                _load(builder, builder.add(blocks, ir.Constant(_LONG, at)), group, BLOCK, _FLOAT, 1)
                for at in (GROUP, GROUP + 4)
            )
            of_x, sum_of_x = (_load(builder, address, group, 4, _FLOAT, 4) for address in (x_scale, sums))
            scales = _spread(builder, builder.fmul(scale, of_x, flags=("fast",)), lanes)
            found = builder.sitofp(found, ir.VectorType(_FLOAT, lanes))
            return _plus_product(builder, total, found, scales), _plus_product(builder, rest, offset, sum_of_x)

        total, rest = _loop(builder, groups, (_zeros(lanes), ir.Constant(_FLOAT, 0.0)), body)
        return _add_up(builder, total, rest)

    return types.float32(*[types.int64] * 5), generate


def _numbers(builder: Any, base: Any, index: Any, size: Any, half: bool) -> Any:
    """32 of them ``index`` times ``size`` bytes behind ``base``, in float32; ``half``: they are in bfloat16."""
    if not half:
        return _load(builder, base, index, size, ir.VectorType(_FLOAT, GROUP), 4)
    whole, bits = (ir.VectorType(ir.IntType(width), GROUP) for width in (32, 16))
    upper = builder.zext(_load(builder, base, index, size, bits, 2), whole)
    return builder.bitcast(builder.shl(upper, ir.Constant(whole, [16] * GROUP)), ir.VectorType(_FLOAT, GROUP))


def _dot_with(half: bool) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def dot(typing_context: Any, a: Any, b: Any, vectors: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def body(index: Any, carried: Sequence[Any]) -> Sequence[Any]:
                a = _numbers(builder, arguments[0], index, 4 * GROUP, False)
                b = _numbers(builder, arguments[1], index, (2 if half else 4) * GROUP, half)
                return [_plus_product(builder, carried[0], a, b)]

            (total,) = _loop(builder, arguments[2], [_zeros(GROUP)], body)
            return _add_up(builder, total, ir.Constant(_FLOAT, 0.0))

        return types.float32(*[types.int64] * 3), generate

    return dot


def _weighted_sum_with(half: bool) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def weighted_sum(typing_context: Any, weights: Any, rows: Any, stride: Any, count: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, rows, stride, count, out = arguments

            def body(index: Any, carried: Sequence[Any]) -> Sequence[Any]:
                weight = _spread(builder, _load(builder, weights, index, 4, _FLOAT, 4), GROUP)
                return [_plus_product(builder, carried[0], weight, _numbers(builder, rows, index, stride, half))]

            (total,) = _loop(builder, count, [_zeros(GROUP)], body)
            builder.store(total, builder.inttoptr(out, total.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return weighted_sum


# Of a row in float32 and one in float32 or bfloat16 at these addresses, of 32 numbers times the third argument.
_dot, _dot_half = (_dot_with(half) for half in (False, True))
# Of the first 32 numbers of rows (addresses of weights and rows, bytes from one row to the next, their number) to an
# address.
_weighted_sum, _weighted_sum_half = (_weighted_sum_with(half) for half in (False, True))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _address(x):  # type: ignore[no-untyped-def]
    return np.int64(x.ctypes.data)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _exp(x):  # type: ignore[no-untyped-def]
    """Of a float32 number, to 4e-6 of the result; the compiler knows none for vectors."""
    power = min(max(x * np.float32(1.4426950408889634), np.float32(-126)), np.float32(127))
    whole = np.floor(power + np.float32(0.5))
    rest = (power - whole) * np.float32(0.6931471805599453)
    series = np.float32(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = series * rest + np.float32(factor)
    return series * _from_bits((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _row(weights, x, r, b):  # type: ignore[no-untyped-def]
    """Of the product with ``x``, as :func:`_rounded` gives it, the number in row ``r`` of the weights."""
    blocks, bias = weights
    numbers, x_scale, sums = x
    groups = sums.shape[1]
    of = np.int64(b) * groups
    total = _dot_of_groups(
        blocks + np.int64(r) * groups * BLOCK,
        _address(numbers) + 2 * GROUP * of,
        _address(x_scale) + 4 * of,
        _address(sums) + 4 * of,
        groups,
    )
    return total + _pointer(bias)[r]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _rounded(x):  # type: ignore[no-untyped-def]
    """``x`` ``[B, in]`` in sixteen bits, the scale of each group and its sum ``[B, N]``, which offsets are times."""
    rows, groups = len(x), x.shape[1] // GROUP
    numbers = np.empty((rows, groups * GROUP), np.int16)
    scale, sums = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.float32)
    for b in range(rows):
        for g in range(groups):
            part, into = x[b, g * GROUP : (g + 1) * GROUP], numbers[b, g * GROUP : (g + 1) * GROUP]
            most, total = np.float32(TINY), np.float32(0)
            for j in range(len(part)):
                most = max(most, abs(part[j]))
                total += part[j]
            scale[b, g], sums[b, g] = most / np.float32(MOST), total
            factor = np.float32(MOST) / most
            for j in range(len(part)):
                into[j] = np.int16(np.rint(part[j] * factor))
    return numbers, scale, sums


@njit(parallel=True, **_COMPILED)  # type: ignore[untyped-decorator]
def linear(weights, x_address, out_address, rows, inner, outer):  # type: ignore[no-untyped-def]
    """``x`` ``[rows, inner]`` times the weights, addresses of blocks ``[outer, N, 40]`` and biases ``[outer]``."""
    x = _rounded(carray(_pointer(x_address), (rows, inner)))
    out = carray(_pointer(out_address), (rows, outer))
    for r in prange(outer):
        for b in range(rows):
            out[b, r] = _row(weights, x, r, b)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _rms_norm(x, weight, epsilon, out):  # type: ignore[no-untyped-def]
    for b in range(len(x)):
        square = np.float32(0)
        for i in range(x.shape[1]):
            square += x[b, i] * x[b, i]
        factor = np.float32(1 / math.sqrt(square / x.shape[1] + epsilon))
        for i in range(x.shape[1]):
            out[b, i] = x[b, i] * factor * weight[i]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _rotate(x, cos, sin, out):  # type: ignore[no-untyped-def]
    """A head ``x`` ``[D]`` at its position."""
    half = len(x) // 2
    for i in range(half):
        out[i] = x[i] * cos[i] - x[half + i] * sin[i]
        out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _put(row, address, half):  # type: ignore[no-untyped-def]
    """A row ``[D]`` to where it is kept, in bfloat16 if ``half``: the nearest, of two equally near the even one."""
    if half:
        kept = carray(_pointer_to_bfloat16(address), len(row))
        for d in range(len(row)):
            bits = _bits(row[d])
            kept[d] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    else:
        same = carray(_pointer(address), len(row))
        for d in range(len(row)):
            same[d] = row[d]


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _attend(query, keys, values, count, half, out, most, total):  # type: ignore[no-untyped-def]
    """Of queries ``[G, D]`` that share keys and values, addresses of ``[count, D]`` in float32 or, if ``half``,
    bfloat16: sums of values times exp(score - most) to ``out`` ``[G, D]``, the greatest scores to ``most`` and the sums
    of the exponentials to ``total``, ``[G]``.
    """
    group, width = len(query), query.shape[1]
    scale, vectors = np.float32(1 / math.sqrt(width)), width // GROUP
    size = 2 if half else 4
    scores = np.empty((group, count), np.float32)
    for p in range(count):
        for g in range(group):
            asked, key = _address(query) + g * 4 * width, keys + p * size * width
            scores[g, p] = scale * (_dot_half(asked, key, vectors) if half else _dot(asked, key, vectors))
    for g in range(group):
        weights, greatest, added = scores[g], scores[g, 0], np.float32(0)
        for p in range(len(weights)):
            greatest = max(greatest, weights[p])
        for p in range(len(weights)):
            weights[p] = _exp(weights[p] - greatest)
            added += weights[p]
        most[g], total[g] = greatest, added
        for i in range(vectors):
            to, rows = _address(out) + 4 * (g * width + GROUP * i), values + size * GROUP * i
            if half:
                _weighted_sum_half(_address(weights), rows, size * width, count, to)
            else:
                _weighted_sum(_address(weights), rows, size * width, count, to)


@njit(**_COMPILED)  # type: ignore[untyped-decorator]
def _join(outs, most, total, out):  # type: ignore[no-untyped-def]
    """What :func:`_attend` found in each part of the keys, ``[parts, D]`` and ``[parts]``, as one read ``[D]``."""
    greatest, added = most[0], np.float32(0)
    for part in range(len(most)):
        greatest = max(greatest, most[part])
    for d in range(len(out)):
        out[d] = 0
    for part in range(len(most)):
        factor = _exp(most[part] - greatest)
        added += factor * total[part]
        for d in range(len(out)):
            out[d] += factor * outs[part, d]
    for d in range(len(out)):
        out[d] /= added


@njit(parallel=True, **_COMPILED)  # type: ignore[untyped-decorator]
def layers(addresses, table, shape, epsilon):  # type: ignore[no-untyped-def]
    """All layers over one token a row.

    Args:
        addresses: of the hidden states ``[B, C]``, which become the output; of the normalised inputs of all layers
            ``[L, B, C]``, which are written; of cos and sin ``[B, D]``.
        table: ``[L, 16]`` int64, of each layer the addresses of blocks and biases of its four products, of its norms'
            weights, of keys and values ``[B, Hkv, room, D]``, their two rooms, and of the sinks' keys and values.
        shape: B, C, inner size, H, Hkv, D, keys that are seen, S: 0 where no sinks are, and 1 where keys and values are
            in bfloat16, the sinks', too; else 0.
    """
    rows, size, inner, heads, kv_heads, width, seen, num_sinks, half = shape
    row = (2 if half else 4) * width  # bytes of a key
    hidden = carray(_pointer(addresses[0]), (rows, size))
    all_normed = carray(_pointer(addresses[1]), (len(table), rows, size))
    cos, sin = carray(_pointer(addresses[2]), (rows, width)), carray(_pointer(addresses[3]), (rows, width))
    group, parts = heads // kv_heads, (seen + PART - 1) // PART
    sinks = 1 if num_sinks else 0  # a part of their own
    qkv = np.empty((rows, (heads + 2 * kv_heads) * width), np.float32)
    query, own = np.empty((rows, heads, width), np.float32), np.empty(width, np.float32)
    found = np.empty((rows, kv_heads, sinks + parts, group, width), np.float32)
    most = np.empty((rows, kv_heads, sinks + parts, group), np.float32)
    total = np.empty((rows, kv_heads, sinks + parts, group), np.float32)
    read = np.empty((rows, heads * width), np.float32)
    inside, product = np.empty((rows, size), np.float32), np.empty((rows, inner), np.float32)
    for layer in range(len(table)):
        of = table[layer]
        qkv_weights, o_weights = (of[0], of[1]), (of[2], of[3])
        gate_up_weights, down_weights = (of[4], of[5]), (of[6], of[7])
        normed = all_normed[layer]
        _rms_norm(hidden, carray(_pointer(of[8]), size), epsilon, normed)
        x = _rounded(normed)
        for r in prange(qkv.shape[1]):
            for b in range(rows):
                qkv[b, r] = _row(qkv_weights, x, r, b)
        raw = qkv.reshape(rows, heads + 2 * kv_heads, width)
        for b in range(rows):
            for h in range(heads):
                _rotate(raw[b, h], cos[b], sin[b], query[b, h])
            for h in range(kv_heads):
                _rotate(raw[b, heads + h], cos[b], sin[b], own)
                _put(own, of[10] + ((b * kv_heads + h) * of[12] + seen - 1) * row, half)
                _put(raw[b, heads + kv_heads + h], of[11] + ((b * kv_heads + h) * of[13] + seen - 1) * row, half)
        for i in prange(rows * kv_heads * parts):
            b, h, part = i // parts // kv_heads, i // parts % kv_heads, i % parts
            first, last, place = part * PART, min((part + 1) * PART, seen), sinks + part
            _attend(
                query[b, h * group : (h + 1) * group],
                of[10] + ((b * kv_heads + h) * of[12] + first) * row,
                of[11] + ((b * kv_heads + h) * of[13] + first) * row,
                last - first, half, found[b, h, place], most[b, h, place], total[b, h, place],
            )  # fmt: skip
        for b in range(rows):
            for h in range(kv_heads):
                if sinks:
                    behind = (b * kv_heads + h) * num_sinks * row
                    _attend(
                        raw[b, h * group : (h + 1) * group], of[14] + behind, of[15] + behind, num_sinks, half,
                        found[b, h, 0], most[b, h, 0], total[b, h, 0],
                    )  # fmt: skip
                for g in range(group):
                    to = (h * group + g) * width
                    _join(found[b, h, :, g], most[b, h, :, g], total[b, h, :, g], read[b, to : to + width])
        x = _rounded(read)
        for r in prange(size):
            for b in range(rows):
                hidden[b, r] += _row(o_weights, x, r, b)
        _rms_norm(hidden, carray(_pointer(of[9]), size), epsilon, inside)
        x = _rounded(inside)
        for r in prange(inner):
            for b in range(rows):
                gate = _row(gate_up_weights, x, r, b)
                product[b, r] = gate / (1 + _exp(-gate)) * _row(gate_up_weights, x, inner + r, b)
        x = _rounded(product)
        for r in prange(size):
            for b in range(rows):
                hidden[b, r] += _row(down_weights, x, r, b)
