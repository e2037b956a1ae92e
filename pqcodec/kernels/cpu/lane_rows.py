"""Law: eight rows of eight numbers: transpositions, together with what is done to rows on the way, and sums of rows."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pqcodec.kernels.cpu.lane_halves import bits_of_halves
from pqcodec.kernels.cpu.lane_memory import load_as, pointer_to, store_to
from pqcodec.kernels.cpu.lanes import FLOAT, I64, INT, LANES, has_feature, numbered, splat, vector_of


def _transposing(stages: int) -> Any:
    """target[place + 8 i + j] = source[start + j stride + i] factors[i] scales[j] for i, j in 0 .. 7, all float32, and then
    ``stages`` stages of sums and differences over i. ``factors`` is the vector of eight.
    """

    @intrinsic
    def apply(typingctx, source, start, stride, factors, scales, target, place):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            source, start, stride, factors, scales, target, place = args
            rows = []
            for j in range(LANES):
                row = load_as(builder, pointer_to(context, builder, signature.args[0], source, start), vector_of("float"), 4)
                scale = builder.load(pointer_to(context, builder, signature.args[4], scales, ir.Constant(I64, j)))
                rows.append(builder.fmul(row, builder.fmul(factors, splat(builder, scale, vector_of("float")))))
                start = builder.add(start, stride)
            for i, row in enumerate(_summed(builder, transposed(builder, rows), stages)):
                at = builder.add(place, ir.Constant(I64, LANES * i))
                store_to(builder, row, pointer_to(context, builder, signature.args[5], target, at), 4)
            return context.get_dummy_value()

        return types.void(source, types.int64, types.int64, FLOAT, scales, target, types.int64), emit

    return apply


def _transposing_back(stages: int) -> Any:
    """target[start + j stride + i] = sum[i] factors[i] first[j] second[j] + 0 for i, j in 0 .. 7, all float32.

    sum[i] is source[place + 8 i + j] after ``stages`` stages of sums and differences over i. Multiplied from left to right,
    each product rounded. ``factors`` is the vector of eight.
    """

    @intrinsic
    def apply(typingctx, source, place, factors, first, second, target, start, stride):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            source, place, factors, first, second, target, start, stride = args
            rows = []
            for i in range(LANES):
                at = builder.add(place, ir.Constant(I64, LANES * i))
                rows.append(
                    load_as(builder, pointer_to(context, builder, signature.args[0], source, at), vector_of("float"), 4)
                )
            for j, row in enumerate(transposed(builder, _summed(builder, rows, stages))):
                value = builder.fmul(row, factors)
                for number, array in ((3, first), (4, second)):
                    factor = builder.load(pointer_to(context, builder, signature.args[number], array, ir.Constant(I64, j)))
                    value = builder.fmul(value, splat(builder, factor, vector_of("float")))
                value = builder.fadd(value, ir.Constant(vector_of("float"), [0.0] * LANES))
                store_to(builder, value, pointer_to(context, builder, signature.args[5], target, start), 4)
                start = builder.add(start, stride)
            return context.get_dummy_value()

        return types.void(source, types.int64, FLOAT, first, second, target, types.int64, types.int64), emit

    return apply


transpose_two, transpose_three = (_transposing(stages) for stages in (2, 3))
transpose_back_two, transpose_back_three = (_transposing_back(stages) for stages in (2, 3))


def _narrowing(stages: int) -> Any:
    """target[j order + k + i] = sum[i] first[j], with the sign of i, and offset i of row j, as a 16-bit number; i, j: 0 .. 7.

    sum[i] is source[8 (k + i) + j], float32 or int32, after ``stages`` stages of sums and differences over i. ``flips``: bits
    that change signs, one for every lane. ``turning``: a Turning; ``tile``: where its phases of these rows begin. ``brain``:
    bfloat16, else float16. Every product and sum rounds.
    """

    @intrinsic
    def apply(typingctx, source, k, flips, first, turning, tile, target, order, brain):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            source, k, flips, first, turning, tile, target, order, brain = args
            kind = "float" if signature.args[0].dtype == types.float32 else "int"
            indices = [builder.add(k, ir.Constant(I64, i)) for i in range(LANES)]
            lanes = [builder.mul(index, ir.Constant(I64, LANES)) for index in indices]

            def lanes_at(number: int, array: Any, index: Any, kind: str) -> Any:
                return load_as(builder, pointer_to(context, builder, signature.args[number], array, index), vector_of(kind), 4)

            rows = _summed(builder, [lanes_at(0, source, place, kind) for place in lanes], stages)
            if kind == "int":
                rows = [builder.sitofp(row, vector_of("float")) for row in rows]
            factor = lanes_at(3, first, ir.Constant(I64, 0), "int")
            factors = [builder.xor(factor, lanes_at(2, flips, place, "int")) for place in lanes]
            values = [
                _product(context, builder, value, builder.bitcast(factor, vector_of("float")))
                for value, factor in zip(rows, factors, strict=True)
            ]
            before = builder.block
            with builder.if_then(builder.extract_value(turning, 0)):
                moved = _moved(context, builder, signature.args[4], turning, tile, indices, values)
                behind = builder.block
            values = _merged(builder, moved, behind, values, before)
            with builder.if_else(brain) as (one, other):
                with one:
                    brains = _brain_pairs(builder, values)
                    from_one = builder.block
                with other:
                    halves = _half_pairs(context, builder, values)
                    from_other = builder.block
            for line in _rows_of_pairs(builder, _merged(builder, brains, from_one, halves, from_other)):
                store_to(builder, line, pointer_to(context, builder, signature.args[6], target, k), 2)
                k = builder.add(k, order)
            return context.get_dummy_value()

        arguments = (source, types.int64, flips, first, turning, types.int64, target, types.int64, types.boolean)
        return types.void(*arguments), emit

    return apply


narrow_two, narrow_three = (_narrowing(stages) for stages in (2, 3))


def _moved(context: Any, builder: Any, kind: Any, turning: Any, tile: Any, indices: list[Any], values: list[Any]) -> list[Any]:
    """Values of a tile's coordinates at ``indices``, with their offsets."""
    fields = {name: (kind.types[i], builder.extract_value(turning, i)) for i, name in enumerate(kind.fields)}

    def number(name: str, index: Any) -> Any:
        return builder.load(pointer_to(context, builder, *fields[name], index))

    def product(name: str, phase: str, index: Any, place: Any) -> Any:
        phases = load_as(builder, pointer_to(context, builder, *fields[phase], place), vector_of("float"), 4)
        return builder.fmul(splat(builder, number(name, index), vector_of("float")), phases)

    found = []
    for index, value in zip(indices, values, strict=True):
        place = builder.add(tile, number("places", index))
        turned = builder.fadd(product("along", "cos", index, place), product("across", "sin", index, place))
        found.append(builder.fadd(value, turned))
    return found


def _merged(builder: Any, values: list[Any], block: Any, others: list[Any], other_block: Any) -> list[Any]:
    """The values that come from a block, or those of another one."""
    found = []
    for value, other in zip(values, others, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, block)
        phi.add_incoming(other, other_block)
        found.append(phi)
    return found


def _product(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """a * b + 0, rounded: 0 takes the sign off a product that is -0. One instruction where the CPU has it."""
    zero = ir.Constant(a.type, [0.0] * a.type.count)
    if has_feature(context, "+fma"):
        kind, name = ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, zero])
    return builder.fadd(builder.fmul(a, b), zero)


def _brain_pairs(builder: Any, values: list[Any]) -> list[Any]:
    """Each two vectors of finite float32 as one of pairs of bfloat16, ties to even: int lanes."""
    kind = vector_of("int")
    sixteen, one, most, high = (ir.Constant(kind, [number] * LANES) for number in (16, 1, 0x7FFF, 0xFFFF0000))
    upper = []
    for value in values:
        bits = builder.bitcast(value, kind)
        odd = builder.and_(builder.lshr(bits, sixteen), one)
        upper.append(builder.add(builder.add(bits, most), odd))
    return [builder.or_(builder.lshr(upper[i], sixteen), builder.and_(upper[i + 1], high)) for i in range(0, LANES, 2)]


def _half_pairs(context: Any, builder: Any, values: list[Any]) -> list[Any]:
    """The same of float16, within whose range the numbers are."""
    halves, mixed = [bits_of_halves(context, builder, value) for value in values], []
    for i in range(0, LANES, 2):
        both = builder.shuffle_vector(halves[i], halves[i + 1], numbered(*(n for l in range(LANES) for n in (l, LANES + l))))
        mixed.append(builder.bitcast(both, vector_of("int")))
    return mixed


def _rows_of_pairs(builder: Any, pairs: list[Any]) -> list[Any]:
    """Eight rows of eight 16-bit numbers, of four vectors that have two numbers of each row."""
    low, high = numbered(0, 8, 1, 9, 4, 12, 5, 13), numbered(2, 10, 3, 11, 6, 14, 7, 15)
    fours = [builder.shuffle_vector(pairs[i], pairs[i + 1], part) for i in (0, 2) for part in (low, high)]
    low, high = numbered(0, 1, 8, 9, 4, 5, 12, 13), numbered(2, 3, 10, 11, 6, 7, 14, 15)
    both = [builder.shuffle_vector(fours[i], fours[i + 2], part) for i in (0, 1) for part in (low, high)]
    return [builder.shuffle_vector(each, each, numbered(*range(k, k + 4))) for k in (0, 4) for each in both]


@intrinsic
def largest_of_rows(typingctx, source):  # type: ignore[no-untyped-def]
    """The largest of each of eight rows of eight int32, which follow one another from source[0] on: int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        places = (ir.Constant(I64, LANES * j) for j in range(LANES))
        rows = [
            load_as(builder, pointer_to(context, builder, signature.args[0], args[0], at), vector_of("int"), 4) for at in places
        ]
        rows = transposed(builder, rows)
        while len(rows) > 1:
            pairs = zip(rows[::2], rows[1::2], strict=True)
            rows = [builder.select(builder.icmp_signed(">", a, b), a, b) for a, b in pairs]
        return rows[0]

    return INT(source), emit


@intrinsic
def sums_of_rows(typingctx, source, start):  # type: ignore[no-untyped-def]
    """The sum of each of eight rows of eight float32, which follow one another from source[start] on: float lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, start = args
        rows = []
        for j in range(LANES):
            at = builder.add(start, ir.Constant(I64, LANES * j))
            rows.append(load_as(builder, pointer_to(context, builder, signature.args[0], source, at), vector_of("float"), 4))
        rows = transposed(builder, rows)
        while len(rows) > 1:
            rows = [builder.fadd(a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        return rows[0]

    return FLOAT(source, types.int64), emit


@intrinsic
def transpose(typingctx, array, at):  # type: ignore[no-untyped-def]
    """float32 array[at : at + 64], eight rows of eight, becomes its eight columns."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, at = args
        places = [builder.add(at, ir.Constant(I64, LANES * j)) for j in range(LANES)]
        pointers = [pointer_to(context, builder, signature.args[0], array, place) for place in places]
        rows = [load_as(builder, place, vector_of("float"), 4) for place in pointers]
        for place, row in zip(pointers, transposed(builder, rows), strict=True):
            store_to(builder, row, place, 4)
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


def _summed(builder: Any, rows: list[Any], stages: int) -> list[Any]:
    """The first ``stages`` stages of a Hadamard matrix of order 8, over eight vectors of float32 or int32."""
    more, less = (builder.add, builder.sub) if rows[0].type == vector_of("int") else (builder.fadd, builder.fsub)
    for step in (1, 2, 4)[:stages]:
        low = [i for i in range(LANES) if not i & step]
        pairs = {i: (rows[i], rows[i + step]) for i in low}
        rows = [less(*pairs[i - step]) if i & step else more(*pairs[i]) for i in range(LANES)]
    return rows


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """An 8 x 8 transposition in three rounds of shuffles."""
    rounds = (
        (1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15)),
        (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
        (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
    )
    for step, low, high in rounds:
        turned = list(rows)
        for i in range(LANES):
            if not i & step:
                turned[i] = builder.shuffle_vector(rows[i], rows[i + step], numbered(*low))
                turned[i + step] = builder.shuffle_vector(rows[i], rows[i + step], numbered(*high))
        rows = turned
    return rows
