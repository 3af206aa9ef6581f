"""One tree for every failure a user can meet; the class has the HTTP status and says whether EdgeServe is at fault.

Every constructor passes exactly its own arguments to ``super().__init__``, so that pickle carries an error unchanged
from one process to another.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeServeError(Exception):
    """A failure with one sentence for the user: what happened, and what to do."""

    status: ClassVar[int] = 500
    #: Whether the cause is neither the request nor the load: the log gets the traceback, the client a request id.
    is_fault: ClassVar[bool] = True

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The sentence shown to the user."""
        return str(self)

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the same request is worth sending again, if it ever is."""
        return None


class InvalidRequest(EdgeServeError):
    """The request itself is wrong: malformed JSON, shape, dtype, name, image or number."""

    status = 400
    is_fault = False


class Unauthenticated(EdgeServeError):
    """The request carries no token although one is required."""

    status = 401
    is_fault = False


class Forbidden(EdgeServeError):
    """The request carries a token that is not the right one."""

    status = 403
    is_fault = False


class NotFound(EdgeServeError):
    """The model, family, version, location or path does not exist."""

    status = 404
    is_fault = False


class MethodNotAllowed(EdgeServeError):
    """The path exists, but not for this HTTP method."""

    status = 405
    is_fault = False


class Conflict(EdgeServeError):
    """The operation contradicts the present state, such as unloading a model in use."""

    status = 409
    is_fault = False


class PayloadTooLarge(EdgeServeError):
    """The body is larger than the configured limit."""

    status = 413
    is_fault = False


class UnsupportedMediaType(EdgeServeError):
    """The content type is not one that this endpoint takes."""

    status = 415
    is_fault = False


class Unavailable(EdgeServeError):
    """Nothing is wrong with the request, but it cannot be served at this moment."""

    status = 503
    is_fault = False

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super(EdgeServeError, self).__init__(message, retry_s)
        self._retry_s = retry_s

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the same request is worth sending again."""
        return self._retry_s


class DeadlineExceeded(EdgeServeError):
    """The deadline of the request cannot be, or was not, met."""

    status = 504
    is_fault = False


class DoesNotFit(EdgeServeError):
    """The model is larger than the memory of any worker that could hold it."""

    status = 507
    is_fault = False


class InternalError(EdgeServeError):
    """A fault of ours; the message carries the request id that the log has too."""

    status = 500


class StoreError(EdgeServeError):
    """A model in the store is missing, truncated, corrupt or not usable."""

    status = 500


class ModelChanged(StoreError):
    """What a worker has in memory of a model is no longer what the store has; the worker loads it again."""

    status = 500


class DownloadFailed(StoreError):
    """A file could not be fetched from where its reference says; it may be there later."""

    status = 500


class WeightsUnavailable(StoreError):
    """Random weights would have to stand in for real ones, and the command forbids it."""

    status = 500


class ConfigError(EdgeServeError):
    """A configuration file or value is wrong; the command line exits with code 2."""

    status = 400
    is_fault = False


class TraceError(EdgeServeError):
    """A request stream or a table of models is wrong: the message names file, line and column, or the parameter."""

    status = 400
    is_fault = False
