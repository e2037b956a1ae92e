"""Law: numbers of tables with signs of their own, and sums of neighbours, which processors have instructions for."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pqcodec.kernels.cpu.lane_memory import load_as, pointer_to
from pqcodec.kernels.cpu.lanes import FLOAT, I8, I64, INT, LANES, SHORT, has_feature, numbered, vector_of


@intrinsic
def signed_sums(typingctx, value, signs):  # type: ignore[no-untyped-def]
    """Bytes 0 + 1 and 2 + 3 of each lane as int16, then 0 - 1 and 2 - 3; each byte, which is 1 .. 127, is negative where the
    highest bit of the byte of ``signs`` is set. On x86 a multiplication by signs and an addition are one instruction.
    """
    result = types.UniTuple(SHORT, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        many, few = vector_of("short"), ir.VectorType(I8, 4 * LANES)
        if has_feature(context, "+avx2"):
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
        place = builder.load(pointer_to(context, builder, signature.args[1], places, k))
        value = load_as(builder, pointer_to(context, builder, signature.args[0], array, place), vector_of(kind), 4)
        at = builder.mul(k, ir.Constant(I64, vector_of(kind).count))
        sign = load_as(builder, pointer_to(context, builder, signature.args[2], signs, at), vector_of(kind), 4)
        return builder.fmul(value, sign) if kind == "float" else _sums_of_products(context, builder, value, sign)

    return result(array, places, signs, types.int64), emit


def _sums_of_products(context: Any, builder: Any, a: Any, b: Any) -> Any:
    """Of int16 the products of each lane's first numbers and of its second ones, added: int lanes.

    LLVM finds the one instruction that x86 has for it only in the simplest surroundings, so it is named where there is one.
    """
    if has_feature(context, "+avx2"):
        kind = ir.FunctionType(vector_of("int"), [vector_of("short")] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd"), [a, b])
    return builder.add(*(builder.mul(*pair) for pair in zip(_halves(builder, a), _halves(builder, b), strict=True)))


def _halves(builder: Any, value: Any) -> list[Any]:
    """The first int16 of each lane, and the second, as int lanes."""
    taken = (builder.shuffle_vector(value, value, numbered(*range(i, 2 * LANES, 2))) for i in range(2))
    return [builder.sext(each, vector_of("int")) for each in taken]
