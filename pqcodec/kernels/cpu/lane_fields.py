"""Law: fields of bits: a lane has a row of words of its own, and a place in it where its bits are or get."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pqcodec.kernels.cpu.lane_look_ups import pairs_at, stored_indices
from pqcodec.kernels.cpu.lane_memory import load_as, pointer_to
from pqcodec.kernels.cpu.lanes import I8, I32, I64, INT, LANES, LONG, vector_of


@intrinsic
def put_at(typingctx, words, stride, places, at, value):  # type: ignore[no-untyped-def]
    """OR each long lane into its own row of uint64 words, ``stride`` words apart, from bit places[at + lane] on."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words, stride, places, at, value = args
        data = context.make_array(signature.args[0])(context, builder, words).data
        base = ir.Constant(I64, 0)
        for i, place in enumerate(stored_indices(context, builder, signature.args[2], places, at)):
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
        for place in stored_indices(context, builder, signature.args[2], places, at):
            word = builder.lshr(place, ir.Constant(I64, 5))
            pointers.append(builder.gep(data, [builder.add(base, word)]))
            base = builder.add(base, stride)
        low, high = pairs_at(builder, pointers, "int")
        place = load_as(builder, pointer_to(context, builder, signature.args[2], places, at), vector_of("int"), 4)
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
        for i, place in enumerate(stored_indices(context, builder, signature.args[2], places, at)):
            byte = builder.add(base, builder.lshr(place, ir.Constant(I64, 3)))
            window = load_as(builder, builder.gep(data, [byte]), I64, 1)
            result = builder.insert_element(result, window, ir.Constant(I32, i))
            base = builder.add(base, stride)
        place = load_as(builder, pointer_to(context, builder, signature.args[2], places, at), vector_of("int"), 4)
        shift = builder.and_(place, ir.Constant(vector_of("int"), [7] * LANES))
        return builder.lshr(result, builder.zext(shift, vector_of("long")))

    return LONG(words, types.int64, places, types.int64), emit
