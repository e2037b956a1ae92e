"""Law: every error that pqcodec raises on purpose is one of these, named by whose fault it is.

``PQError``
    ``InvalidArgument``      the caller asked for something that cannot be done
        ``NonFiniteInput``   the tensor holds NaN or Inf
        ``BackendUnavailable``  the backend is unknown, or its library is missing
    ``CorruptStream``        the bytes are not what an encoder wrote
        ``TruncatedStream``  the bytes end too early
    ``UnsupportedStream``    the bytes may be right, but this release cannot read them
        ``MissingTable``     the stream names a shared table that is not here
"""

from __future__ import annotations

KEEP_NONFINITE = "mend the tensor, or pass nonfinite='exact' to keep such vectors as they are"


class PQError(Exception):
    """Base of all errors of pqcodec."""

    def at(self, where: str) -> PQError:
        """The error with ``where`` in front of its message."""
        return type(self)(f"{where}: {self}")


class InvalidArgument(PQError, ValueError):
    """The caller's fault: an argument is outside what is supported."""


class NonFiniteInput(InvalidArgument):
    """The tensor to encode holds NaN or Inf; the message names the first place.

    >>> import numpy as np, pqcodec
    >>> try:
    ...     pqcodec.encode(np.full((4, 64), np.inf, np.float16), backend="reference")
    ... except NonFiniteInput as error:
    ...     print(str(error)[:38])
    element [0, 0] of the tensor is inf (4

    ``found``: what was found and where; ``advice``: what to do where the tensor was passed, by the options that are there.
    """

    def __init__(self, found: str, advice: str = KEEP_NONFINITE) -> None:
        super().__init__(found, advice)
        self.found, self.advice = found, advice

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}"

    def at(self, where: str) -> NonFiniteInput:
        """The error with ``where`` in front of its message."""
        return NonFiniteInput(f"{where}: {self.found}", self.advice)


class BackendUnavailable(InvalidArgument):
    """The backend asked for is unknown or its library is not installed."""


class CorruptStream(PQError):
    """The stream's fault: a checksum or a field does not hold.

    >>> import numpy as np, pqcodec
    >>> data = pqcodec.encode(np.ones((4, 64), np.float16), backend="reference")
    >>> try:
    ...     pqcodec.decode(data[:-1] + b"?", backend="reference")
    ... except CorruptStream as error:
    ...     print(error)
    checksum does not hold: payload, leading index 0, tokens 0 .. 3
    """


class TruncatedStream(CorruptStream):
    """The stream ends before its header says it does.

    >>> import numpy as np, pqcodec
    >>> try:
    ...     pqcodec.decode(pqcodec.encode(np.ones((4, 64), np.float16), backend="reference")[:-7])
    ... except TruncatedStream as error:
    ...     print(error)
    180 bytes announced, 173 there; the stream is cut off
    """


class UnsupportedStream(PQError):
    """A newer version or an option that this release does not know."""


class MissingTable(UnsupportedStream):
    """A stream names a table that many streams share, and the table is not here; the message has its name."""
