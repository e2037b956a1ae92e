"""Law: look-ups of many entries at once: a lane has an index, and gets one number, several neighbours, or a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pqcodec.kernels.cpu.lane_memory import KIND_OF, load_as, pointer_to
from pqcodec.kernels.cpu.lane_rows import transposed
from pqcodec.kernels.cpu.lanes import FLOAT, I8, I32, I64, INT, LANES, has_feature, numbered, vector_of


def _lane_pointers(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> list[Any]:
    """A pointer for each lane; indices are unsigned."""
    data = context.make_array(array_type)(context, builder, array).data
    wide = [builder.zext(builder.extract_element(index, ir.Constant(I32, i)), I64) for i in range(LANES)]
    return [builder.gep(data, [place]) for place in wide]


def stored_indices(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> list[Any]:
    """int32 array[at : at + 8] as 64-bit numbers: cheaper than taking lanes out of a register."""
    pointers = (pointer_to(context, builder, array_type, array, builder.add(at, ir.Constant(I64, i))) for i in range(LANES))
    return [builder.zext(builder.load(pointer), I64) for pointer in pointers]


def _pointers_at(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Pointers to array[index] for the indices at indices[at : at + 8]; the arguments are (array, indices, at)."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return [builder.gep(data, [index]) for index in stored_indices(context, builder, signature.args[1], *args[1:])]


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
    return has_feature(context, "+avx512fp16")


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
    lanes = KIND_OF.get(array.dtype, INT)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if lanes in (FLOAT, INT) and array.dtype in KIND_OF and _gathers(context):
            data = context.make_array(array)(context, builder, args[0]).data
            return builder.bitcast(_gathered_by_cpu(builder, data, args[1], 4), vector_of(lanes.kind))
        return _gathered(builder, _lane_pointers(context, builder, signature.args[0], *args), lanes.kind)

    return lanes(array, INT), emit


@intrinsic
def pick(typingctx, array, at, index):  # type: ignore[no-untyped-def]
    """float32 array[at + index] lane by lane, for indices below eight."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, at, index = args
        first = pointer_to(context, builder, signature.args[0], array, at)
        if has_feature(context, "+avx2"):
            vector = vector_of("float")
            kind = ir.FunctionType(vector, [vector, vector_of("int")])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
            return builder.call(function, [load_as(builder, first, vector, 4), index])
        lanes = (builder.extract_element(index, ir.Constant(I32, i)) for i in range(LANES))
        return _gathered(builder, [builder.gep(first, [lane]) for lane in lanes], "float")

    return FLOAT(array, types.int64, INT), emit


def pairs_at(builder: Any, pointers: list[Any], kind: str) -> tuple[Any, Any]:
    """Two neighbours at each of eight pointers, as two vectors."""
    two = [load_as(builder, pointer, vector_of(kind, 2), 4) for pointer in pointers]
    four = [builder.shuffle_vector(two[i], two[i + 1], numbered(0, 1, 2, 3)) for i in range(0, LANES, 2)]
    low = builder.shuffle_vector(four[0], four[2], numbered(*range(8)))
    high = builder.shuffle_vector(four[1], four[3], numbered(*range(8)))
    first = builder.shuffle_vector(low, high, numbered(0, 2, 8, 10, 4, 6, 12, 14))
    second = builder.shuffle_vector(low, high, numbered(1, 3, 9, 11, 5, 7, 13, 15))
    return first, second


@intrinsic
def gather_pair(typingctx, array, index):  # type: ignore[no-untyped-def]
    """array[index] and array[index + 1], lane by lane, as two vectors."""
    lanes = KIND_OF[array.dtype]
    result = types.UniTuple(lanes, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointers = _lane_pointers(context, builder, signature.args[0], *args)
        return context.make_tuple(builder, result, pairs_at(builder, pointers, lanes.kind))

    return result(array, INT), emit


def _fours(builder: Any, pointers: list[Any], kind: str) -> list[Any]:
    """Four neighbours at each of eight pointers, as four vectors."""
    four = [load_as(builder, pointer, vector_of(kind, 4), 4) for pointer in pointers]
    both = [builder.shuffle_vector(four[i], four[i + 4], numbered(*range(8))) for i in range(4)]
    low, high = numbered(0, 8, 1, 9, 4, 12, 5, 13), numbered(2, 10, 3, 11, 6, 14, 7, 15)
    t = [builder.shuffle_vector(*both[:2], low), builder.shuffle_vector(*both[:2], high)]
    t += [builder.shuffle_vector(*both[2:], low), builder.shuffle_vector(*both[2:], high)]
    low, high = numbered(0, 1, 8, 9, 4, 5, 12, 13), numbered(2, 3, 10, 11, 6, 7, 14, 15)
    return [builder.shuffle_vector(t[j], t[j + 2], half) for j in (0, 1) for half in (low, high)]


@intrinsic
def gather_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """gather for the indices int32 indices[at : at + 8]."""
    lanes = KIND_OF.get(array.dtype, INT)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _gathered(builder, _pointers_at(context, builder, signature, args), lanes.kind)

    return lanes(array, indices, types.int64), emit


def _eights(builder: Any, pointers: list[Any], kind: str) -> list[Any]:
    """Eight neighbours at each of eight pointers, as eight vectors."""
    return transposed(builder, [load_as(builder, pointer, vector_of(kind, 8), 4) for pointer in pointers])


def _gathering_at(count: int, neighbours: Callable[[Any, list[Any], str], Any]) -> Any:
    """An intrinsic: array[index] .. array[index + count - 1] as vectors, for the indices int32 indices[at : at + 8]."""

    @intrinsic
    def apply(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
        lanes = KIND_OF[array.dtype]
        result = types.UniTuple(lanes, count)

        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            pointers = _pointers_at(context, builder, signature, args)
            return context.make_tuple(builder, result, neighbours(builder, pointers, lanes.kind))

        return result(array, indices, types.int64), emit

    return apply


gather_pair_at, gather_four_at, gather_eight_at = (
    _gathering_at(count, neighbours) for count, neighbours in ((2, pairs_at), (4, _fours), (8, _eights))
)


@intrinsic
def gather_bytes_at(typingctx, array, indices, at):  # type: ignore[no-untyped-def]
    """Four neighbouring bytes of int32 array[index] as int lanes, for the indices int32 indices[at : at + 8]."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if _gathers(context):
            index = load_as(builder, pointer_to(context, builder, indices, *args[1:]), vector_of("int"), 4)
            return _gathered_by_cpu(builder, context.make_array(array)(context, builder, args[0]).data, index, 4)
        return _gathered(builder, _pointers_at(context, builder, signature, args), "int")

    return INT(array, indices, types.int64), emit


@intrinsic
def words_of_rows(typingctx, data, start, steps, at):  # type: ignore[no-untyped-def]
    """The little-endian 32-bit words at bytes start + steps[at + lane] of a uint8 array, aligned or not: int lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        data, start, steps, at = args
        first = pointer_to(context, builder, signature.args[0], data, start)
        if _gathers(context):
            index = load_as(builder, pointer_to(context, builder, signature.args[2], steps, at), vector_of("int"), 4)
            return _gathered_by_cpu(builder, first, index, 1)
        result = ir.Constant(vector_of("int"), ir.Undefined)
        for i, step in enumerate(stored_indices(context, builder, signature.args[2], steps, at)):
            word = load_as(builder, builder.gep(first, [step]), I32, 1)
            result = builder.insert_element(result, word, ir.Constant(I32, i))
        return result

    return INT(data, types.int64, steps, types.int64), emit
