"""Storage that does not answer for a while: tried again, then left for another start."""

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from absl import logging

from mae_jax import TryAgainError

SECONDS_BETWEEN = (1.0, 3.0, 9.0)

_TRANSIENT = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EREMOTEIO", "ECONNRESET", "ECONNREFUSED"),
        *("ECONNABORTED", "EHOSTUNREACH", "EHOSTDOWN", "ENETUNREACH", "ENETRESET", "ENETDOWN"),
    )
    if hasattr(errno, name)
}
_STATUSES = {408, 429, 500, 502, 503, 504}  # of HTTP
# Of gcsfs, aiohttp, requests and Google's clients, which are not imported for this.
_NAMES = {
    *("ServerDisconnectedError", "ClientConnectorError", "ClientOSError", "ClientPayloadError"),
    *("ServiceUnavailable", "TooManyRequests", "InternalServerError", "BadGateway"),
    *("GatewayTimeout", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError", "RetryError"),
}

P = ParamSpec("P")
T = TypeVar("T")


def is_transient(error: BaseException) -> bool:
    """Whether storage may well answer a little later, to which this error or its cause points."""
    return any(_points_there(one) for one in with_causes(error))


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _points_there(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ in _NAMES:
        return True
    if isinstance(code, int) and code in _STATUSES:
        return True
    # Orbax and TensorStore tell in words.
    told = f"{error}"
    return any(os.strerror(number) in told for number in _TRANSIENT - {errno.EAGAIN})


def retried(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, tried again where storage does not answer, and ending in a TryAgainError."""

    @functools.wraps(function)
    def trying(*args: P.args, **kwargs: P.kwargs) -> T:
        for seconds in SECONDS_BETWEEN:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not is_transient(error):
                    raise
                logging.warning("storage: %s; trying again in %.0f s", error, seconds)
            time.sleep(seconds)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not is_transient(error):
                raise
            raise TryAgainError(
                f"storage does not answer ({error}), tried {len(SECONDS_BETWEEN) + 1} times; the "
                "same command continues from the newest checkpoint"
            ) from error

    return trying
