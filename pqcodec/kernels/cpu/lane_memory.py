"""Law: lanes in memory: loads, stores, look-ups of many entries at once, transpositions, and fields of bits.

Arrays are 1-D and contiguous, and no index is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pqcodec.kernels.cpu.lanes import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    INT,
    LANES,
    LONG,
    SHORT,
    SHORTS,
    WHOLE,
    WIDE,
    numbered,
    splat,
    vector_of,
)


# -- loads and stores ----------------------------------------------------------------------------------------------------
def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _load(builder: Any, pointer: Any, vector: ir.Type, align: int) -> Any:
    load = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    load.align = align
    return load


def _store(builder: Any, value: Any, pointer: Any, align: int, past: bool = False) -> None:
    """``past``: non-temporal, which spares reading the line first."""
    stored = builder.store(value, builder.bitcast(pointer, value.type.as_pointer()))
    stored.align = align
    if past:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


_KIND_OF = {types.float32: FLOAT, types.int32: INT, types.uint32: INT, types.uint64: LONG}


@intrinsic
def load(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + 8]: float32 as float lanes, int32 and uint32 as int lanes, uint64 as long lanes."""
    lanes = _KIND_OF[array.dtype]

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _load(builder, _pointer(context, builder, signature.args[0], *args), vector_of(lanes.kind), 4)

    return lanes(array, types.int64), emit


@intrinsic
def load_wide(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + 16] as wide lanes (float32) or whole ones (int32), or int16 array[index : index + 32] as shorts."""
    lanes = {types.float32: WIDE, types.int32: WHOLE, types.int16: SHORTS}[array.dtype]

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _load(builder, _pointer(context, builder, signature.args[0], *args), vector_of(lanes.kind), 4)

    return lanes(array, types.int64), emit


def _spreading(lanes: Any) -> Any:
    """An intrinsic that puts float32 array[index] into all of these lanes."""

    @intrinsic
    def apply(typingctx, array, index):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            one = builder.load(_pointer(context, builder, signature.args[0], *args))
            return splat(builder, one, vector_of(lanes.kind))

        return lanes(array, types.int64), emit

    return apply


spread, spread_wide = _spreading(FLOAT), _spreading(WIDE)


@intrinsic
def side_by_side(typingctx, a, b):  # type: ignore[no-untyped-def]
    """Eight float lanes and eight more."""
    return WIDE(a, b), lambda context, builder, signature, args: builder.shuffle_vector(*args, numbered(*range(2 * LANES)))


def _storing(align: int, past: bool, short: bool = False) -> Any:
    """An intrinsic that stores lanes into array[index : index + 8] (wide ones: 16).

    ``past``: non-temporal. ``short``: the low 16 bits of each lane.
    """

    @intrinsic
    def apply(typingctx, array, index, value):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            stored = builder.trunc(args[2], ir.VectorType(I16, LANES)) if short else args[2]
            _store(builder, stored, _pointer(context, builder, signature.args[0], *args[:2]), align, past)
            return context.get_dummy_value()

        return types.void(array, types.int64, value), emit

    return apply


store = _storing(4, False)
store_past = _storing(4 * LANES, True)  # non-temporal, aligned: ``fence`` before others read it
store_short = _storing(2, False, short=True)
store_short_past = _storing(2 * LANES, True, short=True)


def _copying(align: int, past: bool) -> Any:
    """An intrinsic that copies uint16 source[index : index + 8] to target[place : place + 8]."""

    @intrinsic
    def apply(typingctx, source, index, target, place):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            data = _pointer(context, builder, signature.args[0], *args[:2])
            value = _load(builder, data, ir.VectorType(I16, LANES), 2)
            _store(builder, value, _pointer(context, builder, signature.args[2], *args[2:]), align, past)
            return context.get_dummy_value()

        return types.void(source, types.int64, target, types.int64), emit

    return apply


copy_shorts, copy_shorts_past = _copying(2, False), _copying(2 * LANES, True)


@intrinsic
def load_short(typingctx, array, index):  # type: ignore[no-untyped-def]
    """uint16 array[index : index + 8] as int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        short = _load(builder, _pointer(context, builder, signature.args[0], *args), ir.VectorType(I16, LANES), 2)
        return builder.zext(short, vector_of("int"))

    return INT(array, types.int64), emit


@intrinsic
def fence(typingctx):  # type: ignore[no-untyped-def]
    """Make all earlier stores visible before any later one."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


# -- look-ups --------------------------------------------------------------------------------------------------------------
def _lane_pointers(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> list[Any]:
    """A pointer for each lane; indices are unsigned."""
    data = context.make_array(array_type)(context, builder, array).data
    wide = [builder.zext(builder.extract_element(index, ir.Constant(I32, i)), I64) for i in range(LANES)]
    return [builder.gep(data, [place]) for place in wide]


def _stored_indices(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> list[Any]:
    """int32 array[at : at + 8] as 64-bit numbers: cheaper than taking lanes out of a register."""
    pointers = (_pointer(context, builder, array_type, array, builder.add(at, ir.Constant(I64, i))) for i in range(LANES))
    return [builder.zext(builder.load(pointer), I64) for pointer in pointers]


def _pointers_at(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Pointers to array[index] for the indices at indices[at : at + 8]; the arguments are (array, indices, at)."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return [builder.gep(data, [index]) for index in _stored_indices(context, builder, signature.args[1], *args[1:])]


def _gathered(builder: Any, pointers: list[Any], kind: str) -> Any:
    """One number from each of eight pointers; 8-bit ones are widened."""
    result = ir.Constant(vector_of(kind), ir.Undefined)
    for i, pointer in enumerate(pointers):
        value = builder.load(pointer)
        if isinstance(value.type, ir.IntType) and value.type.width < 32:
            value = builder.zext(value, I32)
        result = builder.insert_element(result, value, ir.Constant(I32, i))
    return result


def _gathers(context: Any) -> bool:
    """Whether the CPU's own gathers are quicker than a load a lane.

    They are on those that have AVX512-FP16, of which none takes the many cycles that a cure of Downfall costs older ones.
    """
    return "+avx512fp16" in context.codegen().magic_tuple()[2].split(",")


def _gathered_by_cpu(builder: Any, data: Any, index: Any, size: int) -> Any:
    """32-bit numbers at ``size`` * index bytes from a pointer on, lane by lane, as int lanes."""
    vector, byte = vector_of("int"), I8.as_pointer()
    kind = ir.FunctionType(vector, [vector, byte, vector, vector, I8])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.gather.d.d.256")
    nothing, everywhere = (ir.Constant(vector, [number] * LANES) for number in (0, -1))
    return builder.call(function, [nothing, builder.bitcast(data, byte), index, everywhere, ir.Constant(I8, size)])


@intrinsic
def gather(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index] lane by lane, for a 1-D table of 8- or 32-bit numbers."""
    lanes = _KIND_OF.get(array.dtype, INT)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if lanes in (FLOAT, INT) and array.dtype in _KIND_OF and _gathers(context):
            data = context.make_array(array)(context, builder, args[0]).data
            return builder.bitcast(_gathered_by_cpu(builder, data, args[1], 4), vector_of(lanes.kind))
        return _gathered(builder, _lane_pointers(context, builder, signature.args[0], *args), lanes.kind)

    return lanes(array, INT), emit


@intrinsic
def pick(typingctx, array, at, index):  # type: ignore[no-untyped-def]
    """float32 array[at + index] lane by lane, for indices below eight."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, at, index = args
        first = _pointer(context, builder, signature.args[0], array, at)
        if "+avx2" in context.codegen().magic_tuple()[2].split(","):
            vector = vector_of("float")
            kind = ir.FunctionType(vector, [vector, vector_of("int")])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
            return builder.call(function, [_load(builder, first, vector, 4), index])
        lanes = (builder.extract_element(index, ir.Constant(I32, i)) for i in range(LANES))
        return _gathered(builder, [builder.gep(first, [lane]) for lane in lanes], "float")

    return FLOAT(array, types.int64, INT), emit


def _pairs(builder: Any, pointers: list[Any], kind: str) -> tuple[Any, Any]:
    """Two neighbours at each of eight pointers, as two vectors."""
    two = [_load(builder, pointer, vector_of(kind, 2), 4) for pointer in pointers]
    four = [builder.shuffle_vector(two[i], two[i + 1], numbered(0, 1, 2, 3)) for i in range(0, LANES, 2)]
    low = builder.shuffle_vector(four[0], four[2], numbered(*range(8)))
    high = builder.shuffle_vector(four[1], four[3], numbered(*range(8)))
    first = builder.shuffle_vector(low, high, numbered(0, 2, 8, 10, 4, 6, 12, 14))
    second = builder.shuffle_vector(low, high, numbered(1, 3, 9, 11, 5, 7, 13, 15))
    return first, second


@intrinsic
def gather_pair(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index] and array[index + 1], lane by lane, as two vectors."""
    lanes = _KIND_OF[array.dtype]
    result = types.UniTuple(lanes, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointers = _lane_pointers(context, builder, signature.args[0], *args)
        return context.make_tuple(builder, result, _pairs(builder, pointers, lanes.kind))

    return result(array, INT), emit


def _fours(builder: Any, pointers: list[Any], kind: str) -> list[Any]:
    """Four neighbours at each of eight pointers, as four vectors."""
    four = [_load(builder, pointer, vector_of(kind, 4), 4) for pointer in pointers]
    both = [builder.shuffle_vector(four[i], four[i + 4], numbered(*range(8))) for i in range(4)]
    low, high = numbered(0, 8, 1, 9, 4, 12, 5, 13), numbered(2, 10, 3, 11, 6, 14, 7, 15)
    t = [builder.shuffle_vector(*both[:2], low), builder.shuffle_vector(*both[:2], high)]
    t += [builder.shuffle_vector(*both[2:], low), builder.shuffle_vector(*both[2:], high)]
    low, high = numbered(0, 1, 8, 9, 4, 5, 12, 13), numbered(2, 3, 10, 11, 6, 7, 14, 15)
    return [builder.shuffle_vector(t[j], t[j + 2], half) for j in (0, 1) for half in (low, high)]


@intrinsic
def gather_four_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """array[index] .. array[index + 3] as four vectors, for the indices int32 indices[at : at + 8]."""
    lanes = _KIND_OF[array.dtype]
    result = types.UniTuple(lanes, 4)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointers = _pointers_at(context, builder, signature, args)
        return context.make_tuple(builder, result, _fours(builder, pointers, lanes.kind))

    return result(array, indices, types.int64), emit


@intrinsic
def gather_eight_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """array[index] .. array[index + 7] as eight vectors, for the indices int32 indices[at : at + 8]."""
    lanes = _KIND_OF[array.dtype]
    result = types.UniTuple(lanes, 8)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointers = _pointers_at(context, builder, signature, args)
        rows = [_load(builder, pointer, vector_of(lanes.kind, 8), 4) for pointer in pointers]
        return context.make_tuple(builder, result, _transposed(builder, rows))

    return result(array, indices, types.int64), emit


@intrinsic
def gather_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """gather for the indices int32 indices[at : at + 8]."""
    lanes = _KIND_OF.get(array.dtype, INT)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _gathered(builder, _pointers_at(context, builder, signature, args), lanes.kind)

    return lanes(array, indices, types.int64), emit


@intrinsic
def gather_pair_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """gather_pair for the indices int32 indices[at : at + 8]."""
    lanes = _KIND_OF[array.dtype]
    result = types.UniTuple(lanes, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointers = _pointers_at(context, builder, signature, args)
        return context.make_tuple(builder, result, _pairs(builder, pointers, lanes.kind))

    return result(array, indices, types.int64), emit


@intrinsic
def gather_bytes_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """Four neighbouring bytes of int32 array[index] as int lanes, for the indices int32 indices[at : at + 8]."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _gathers(context):
            index = _load(builder, _pointer(context, builder, indices, *args[1:]), vector_of("int"), 4)
            return _gathered_by_cpu(builder, context.make_array(array)(context, builder, args[0]).data, index, 4)
        return _gathered(builder, _pointers_at(context, builder, signature, args), "int")

    return INT(array, indices, types.int64), emit


@intrinsic
def signed_sums(typingctx, value, signs):  # type: ignore[no-untyped-def]
    """Bytes 0 + 1 and 2 + 3 of each lane as int16, then 0 - 1 and 2 - 3; each byte, which is 1 .. 127, is negative where the
    highest bit of the byte of ``signs`` is set. On x86 a multiplication by signs and an addition are one instruction.
    """
    result = types.UniTuple(SHORT, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        many, few = vector_of("short"), ir.VectorType(I8, 4 * LANES)
        if _has_avx2(context):
            value, signs = (builder.bitcast(each, few) for each in args)
            signs, found = builder.or_(signs, ir.Constant(few, [1] * 4 * LANES)), []
            of_bytes = ir.FunctionType(few, [few] * 2)
            sign = cgutils.get_or_insert_function(builder.module, of_bytes, "llvm.x86.avx2.psign.b")
            kind = ir.FunctionType(many, [few] * 2)
            added = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.ub.sw")
            for second in (1, -1):
                factors = builder.call(sign, [ir.Constant(few, [1, second] * 2 * LANES), signs])
                found.append(builder.call(added, [value, factors]))
            return context.make_tuple(builder, result, found)
        value = builder.bitcast(_signed_bytes(builder, *args), many)
        eight = ir.Constant(many, [8] * 2 * LANES)
        even, odd = builder.ashr(builder.shl(value, eight), eight), builder.ashr(value, eight)
        return context.make_tuple(builder, result, (builder.add(even, odd), builder.sub(even, odd)))

    return result(INT, INT), emit


@intrinsic
def signed_floats(typingctx, value, signs):  # type: ignore[no-untyped-def]
    """Bytes 0 to 3 of each lane as float lanes, negative where the highest bit of the byte of ``signs`` is set."""
    result = types.UniTuple(FLOAT, 4)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, whole = builder.bitcast(_signed_bytes(builder, *args), vector_of("int")), vector_of("int")
        found = []
        for above in (24, 16, 8, 0):
            byte = builder.ashr(builder.shl(value, ir.Constant(whole, [above] * LANES)), ir.Constant(whole, [24] * LANES))
            found.append(builder.sitofp(byte, vector_of("float")))
        return context.make_tuple(builder, result, found)

    return result(INT, INT), emit


def _signed_bytes(builder: Any, value: Any, signs: Any) -> Any:
    """Each byte of int lanes, negative where the highest bit of the byte of ``signs`` is set."""
    few = ir.VectorType(I8, 4 * LANES)
    value, signs = (builder.bitcast(each, few) for each in (value, signs))
    negative = builder.ashr(signs, ir.Constant(few, [7] * 4 * LANES))
    return builder.sub(builder.xor(value, negative), negative)


@intrinsic
def sums_and_differences(typingctx, value):  # type: ignore[no-untyped-def]
    """The sum and the difference of each lane's two int16, as float lanes."""
    result = types.UniTuple(FLOAT, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        even, odd = _halves(builder, args[0])
        found = [builder.sitofp(each, vector_of("float")) for each in (builder.add(even, odd), builder.sub(even, odd))]
        return context.make_tuple(builder, result, found)

    return result(SHORT), emit


@intrinsic
def signed(typingctx, array, places, signs, k):  # type: ignore[no-untyped-def]
    """Coordinate k of a tile, which lies at places[k], with its sign: float lanes, or int lanes of an array of int16.

    Of float32, ``signs`` are for every lane. Of int16 a coordinate is the sum of two neighbours, each with its own sign, and
    ``signs`` are two for every lane: on x86 one multiplication and addition, exact.
    """
    result, kind = (FLOAT, "float") if array.dtype == types.float32 else (INT, "short")

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, places, signs, k = args
        place = builder.load(_pointer(context, builder, signature.args[1], places, k))
        value = _load(builder, _pointer(context, builder, signature.args[0], array, place), vector_of(kind), 4)
        at = builder.mul(k, ir.Constant(I64, vector_of(kind).count))
        sign = _load(builder, _pointer(context, builder, signature.args[2], signs, at), vector_of(kind), 4)
        return builder.fmul(value, sign) if kind == "float" else _sums_of_products(context, builder, value, sign)

    return result(array, places, signs, types.int64), emit


def _has_avx2(context: Any) -> bool:
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")


def _sums_of_products(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Of int16 the products of each lane's first numbers and of its second ones, added: int lanes.

    LLVM finds the one instruction that x86 has for it only in the simplest surroundings, so it is named where there is one.
    """
    if _has_avx2(context):
        kind = ir.FunctionType(vector_of("int"), [vector_of("short")] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd"), [a, b])
    return builder.add(*(builder.mul(*pair) for pair in zip(_halves(builder, a), _halves(builder, b), strict=True)))


def _halves(builder: Any, value: Any) -> list[Any]:
    """The first int16 of each lane, and the second, as int lanes."""
    taken = (builder.shuffle_vector(value, value, numbered(*range(i, 2 * LANES, 2))) for i in range(2))
    return [builder.sext(each, vector_of("int")) for each in taken]


# -- transpositions ------------------------------------------------------------------------------------------------------
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
                row = _load(builder, _pointer(context, builder, signature.args[0], source, start), vector_of("float"), 4)
                scale = builder.load(_pointer(context, builder, signature.args[4], scales, ir.Constant(I64, j)))
                rows.append(builder.fmul(row, builder.fmul(factors, splat(builder, scale, vector_of("float")))))
                start = builder.add(start, stride)
            for i, row in enumerate(_summed(builder, _transposed(builder, rows), stages)):
                at = builder.add(place, ir.Constant(I64, LANES * i))
                _store(builder, row, _pointer(context, builder, signature.args[5], target, at), 4)
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
                rows.append(_load(builder, _pointer(context, builder, signature.args[0], source, at), vector_of("float"), 4))
            for j, row in enumerate(_transposed(builder, _summed(builder, rows, stages))):
                value = builder.fmul(row, factors)
                for number, array in ((3, first), (4, second)):
                    factor = builder.load(_pointer(context, builder, signature.args[number], array, ir.Constant(I64, j)))
                    value = builder.fmul(value, splat(builder, factor, vector_of("float")))
                value = builder.fadd(value, ir.Constant(vector_of("float"), [0.0] * LANES))
                _store(builder, value, _pointer(context, builder, signature.args[5], target, start), 4)
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
                return _load(builder, _pointer(context, builder, signature.args[number], array, index), vector_of(kind), 4)

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
                _store(builder, line, _pointer(context, builder, signature.args[6], target, k), 2)
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
        return builder.load(_pointer(context, builder, *fields[name], index))

    def product(name: str, phase: str, index: Any, place: Any) -> Any:
        phases = _load(builder, _pointer(context, builder, *fields[phase], place), vector_of("float"), 4)
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
    if "+fma" in context.codegen().magic_tuple()[2].split(","):
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
    halves, mixed = [_half(context, builder, value) for value in values], []
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


def _converts_halves(context: Any) -> bool:
    """Whether the CPU converts between float32 and float16 itself; LLVM would call functions that are not there."""
    return "+f16c" in context.codegen().magic_tuple()[2].split(",")


def _half(context: Any, builder: Any, value: Any) -> Any:
    """Float32 within float16's range as the bits of float16, ties to even."""
    count = value.type.count
    short, kind = ir.VectorType(I16, count), ir.VectorType(I32, count)
    if _converts_halves(context):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), count)), short)

    def same(number: int) -> Any:
        return ir.Constant(kind, [number] * count)

    bits = builder.bitcast(value, kind)
    sign = builder.and_(builder.lshr(bits, same(16)), same(0x8000))
    size = builder.and_(bits, same(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, same(13)), same(1))
    normal = builder.lshr(builder.add(builder.add(size, same(0xFFF - 0x38000000)), odd), same(13))
    moved = builder.fadd(builder.bitcast(size, value.type), ir.Constant(value.type, [0.5] * count))
    small = builder.sub(builder.bitcast(moved, kind), same(0x3F000000))
    found = builder.select(builder.icmp_signed("<", size, same(0x38800000)), small, normal)
    return builder.trunc(builder.or_(found, sign), short)


@intrinsic
def load_half(typingctx, array, index):  # type: ignore[no-untyped-def]
    """uint16 array[index : index + 8], bits of float16, as float lanes; Inf and NaN become 2^16 and more."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        half = _load(builder, _pointer(context, builder, signature.args[0], *args), ir.VectorType(I16, LANES), 2)
        if _converts_halves(context):
            return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), vector_of("float"))
        size, sign, thirteen, sixteen = (ir.Constant(vector_of("int"), [number] * LANES) for number in (0x7FFF, 0x8000, 13, 16))
        half = builder.zext(half, vector_of("int"))
        moved = builder.shl(builder.and_(half, size), thirteen)
        moved = builder.or_(moved, builder.shl(builder.and_(half, sign), sixteen))
        return builder.fmul(builder.bitcast(moved, vector_of("float")), ir.Constant(vector_of("float"), [2.0**112] * LANES))

    return FLOAT(array, types.int64), emit


@intrinsic
def rounded_half(typingctx, value):  # type: ignore[no-untyped-def]
    """Float lanes within float16's range as the bits of float16, ties to even: int lanes."""
    return INT(value), lambda context, builder, signature, args: builder.zext(
        _half(context, builder, args[0]), vector_of("int")
    )


@intrinsic
def largest_of_rows(typingctx, source):  # type: ignore[no-untyped-def]
    """The largest of each of eight rows of eight int32, which follow one another from source[0] on: int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        places = (ir.Constant(I64, LANES * j) for j in range(LANES))
        rows = [
            _load(builder, _pointer(context, builder, signature.args[0], args[0], at), vector_of("int"), 4) for at in places
        ]
        rows = _transposed(builder, rows)
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
            rows.append(_load(builder, _pointer(context, builder, signature.args[0], source, at), vector_of("float"), 4))
        rows = _transposed(builder, rows)
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
        pointers = [_pointer(context, builder, signature.args[0], array, place) for place in places]
        rows = [_load(builder, place, vector_of("float"), 4) for place in pointers]
        for place, row in zip(pointers, _transposed(builder, rows), strict=True):
            _store(builder, row, place, 4)
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


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
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


# -- bit fields --------------------------------------------------------------------------------------------------
@intrinsic
def put_at(typingctx, words, stride, places, at, value):  # type: ignore[no-untyped-def]
    """OR each long lane into its own row of uint64 words, ``stride`` words apart, from bit places[at + lane] on."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words, stride, places, at, value = args
        data = context.make_array(signature.args[0])(context, builder, words).data
        base = ir.Constant(I64, 0)
        for i, place in enumerate(_stored_indices(context, builder, signature.args[2], places, at)):
            bits = builder.extract_element(value, ir.Constant(I32, i))
            shift = builder.and_(place, ir.Constant(I64, 63))
            rest = builder.lshr(builder.lshr(bits, ir.Constant(I64, 1)), builder.sub(ir.Constant(I64, 63), shift))
            pointer = builder.gep(data, [builder.add(base, builder.lshr(place, ir.Constant(I64, 6)))])
            builder.store(builder.or_(builder.load(pointer), builder.shl(bits, shift)), pointer)
            behind = builder.gep(pointer, [ir.Constant(I64, 1)])
            builder.store(builder.or_(builder.load(behind), rest), behind)
            base = builder.add(base, stride)
        return context.get_dummy_value()

    return types.void(words, types.int64, places, types.int64, LONG), emit


@intrinsic
def window_at(typingctx, words, stride, places, at):  # type: ignore[no-untyped-def]
    """32 bits of each lane's row of int32 words, ``stride`` words apart, from bit places[at + lane] on: int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words, stride, places, at = args
        data = context.make_array(signature.args[0])(context, builder, words).data
        base, pointers = ir.Constant(I64, 0), []
        for place in _stored_indices(context, builder, signature.args[2], places, at):
            word = builder.lshr(place, ir.Constant(I64, 5))
            pointers.append(builder.gep(data, [builder.add(base, word)]))
            base = builder.add(base, stride)
        low, high = _pairs(builder, pointers, "int")
        place = _load(builder, _pointer(context, builder, signature.args[2], places, at), vector_of("int"), 4)
        shift = builder.and_(place, ir.Constant(vector_of("int"), [31] * LANES))
        back = builder.sub(ir.Constant(vector_of("int"), [31] * LANES), shift)
        high = builder.shl(builder.shl(high, ir.Constant(vector_of("int"), [1] * LANES)), back)
        return builder.or_(builder.lshr(low, shift), high)

    return INT(words, types.int64, places, types.int64), emit


@intrinsic
def long_window_at(typingctx, words, stride, places, at):  # type: ignore[no-untyped-def]
    """At least 57 bits of each lane's row of uint64 words, ``stride`` words apart, from bit places[at + lane] on, as longs."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words, stride, places, at = args
        data = builder.bitcast(context.make_array(signature.args[0])(context, builder, words).data, I8.as_pointer())
        base, stride = ir.Constant(I64, 0), builder.shl(stride, ir.Constant(I64, 3))
        result = ir.Constant(vector_of("long"), ir.Undefined)
        for i, place in enumerate(_stored_indices(context, builder, signature.args[2], places, at)):
            byte = builder.add(base, builder.lshr(place, ir.Constant(I64, 3)))
            window = _load(builder, builder.gep(data, [byte]), I64, 1)
            result = builder.insert_element(result, window, ir.Constant(I32, i))
            base = builder.add(base, stride)
        place = _load(builder, _pointer(context, builder, signature.args[2], places, at), vector_of("int"), 4)
        shift = builder.and_(place, ir.Constant(vector_of("int"), [7] * LANES))
        return builder.lshr(result, builder.zext(shift, vector_of("long")))

    return LONG(words, types.int64, places, types.int64), emit


@intrinsic
def sum_of_longs(typingctx, value):  # type: ignore[no-untyped-def]
    """The sum of eight long lanes, uint64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        total = args[0]
        for count in (4, 2, 1):
            low, high = numbered(*range(count)), numbered(*range(count, 2 * count))
            total = builder.add(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.uint64(value), emit


@intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """An address as the pointer that ``numba.carray`` takes."""
    return types.voidptr(types.int64), lambda context, builder, signature, args: builder.inttoptr(args[0], I8.as_pointer())


@intrinsic
def word_at(typingctx, data, index):  # type: ignore[no-untyped-def]
    """The little-endian 32-bit word at byte ``index`` of a uint8 array, aligned or not, as uint64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = _load(builder, _pointer(context, builder, signature.args[0], *args), I32, 1)
        return builder.zext(word, I64)

    return types.uint64(data, types.int64), emit


@intrinsic
def longs_of_words(typingctx, data, index):  # type: ignore[no-untyped-def]
    """The eight little-endian 32-bit words from byte ``index`` of a uint8 array on, aligned or not: long lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words = _load(builder, _pointer(context, builder, signature.args[0], *args), vector_of("int"), 1)
        return builder.zext(words, vector_of("long"))

    return LONG(data, types.int64), emit


@intrinsic
def words_of_rows(typingctx, data, start, steps, at):  # type: ignore[no-untyped-def]
    """The little-endian 32-bit words at bytes start + steps[at + lane] of a uint8 array, aligned or not: int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data, start, steps, at = args
        first = _pointer(context, builder, signature.args[0], data, start)
        if _gathers(context):
            index = _load(builder, _pointer(context, builder, signature.args[2], steps, at), vector_of("int"), 4)
            return _gathered_by_cpu(builder, first, index, 1)
        result = ir.Constant(vector_of("int"), ir.Undefined)
        for i, step in enumerate(_stored_indices(context, builder, signature.args[2], steps, at)):
            word = _load(builder, builder.gep(first, [step]), I32, 1)
            result = builder.insert_element(result, word, ir.Constant(I32, i))
        return result

    return INT(data, types.int64, steps, types.int64), emit


@intrinsic
def long_at(typingctx, data, index):  # type: ignore[no-untyped-def]
    """The little-endian 64-bit word at byte ``index`` of a uint8 array, aligned or not, as uint64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _load(builder, _pointer(context, builder, signature.args[0], *args), I64, 1)

    return types.uint64(data, types.int64), emit


@intrinsic
def set_word_at(typingctx, data, index, value):  # type: ignore[no-untyped-def]
    """Write an int32 at byte ``index`` of a uint8 array, aligned or not."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _store(builder, args[2], _pointer(context, builder, signature.args[0], *args[:2]), 1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.int32), emit


@intrinsic
def set_long_at(typingctx, data, index, value):  # type: ignore[no-untyped-def]
    """Write a uint64 at byte ``index`` of a uint8 array, aligned or not."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _store(builder, args[2], _pointer(context, builder, signature.args[0], *args[:2]), 1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), emit
