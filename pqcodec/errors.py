"""Law: every error that pqcodec raises on purpose is one of these, named by whose fault it is.

``PQError``
    ``InvalidArgument``      the caller asked for something that cannot be done
        ``NonFiniteInput``   the tensor holds NaN or Inf
        ``BackendUnavailable``  the backend is unknown, or its library is missing
    ``CorruptStream``        the bytes are not what an encoder wrote
        ``TruncatedStream``  the bytes end too early
    ``UnsupportedStream``    the bytes may be right, but this release cannot read them
"""

from __future__ import annotations


class PQError(Exception):
    """Base of all errors of pqcodec."""


class InvalidArgument(PQError, ValueError):
    """The caller's fault: an argument is outside what is supported."""


class NonFiniteInput(InvalidArgument):
    """The tensor to encode holds NaN or Inf; the message names the first place."""


class BackendUnavailable(InvalidArgument):
    """The backend asked for is unknown or its library is not installed."""


class CorruptStream(PQError):
    """The stream's fault: a checksum or a field does not hold."""


class TruncatedStream(CorruptStream):
    """The stream ends before its header says it does."""


class UnsupportedStream(PQError):
    """A newer version or an option that this release does not know."""
