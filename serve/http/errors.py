"""The endpoint's errors, in OpenAI's format.

    ApiError
    ├── BadRequest           400  invalid request; names the field
    ├── Unauthorized         401  missing or unknown API key
    ├── NotFound             404  unknown voice or path
    ├── MethodNotAllowed     405  method not allowed for this path
    ├── Conflict             409  the voice already exists
    ├── PayloadTooLarge      413  request body or recording too large
    ├── TooManyRequests      429  all slots in use and the queue full; with retry-after
    ├── InternalServerError  500  internal error; the log has the traceback under the request id
    ├── ServiceUnavailable   503  the model is loading, or its replica was lost; with retry-after
    └── GatewayTimeout       504  the request exceeded its time limit

Messages never contain server paths, tracebacks, or data of other requests.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ApiError(Exception):
    """An error response.

    Args:
        message: what is wrong and how to fix it.
        param: the invalid field, if any.
        retry_after_s: the value of the `retry-after` header, if any.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after_s = message, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the response body in OpenAI's format."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the response headers."""
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


class MethodNotAllowed(ApiError):
    status, kind, code = 405, "invalid_request_error", "method_not_allowed"


class Conflict(ApiError):
    status, kind, code = 409, "invalid_request_error", "already_exists"


class PayloadTooLarge(ApiError):
    status, kind, code = 413, "invalid_request_error", "too_large"


class TooManyRequests(ApiError):
    status, kind, code = 429, "rate_limit_error", "queue_full"


class InternalServerError(ApiError):
    status, kind, code = 500, "server_error", "internal_error"


class ServiceUnavailable(ApiError):
    status, kind, code = 503, "server_error", "not_ready"


class GatewayTimeout(ApiError):
    status, kind, code = 504, "server_error", "timeout"


ERROR_TYPES = tuple(ApiError.__subclasses__())


def error_from_status(status: int, message: str) -> ApiError:
    """Return the error for an HTTP status raised by the web framework."""
    fallback = BadRequest if status < 500 else InternalServerError
    return next((error for error in ERROR_TYPES if error.status == status), fallback)(message)
