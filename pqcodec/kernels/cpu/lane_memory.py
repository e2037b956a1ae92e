"""Law: lanes in memory: loads and stores of lanes and of words, aligned or not.

Arrays are 1-D and contiguous, and no index is checked; so it is in the modules beside this one.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
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
    SHORTS,
    WHOLE,
    WIDE,
    numbered,
    splat,
    vector_of,
)


def pointer_to(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """A pointer to array[index]."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def load_as(builder: Any, pointer: Any, vector: ir.Type, align: int) -> Any:
    """What lies at a pointer, as a value of another type."""
    load = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    load.align = align
    return load


def store_to(builder: Any, value: Any, pointer: Any, align: int, past: bool = False) -> None:
    """Store a value at a pointer; ``past``: non-temporal, which spares reading the line first."""
    stored = builder.store(value, builder.bitcast(pointer, value.type.as_pointer()))
    stored.align = align
    if past:
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


KIND_OF = {types.float32: FLOAT, types.int32: INT, types.uint32: INT, types.uint64: LONG}


@intrinsic
def load(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + 8]: float32 as float lanes, int32 and uint32 as int lanes, uint64 as long lanes."""
    lanes = KIND_OF[array.dtype]

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return load_as(builder, pointer_to(context, builder, signature.args[0], *args), vector_of(lanes.kind), 4)

    return lanes(array, types.int64), emit


@intrinsic
def load_wide(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index : index + 16] as wide lanes (float32) or whole ones (int32), or int16 array[index : index + 32] as shorts."""
    lanes = {types.float32: WIDE, types.int32: WHOLE, types.int16: SHORTS}[array.dtype]

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return load_as(builder, pointer_to(context, builder, signature.args[0], *args), vector_of(lanes.kind), 4)

    return lanes(array, types.int64), emit


def _spreading(lanes: Any) -> Any:
    """An intrinsic that puts float32 array[index] into all of these lanes."""

    @intrinsic
    def apply(typingctx, array, index):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            one = builder.load(pointer_to(context, builder, signature.args[0], *args))
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
            store_to(builder, stored, pointer_to(context, builder, signature.args[0], *args[:2]), align, past)
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
            data = pointer_to(context, builder, signature.args[0], *args[:2])
            value = load_as(builder, data, ir.VectorType(I16, LANES), 2)
            store_to(builder, value, pointer_to(context, builder, signature.args[2], *args[2:]), align, past)
            return context.get_dummy_value()

        return types.void(source, types.int64, target, types.int64), emit

    return apply


copy_shorts, copy_shorts_past = _copying(2, False), _copying(2 * LANES, True)


@intrinsic
def load_short(typingctx, array, index):  # type: ignore[no-untyped-def]
    """uint16 array[index : index + 8] as int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        short = load_as(builder, pointer_to(context, builder, signature.args[0], *args), ir.VectorType(I16, LANES), 2)
        return builder.zext(short, vector_of("int"))

    return INT(array, types.int64), emit


@intrinsic
def fence(typingctx):  # type: ignore[no-untyped-def]
    """Make all earlier stores visible before any later one."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """An address as the pointer that ``numba.carray`` takes."""
    return types.voidptr(types.int64), lambda context, builder, signature, args: builder.inttoptr(args[0], I8.as_pointer())


@intrinsic
def word_at(typingctx, data, index):  # type: ignore[no-untyped-def]
    """The little-endian 32-bit word at byte ``index`` of a uint8 array, aligned or not, as uint64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = load_as(builder, pointer_to(context, builder, signature.args[0], *args), I32, 1)
        return builder.zext(word, I64)

    return types.uint64(data, types.int64), emit


@intrinsic
def longs_of_words(typingctx, data, index):  # type: ignore[no-untyped-def]
    """The eight little-endian 32-bit words from byte ``index`` of a uint8 array on, aligned or not: long lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        words = load_as(builder, pointer_to(context, builder, signature.args[0], *args), vector_of("int"), 1)
        return builder.zext(words, vector_of("long"))

    return LONG(data, types.int64), emit


@intrinsic
def long_at(typingctx, data, index):  # type: ignore[no-untyped-def]
    """The little-endian 64-bit word at byte ``index`` of a uint8 array, aligned or not, as uint64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return load_as(builder, pointer_to(context, builder, signature.args[0], *args), I64, 1)

    return types.uint64(data, types.int64), emit


@intrinsic
def set_word_at(typingctx, data, index, value):  # type: ignore[no-untyped-def]
    """Write an int32 at byte ``index`` of a uint8 array, aligned or not."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        store_to(builder, args[2], pointer_to(context, builder, signature.args[0], *args[:2]), 1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.int32), emit


@intrinsic
def set_long_at(typingctx, data, index, value):  # type: ignore[no-untyped-def]
    """Write a uint64 at byte ``index`` of a uint8 array, aligned or not."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        store_to(builder, args[2], pointer_to(context, builder, signature.args[0], *args[:2]), 1)
        return context.get_dummy_value()

    return types.void(data, types.int64, types.uint64), emit
