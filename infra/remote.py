"""Calls to a remote store: made again where that can help, explained where it cannot.

Below us botocore tries a request three times and s3fs a broken connection five times; here the
whole operation is tried again, with pauses that double and are drawn at random, so that many
machines that failed together do not come back together (Brooker, "Exponential Backoff And Jitter",
AWS Architecture Blog, 2015). No client library is imported: errors are known by code and name.
"""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

TRIES = 6
_FIRST_PAUSE = 0.2
_SOON = 45.0  # seconds: three tries of botocore's to connect, with pauses, end before
_LONGEST_PAUSE = 10.0  # seconds; six tries wait 6 s on average, 12 at most


class StoreError(ValueError):
    """The store cannot be used as asked; the message names the URL and the remedy."""


_PASSING_CODES = {
    *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"),
    *("TooManyRequests", "OperationAborted", "ConditionalRequestConflict", "IncompleteBody"),
    *("BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload", "BadGateway", "GatewayTimeout"),
    # As other servers and gateways call the same: MinIO, Azure, Ceph, Amazon's newer endpoints.
    *("SlowDownRead", "SlowDownWrite", "XMinioServerNotInitialized", "ServerNotInitialized"),
    *("ServerBusy", "OperationTimedOut", "RateLimitExceeded", "ThrottlingException"),
    *("RequestLimitExceeded", "BandwidthLimitExceeded", "RequestThrottled", "ClientDisconnected"),
    *("409", "429", "500", "502", "503", "504"),
}
# Of botocore, aiohttp, fsspec and azure-core: connections that break, and answers cut short.
_PASSING_CLASSES = {
    *("HTTPClientError", "EndpointConnectionError", "ResponseParserError", "FSTimeoutError"),
    # The last is the class above botocore's connect time-out and proxy errors, and requests' own.
    *("ConnectTimeoutError", "ProxyConnectionError", "ConnectionError", "NoValidConnectionsError"),
    *("ClientPayloadError", "ClientConnectionError", "IncompleteReadError", "IncompleteRead"),
    *("ServiceRequestError", "ServiceResponseError", "IncompleteTransfer"),
    "SSHException",  # paramiko's, of a session that broke
}
_LASTING_CLASSES = {"AuthenticationException", "BadHostKeyException"}  # kinds of the last one
_PASSING_ERRNO = {
    *(errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    *(errno.ETIMEDOUT, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH),
}

_CREDENTIALS = (
    "the credentials are refused; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
    "AWS_SESSION_TOKEN (or the profile that AWS_PROFILE names), and the endpoint they are for"
)
_NO_SPACE = "the store has no space left, or a quota is used up; free some, or choose another"
_ADVICE = {
    "NoSuchBucket": ("there is no such bucket; create it, or check its name and AWS_ENDPOINT_URL"),
    "InvalidBucketName": "that is no valid name of a bucket",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "RequestTimeTooSkewed": "this machine's clock is wrong; S3 accepts 15 minutes of difference",
    "QuotaExceeded": _NO_SPACE,
    "XMinioStorageFull": _NO_SPACE,
    "InsufficientStorage": _NO_SPACE,
    "507": _NO_SPACE,
}
_NO_KEY = "No authentication methods available"
_ADVICE_OF_CLASS = {
    "NoCredentialsError": (
        "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    ),
    "PartialCredentialsError": _CREDENTIALS,
    "ProfileNotFound": "AWS_PROFILE names a profile that does not exist",
    "EndpointConnectionError": "nothing answers there; check the network and AWS_ENDPOINT_URL",
    "ClientAuthenticationError": "the credentials are refused; check them",
    "AuthenticationException": "the server lets nobody in with these keys; check user and ~/.ssh",
    "BadHostKeyException": "the server has another host key than the one known for it",
    "ParamValidationError": "that is no valid name of a bucket",
    "SSLError": "no secure connection; check the certificate and AWS_CA_BUNDLE",
}


class IncompleteTransfer(OSError):  # noqa: N818 (the name says what is the matter)
    """Fewer or more bytes came than are there."""


def patiently(url: str, work: Callable[[], T], tries: int = TRIES) -> T:
    """`work()`, tried again after faults that pass.

    Args:
        url: of the store, for messages.
        work: must be safe to repeat.

    Raises:
        StoreError: when the store refuses, or still fails after `tries`.
        OSError: what `work` raises for its own reasons (FileNotFoundError and the like), unchanged.
    """
    for attempt in range(tries):
        try:
            return work()
        except Exception as error:
            if not is_passing(error):
                advice = _advice(error)
                if advice is None:
                    raise
                raise StoreError(f"{url}: {advice} ({_words(error)})") from error
            if attempt + 1 == tries:
                advice = _advice(error) or "the store does not answer as it should; run again later"
                raise StoreError(f"{url}: {advice} ({_words(error)})") from error
            time.sleep(random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)))
    raise AssertionError("tries must be at least 1")


def answered_soon(url: str, work: Callable[[], T]) -> T:
    """`work()`, at a server that may take what is sent and say nothing, for minutes.

    Raises:
        StoreError: when there is no answer in time; `work` goes on in a thread that ends with the
            process.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # noqa: BLE001 (it is raised where it is waited for)
            found.set_exception(error)

    threading.Thread(target=run, name="first answer", daemon=True).start()
    if not wait([found], _SOON).done:
        raise StoreError(
            f"{url}: no full answer came from there in {_SOON:g} s; check the network, and "
            "AWS_ENDPOINT_URL where that is set"
        )
    return found.result()


def heard(url: str, ask: Callable[[], object]) -> None:
    """Return when a short question, of a request or two, is answered in whatever way.

    Before questions whose answers may rightly take long. What the server refuses or cannot do now
    is told, or tried again, where the real question is asked.

    Raises:
        StoreError: as `answered_soon` does, also when the server only is too slow.
    """

    def listen() -> None:
        with contextlib.suppress(Exception):
            ask()

    answered_soon(url, listen)


def is_passing(error: BaseException) -> bool:
    """Whether trying again can help: a broken connection, a busy server, an answer cut short."""
    code = error_code(error)
    if code is not None:
        return code in _PASSING_CODES
    kinds = set().union(*(_classes(each) for each in _chain(error)))
    if kinds & _LASTING_CLASSES:
        return False
    if kinds & _PASSING_CLASSES:
        return True
    if isinstance(error, (TimeoutError, ConnectionError, EOFError)):
        return True  # the last: what paramiko says of a connection that the server closed
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    if str(status) in _PASSING_CODES:
        return True
    if not isinstance(error, OSError):
        return False
    # The words are paramiko's, of a connection that was lost.
    return error.errno in _PASSING_ERRNO or str(error) == "Socket is closed"


def error_code(error: BaseException) -> str | None:
    """What an S3 server called the fault ("NoSuchBucket", "412"), or None."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
    return None


def _advice(error: BaseException) -> str | None:
    code = error_code(error)
    if code in _ADVICE:
        return _ADVICE[code]
    for each in _chain(error):
        known = _classes(each) & set(_ADVICE_OF_CLASS)
        if known:
            return _ADVICE_OF_CLASS[known.pop()]
    if isinstance(error, PermissionError):
        return (
            "permission denied; these credentials need to list the bucket and to read, write and "
            "delete objects in it"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _NO_SPACE
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _classes(error: BaseException) -> set[str]:
    names = {kind.__name__ for kind in type(error).__mro__}
    # paramiko says with its general error alone that there is no key at all.
    return names | ({"AuthenticationException"} if str(error) == _NO_KEY else set())


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    code = error_code(error)
    return f"{code}: {text}" if code and code not in text else text or type(error).__name__
