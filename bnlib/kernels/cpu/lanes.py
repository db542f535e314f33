# mypy: disable-error-code="no-untyped-def"
"""Vectors of 64 bytes for Numba: what the loops of the CPU kernels are written in.

``Lanes`` is one LLVM vector, 16 float32 or 8 float64 numbers; a processor whose registers are
shorter uses several. The number of lanes is the same everywhere, and with it the order of sums.
16-bit floats, which Numba does not have, are stored as integers (uint16 for bfloat16, int16 for
float16) and widened to float32 where they are loaded.

A vector may reach over the end of what it is loaded from or stored to: ``n`` says how many
elements are left there. Bits, for masks, are the lowest bits of an int64, that of lane 0 first.

An operation is a function that emits its instructions with a builder of LLVM's.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

_I1, _I8, _I16, _I32, _I64 = map(ir.IntType, (1, 8, 16, 32, 64))


class Lanes(types.Type):
    """The type of a vector of floating-point numbers."""

    def __init__(self, number: Any) -> None:
        self.number = number
        self.count = 512 // number.bitwidth
        super().__init__(f"Lanes({number}, {self.count})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = ir.DoubleType() if fe_type.count == 8 else ir.FloatType()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


class _Memory(NamedTuple):
    """An array or a pointer to elements, as operations see it."""

    data: Any  # the pointer
    stored: Any  # Numba's type of the elements
    vector: Any  # as many of them as there are lanes

    def at(self, builder, index, kind):
        return builder.bitcast(builder.gep(self.data, [index]), kind.as_pointer())


def _lanes_of(array: Any) -> Lanes:
    """The lanes that elements of an array are loaded into."""
    return Lanes(array.dtype if isinstance(array.dtype, types.Float) else types.float32)


def _operation(returns=lambda *kinds: types.void):
    """Make a function that emits instructions one that loops can call.

    ``returns`` gives the type of the result from those of the arguments.
    """

    def decorate(emit):
        @functools.wraps(emit)
        def typed(typingctx, *kinds):
            kinds = [types.int64 if isinstance(k, types.Integer) else k for k in kinds]

            def generate(context, builder, signature, values):
                given = []
                for kind, value in zip(kinds, values, strict=True):
                    if isinstance(kind, types.Array):
                        value = context.make_array(kind)(context, builder, value).data
                    if isinstance(kind, types.Array | types.CPointer):
                        element = context.get_value_type(kind.dtype)
                        vector = ir.VectorType(element, _lanes_of(kind).count)
                        value = _Memory(value, kind.dtype, vector)
                    given.append(value)
                made = emit(builder, *given)
                return context.get_dummy_value() if made is None else made

            return returns(*kinds)(*kinds), generate

        return intrinsic(typed)

    return decorate


def _as(element, like):
    """Vectors of another element, with as many lanes."""
    return ir.VectorType(element, like.count)


def _all(vector, number):
    return ir.Constant(vector, [number] * vector.count)


def _spread(builder, value, count):
    vector = ir.VectorType(value.type, count)
    nothing = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(nothing, value, _I32(0))
    return builder.shuffle_vector(one, nothing, _all(_as(_I32, vector), 0))


def _first(builder, n, count):
    """Which lanes are among the first ``n``."""
    numbers = ir.Constant(ir.VectorType(_I64, count), list(range(count)))
    return builder.icmp_signed("<", numbers, _spread(builder, n, count))


def _masked(builder, name, result, vector, *arguments):
    element = {"float": "f32", "double": "f64", "i16": "i16"}[str(vector.element)]
    name = f"llvm.masked.{name}.v{vector.count}{element}.p0"
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _widen(builder, value, stored):
    if isinstance(stored, types.Float):
        return value
    floats = _as(ir.FloatType(), value.type)
    if stored == types.uint16:
        kind = _as(_I32, value.type)
        return builder.bitcast(builder.shl(builder.zext(value, kind), _all(kind, 16)), floats)
    return builder.fpext(builder.bitcast(value, _as(ir.HalfType(), value.type)), floats)


def _narrow(builder, value, stored):
    """Rounded to nearest even."""
    if isinstance(stored, types.Float):
        return value
    short, wide = _as(_I16, value.type), _as(_I32, value.type)
    if stored == types.int16:
        return builder.bitcast(builder.fptrunc(value, _as(ir.HalfType(), value.type)), short)
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, _all(wide, 16)), _all(wide, 1))
    rounded = builder.add(bits, builder.add(odd, _all(wide, 0x7FFF)))
    high = builder.trunc(builder.lshr(rounded, _all(wide, 16)), short)
    return builder.select(builder.fcmp_unordered("uno", value, value), _all(short, 0x7FC0), high)


@_operation(lambda array, i, n, rest: rest)
def load(builder, array, i, n, rest):
    """array[i : i + n], as far as it fits, and ``rest`` in the lanes that are left."""
    vector, size = array.vector, array.stored.bitwidth // 8
    pointer = array.at(builder, i, vector)
    result = cgutils.alloca_once(builder, rest.type)
    full = builder.icmp_signed(">=", n, _I64(vector.count))
    with builder.if_else(full, likely=True) as (then, otherwise):
        with then:
            loaded = builder.load(pointer, align=size)
            builder.store(_widen(builder, loaded, array.stored), result)
        with otherwise:
            which, zero = _first(builder, n, vector.count), ir.Constant(vector, None)
            some = _masked(builder, "load", vector, vector, pointer, _I32(size), which, zero)
            some = _widen(builder, some, array.stored)
            builder.store(builder.select(which, some, rest), result)
    return builder.load(result)


@_operation()
def store(builder, array, i, n, v):
    """array[i : i + n] = v, as far as it fits."""
    vector, size = array.vector, array.stored.bitwidth // 8
    pointer, narrow = array.at(builder, i, vector), _narrow(builder, v, array.stored)
    full = builder.icmp_signed(">=", n, _I64(vector.count))
    with builder.if_else(full, likely=True) as (then, otherwise):
        with then:
            builder.store(narrow, pointer, align=size)
        with otherwise:
            which = _first(builder, n, vector.count)
            _masked(
                builder, "store", ir.VoidType(), vector, narrow, pointer, _I32(size), which
            )  # fmt: skip


@_operation()
def stream(builder, array, i, v):
    """array[i : i + lanes] = v past the caches; the address is a multiple of the vector's bytes."""
    size = array.stored.bitwidth // 8 * v.type.count
    narrow, pointer = _narrow(builder, v, array.stored), array.at(builder, i, array.vector)
    stored = builder.store(narrow, pointer, align=size)
    stored.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


@_operation()
def settle(builder):
    """Wait until what was streamed can be seen by other threads."""
    builder.fence("seq_cst")


@_operation(lambda *kinds: types.int64)
def load_int32(builder, array, i):
    """The four bytes from array[i] on, at any address."""
    return builder.zext(builder.load(array.at(builder, i, _I32), align=1), _I64)


@_operation()
def store_int32(builder, array, i, bits):
    """The lowest 32 bits, to the four bytes from array[i] on."""
    builder.store(builder.trunc(bits, _I32), array.at(builder, i, _I32), align=1)


@intrinsic
def spread(typingctx, array, number):
    """The number in all lanes, of the precision in which ``array`` is computed with."""
    lanes = _lanes_of(array)

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[1], number, lanes.number)
        return _spread(builder, value, lanes.count)

    return lanes(array, number), generate


@_operation(lambda *kinds: types.int64)
def lanes_in(builder, array):
    """The number of lanes."""
    return _I64(array.vector.count)


@_operation(lambda v: types.float64)
def total(builder, v):
    """The sum over the lanes, in float64 and always in the same order."""
    doubles = _as(ir.DoubleType(), v.type)
    value, count = v if v.type == doubles else builder.fpext(v, doubles), v.type.count
    while count > 1:
        count //= 2
        orders = [list(range(k, k + count)) for k in (0, count)]
        kind = ir.VectorType(_I32, count)
        value = builder.fadd(
            *(builder.shuffle_vector(value, value, ir.Constant(kind, order)) for order in orders)
        )
    return builder.extract_element(value, _I32(0))


@_operation(lambda v, w: v)
def at_least(builder, v, w):
    """The larger of two in every lane; NaN where v is NaN."""
    return builder.select(builder.fcmp_ordered("<", v, w), w, v)


@_operation(lambda *kinds: types.int64)
def positive(builder, v):
    """The bits of v > 0, or NaN."""
    which = builder.fcmp_unordered(">", v, ir.Constant(v.type, None))
    return builder.zext(builder.bitcast(which, ir.IntType(v.type.count)), _I64)


@_operation(lambda bits, v: v)
def keep(builder, bits, v):
    """v in the lanes whose bit is set, and 0 in the others."""
    which = builder.trunc(bits, ir.IntType(v.type.count))
    which = builder.bitcast(which, _as(_I1, v.type))
    return builder.select(which, v, ir.Constant(v.type, None))


@_operation(lambda array, v: v)
def as_stored(builder, array, v):
    """v as it will be when it has been stored to ``array``."""
    return _widen(builder, _narrow(builder, v, array.stored), array.stored)


def _define(operation, name):
    @_operation(lambda v, w: v)
    def compute(builder, v, w):
        # A product and a sum may become one multiply-add.
        return getattr(builder, name)(v, w, flags=("contract",))

    @overload(operation, inline="always")
    def choose(v, w):
        if isinstance(v, Lanes) and v == w:
            return lambda v, w: compute(v, w)
        return None


_define(operator.add, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
