"""Law: lanes of float16: their bits as float32, and the nearest ones to float32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pqcodec.kernels.cpu.lane_memory import load_as, pointer_to
from pqcodec.kernels.cpu.lanes import FLOAT, I16, I32, INT, LANES, has_feature, vector_of


def _converts_halves(context: Any) -> bool:
    """Whether the CPU converts between float32 and float16 itself; LLVM would call functions that are not there."""
    return has_feature(context, "+f16c")


def bits_of_halves(context: Any, builder: Any, value: Any) -> Any:
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
        half = load_as(builder, pointer_to(context, builder, signature.args[0], *args), ir.VectorType(I16, LANES), 2)
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
        bits_of_halves(context, builder, args[0]), vector_of("int")
    )
