"""What an endpoint may answer instead of audio, each in the shape of OpenAI's errors.

    ApiError
    ├── BadRequest        400  what was sent cannot be spoken; names the field
    ├── Unauthorized      401  a key is needed, or this one is none
    ├── NotFound          404  no such voice, no such path
    ├── NotAllowed        405  no such method
    ├── Conflict          409  the voice is there already
    ├── TooLarge          413  more bytes than are taken
    ├── Busy              429  all slots speak and the queue is full; says when to come again
    ├── Internal          500  ours to mend; the log has the trace under the request's id
    ├── NotReady          503  the model is loading, or its replica is lost; says when to come again
    └── TooSlow           504  it took longer than a request may

No message holds a path of the server, a trace, or anything of another request.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ApiError(Exception):
    """An answer that is no audio.

    Args:
        param: the field that is wrong, if it is one.
        retry_after_s: when to come again.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.retry_after_s = message, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes with the body."""
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


def of_status(status: int, message: str) -> ApiError:
    """The error that a web framework raised with a number."""
    leaf = next((leaf for leaf in LEAVES if leaf.status == status), BadRequest if status < 500 else Internal)
    return leaf(message)
