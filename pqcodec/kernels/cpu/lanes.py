"""Law: the SIMD vector that numba lacks: eight lanes of float32, int32 or int64, or more numbers, as LLVM vectors.

``Lanes`` values support + - * / & | ^ << >>, min, max and comparisons lane by lane (>> is logical). Everything else is a
function of this module or, where memory is read or written, of one of ``lane_*`` beside it. LLVM lowers eight 32-bit lanes to
one AVX2 register, or to several smaller ones. No operation but ``fused`` is fused or reassociated: a lane's result is the
scalar operation's result, bit for bit.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 8
_I1, I8, I16, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_ELEMENT = {"float": _F32, "int": I32, "long": I64, "mask": _I1, "wide": _F32, "whole": I32, "short": I16, "shorts": I16}
_LANES_EACH = {"wide": 2, "whole": 2, "short": 2, "shorts": 4}  # numbers a lane, where it is not one
_FLOATS = ("float", "wide")


class LanesType(types.Type):
    """numba type of eight lanes of one kind: "float", "int", "long" or "mask"; or of more numbers.

    "wide" is sixteen floats, "whole" sixteen int32; "short" and "shorts" are sixteen and thirty-two int16, of which two
    neighbours are a lane's.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__(name=f"Lanes({kind})")


FLOAT, INT, LONG, MASK = (LanesType(kind) for kind in ("float", "int", "long", "mask"))
WIDE, WHOLE, SHORT, SHORTS = (LanesType(kind) for kind in ("wide", "whole", "short", "shorts"))


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: LanesType) -> None:
        super().__init__(manager, lanes, vector_of(lanes.kind))


def vector_of(kind: str, lanes: int = LANES) -> ir.VectorType:
    """The LLVM vector of ``lanes`` lanes of a kind."""
    return ir.VectorType(_ELEMENT[kind], lanes * _LANES_EACH.get(kind, 1))


def numbered(*lanes: int) -> ir.Constant:
    """A constant vector of these numbers, such as a shuffle takes."""
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))


def splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    """A vector of type ``vector`` that holds ``scalar`` in every lane."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), numbered(*[0] * vector.count))


def has_feature(context: Any, feature: str) -> bool:
    """Whether the CPU that is compiled for has a feature, such as "+avx2"."""
    return feature in context.codegen().magic_tuple()[2].split(",")


# -- arithmetic --------------------------------------------------------------------------------------------------
def _binary(name_float: str | None, name_int: str | None) -> Any:
    """An intrinsic that applies an LLVM instruction to two vectors of one kind."""

    @intrinsic
    def apply(typingctx, a, b):  # type: ignore[no-untyped-def]
        if not (isinstance(a, LanesType) and a == b):
            return None
        name = name_float if a.kind in _FLOATS else name_int
        if name is None:
            return None
        return a(a, b), lambda context, builder, signature, args: getattr(builder, name)(*args)

    return apply


def _compare(symbol: str) -> Any:
    @intrinsic
    def apply(typingctx, a, b):  # type: ignore[no-untyped-def]
        if not (isinstance(a, LanesType) and a == b):
            return None

        def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
            compare = builder.fcmp_ordered if a.kind == "float" else builder.icmp_signed
            return compare(symbol, *args)

        return MASK(a, b), emit

    return apply


_OPERATORS = {
    operator.add: _binary("fadd", "add"),
    operator.sub: _binary("fsub", "sub"),
    operator.mul: _binary("fmul", "mul"),
    operator.and_: _binary(None, "and_"),
    operator.or_: _binary(None, "or_"),
    operator.xor: _binary(None, "xor"),
    operator.lshift: _binary(None, "shl"),
    operator.rshift: _binary(None, "lshr"),
    operator.truediv: _binary("fdiv", None),
    operator.lt: _compare("<"),
    operator.le: _compare("<="),
    operator.gt: _compare(">"),
    operator.ge: _compare(">="),
    operator.eq: _compare("=="),
}


def _register(symbol: Any, function: Any) -> None:
    @overload(symbol)
    def apply(a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, LanesType) and a == b:
            return lambda a, b: function(a, b)
        return None


for _symbol, _function in _OPERATORS.items():
    _register(_symbol, _function)


@intrinsic
def select(typingctx, mask, a, b):  # type: ignore[no-untyped-def]
    """Lane of ``a`` where the mask is set, else of ``b``."""
    return a(mask, a, b), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def floats(typingctx, scalar):  # type: ignore[no-untyped-def]
    """Eight times one float32."""
    return FLOAT(types.float32), lambda context, builder, signature, args: splat(builder, args[0], vector_of("float"))


@intrinsic
def wides(typingctx, scalar):  # type: ignore[no-untyped-def]
    """Sixteen times one float32."""
    return WIDE(types.float32), lambda context, builder, signature, args: splat(builder, args[0], vector_of("wide"))


@intrinsic
def parts(typingctx, value):  # type: ignore[no-untyped-def]
    """The first eight of wide lanes, and the others."""
    result = types.UniTuple(FLOAT, 2)

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        halves = (numbered(*range(first, first + LANES)) for first in (0, LANES))
        return context.make_tuple(builder, result, [builder.shuffle_vector(args[0], args[0], half) for half in halves])

    return result(WIDE), emit


@intrinsic
def larger(typingctx, a, b):  # type: ignore[no-untyped-def]
    """The larger one of wide lanes."""
    return WIDE(a, b), lambda context, builder, signature, args: builder.select(builder.fcmp_ordered(">", *args), *args)


@intrinsic
def where_larger(typingctx, a, b, one, other):  # type: ignore[no-untyped-def]
    """Wide lanes of ``one`` where a > b, else of ``other``."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered(">", *args[:2]), *args[2:])

    return WIDE(a, b, one, other), emit


@intrinsic
def ints(typingctx, scalar):  # type: ignore[no-untyped-def]
    """Eight times one int32."""
    return INT(types.int32), lambda context, builder, signature, args: splat(builder, args[0], vector_of("int"))


def _convert(source: LanesType, target: LanesType, name: str) -> Any:
    @intrinsic
    def apply(typingctx, a):  # type: ignore[no-untyped-def]
        if a != source:
            return None
        return target(a), lambda context, builder, signature, args: getattr(builder, name)(args[0], vector_of(target.kind))

    return apply


truncate = _convert(FLOAT, INT, "fptosi")
to_float = _convert(INT, FLOAT, "sitofp")
as_bits = _convert(FLOAT, INT, "bitcast")
as_float = _convert(INT, FLOAT, "bitcast")
to_long = _convert(INT, LONG, "zext")
low_half = _convert(LONG, INT, "trunc")


@intrinsic
def any_lane(typingctx, mask):  # type: ignore[no-untyped-def]
    """Whether a lane of the mask is set."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], I8), ir.Constant(I8, 0))

    return types.boolean(MASK), emit


@intrinsic
def set_lanes(typingctx, mask):  # type: ignore[no-untyped-def]
    """The mask as the low bits of an int64: the first lane's is the lowest."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.zext(builder.bitcast(args[0], I8), I64)

    return types.int64(MASK), emit


@intrinsic
def lowest_bit(typingctx, bits):  # type: ignore[no-untyped-def]
    """The place of the lowest bit of an int64 that is set; of 0 it is 64."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.cttz(args[0], ir.Constant(_I1, 0))

    return types.int64(types.int64), emit


@intrinsic
def nearest(typingctx, value):  # type: ignore[no-untyped-def]
    """Float lanes rounded to integers, halves to even."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = vector_of("float")
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), "llvm.rint.v8f32")
        return builder.call(function, args)

    return FLOAT(FLOAT), emit


@intrinsic
def root(typingctx, value):  # type: ignore[no-untyped-def]
    """Square roots of float lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = vector_of("float")
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), "llvm.sqrt.v8f32")
        return builder.call(function, args)

    return FLOAT(FLOAT), emit


@intrinsic
def fused(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c of float or wide lanes, rounded once where the CPU can: for encoders only, whose choices are free."""
    if not (isinstance(a, LanesType) and a.kind in _FLOATS):
        return None

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = vector_of(a.kind)
        kind, name = ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{vector.count}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return a(a, a, a), emit


@intrinsic
def magnitude(typingctx, value):  # type: ignore[no-untyped-def]
    """|value| of float lanes."""

    def emit(context, builder, signature, args):  # type: ignore[no-untyped-def]
        mask = ir.Constant(vector_of("int"), [0x7FFFFFFF] * LANES)
        return builder.bitcast(builder.and_(builder.bitcast(args[0], vector_of("int")), mask), vector_of("float"))

    return FLOAT(FLOAT), emit


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


@overload(min)
def _min(a, b):  # type: ignore[no-untyped-def]
    if isinstance(a, LanesType) and a == b:
        return lambda a, b: select(a < b, a, b)
    return None


@overload(max)
def _max(a, b):  # type: ignore[no-untyped-def]
    if isinstance(a, LanesType) and a == b:
        return lambda a, b: select(a > b, a, b)
    return None
