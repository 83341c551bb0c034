"""The endpoint's errors, in the form of OpenAI's.

    ApiError
    ├── BadRequest        400  invalid request; names the field
    ├── Unauthorized      401  missing or unknown API key
    ├── NotFound          404  no such voice or path
    ├── NotAllowed        405  method not allowed
    ├── Conflict          409  the voice already exists
    ├── TooLarge          413  body or recording too large
    ├── Busy              429  all slots in use and the queue full; with retry-after
    ├── Internal          500  internal error; the log has the traceback under the request's id
    ├── NotReady          503  the model is loading, or its replica was lost; with retry-after
    └── TooSlow           504  the request took too long

Messages never contain server paths, tracebacks, or anything from other requests.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ApiError(Exception):
    """An error response.

    Args:
        param: the invalid field, if any.
        retry_after_s: when to retry.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after_s = message, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the body in OpenAI's form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if isinstance(self, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        return headers


class BadRequest(ApiError):
    status, kind, code = 400, "invalid_request_error", "invalid_request"


class Unauthorized(ApiError):
    status, kind, code = 401, "invalid_request_error", "invalid_api_key"


class NotFound(ApiError):
    status, kind, code = 404, "invalid_request_error", "not_found"


class NotAllowed(ApiError):
    status, kind, code = 405, "invalid_request_error", "method_not_allowed"


class Conflict(ApiError):
    status, kind, code = 409, "invalid_request_error", "already_exists"


class TooLarge(ApiError):
    status, kind, code = 413, "invalid_request_error", "too_large"


class Busy(ApiError):
    status, kind, code = 429, "rate_limit_error", "queue_full"


class Internal(ApiError):
    status, kind, code = 500, "server_error", "internal_error"


class NotReady(ApiError):
    status, kind, code = 503, "server_error", "not_ready"


class TooSlow(ApiError):
    status, kind, code = 504, "server_error", "timeout"


LEAVES = tuple(ApiError.__subclasses__())


def from_status(status: int, message: str) -> ApiError:
    """Return the error for a status that a web framework raised."""
    leaf = next((leaf for leaf in LEAVES if leaf.status == status), BadRequest if status < 500 else Internal)
    return leaf(message)
