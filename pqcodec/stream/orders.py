"""Law: the orders of the rotation (SPEC 5.2): head_dim -> order N, N -> the base of its Hadamard matrix."""

from __future__ import annotations

from pqcodec.constants import GROUP, HADAMARD_BASES, MAX_HEAD_DIM, ROTATION_ORDERS
from pqcodec.errors import InvalidArgument


def order_for(head_dim: int) -> int:
    """The smallest supported order N >= head_dim.

    >>> [order_for(d) for d in (1, 64, 80, 100, 128, 576)]
    [16, 64, 80, 112, 128, 576]
    """
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise InvalidArgument(f"head_dim {head_dim} is outside 1 .. {MAX_HEAD_DIM}; reshape the last dimension")
    return next(order for order in ROTATION_ORDERS if order >= head_dim)


def whole_groups(head_dim: int) -> int:
    """The smallest multiple of 16 that is not below head_dim: coordinates of rows that are not rotated (SPEC 13.2).

    >>> [whole_groups(d) for d in (1, 64, 100)]
    [16, 64, 112]
    """
    return -(-head_dim // GROUP) * GROUP


def base_of(order: int) -> int:
    """The base whose power-of-two multiple ``order`` is: the Kronecker factor that is not a power of two.

    >>> [base_of(n) for n in (128, 96, 80, 112, 576)]
    [1, 12, 20, 28, 36]
    """
    odd = order
    while odd % 2 == 0:
        odd //= 2
    return next(base for base in HADAMARD_BASES if (base == 1 and odd == 1) or (base > 1 and base == 4 * odd))
