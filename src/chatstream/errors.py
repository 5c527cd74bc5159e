"""All errors of the public API. The tree shows who acts next: the caller, the operator or we.

ChatStreamError
├─ InvalidRequest 400          the caller changes the request
│  ├─ PromptTooLong 400
│  ├─ UnsupportedParameter 400
│  ├─ BodyTooLarge 413
│  └─ NotFound 404             no such request, model or path
├─ AccessDenied                the caller presents another key
│  ├─ Unauthorized 401         no key, or an unknown one
│  └─ Forbidden 403            the key has no right to do this
├─ Overloaded                  the caller tries again later
│  ├─ QueueFull 429
│  ├─ ClientLimit 429          this client has its maximum of waiting requests
│  ├─ Infeasible 429           the request would probably start too late
│  ├─ QueueTimeout 429         the request did not start in time
│  ├─ Paused 503               an operator has paused admission
│  ├─ ShuttingDown 503
│  └─ EngineUnavailable 503    the engine cannot serve now; the request is not at fault
├─ Cancelled 409               no action: the client or an operator ended it, or the client stopped reading
├─ EngineError 500             the operator reads the log: the engine failed on this request
└─ ConfigError                 the operator corrects a setting before the start

`asyncio.CancelledError` is not wrapped. A wrong state transition is our bug: it raises `InvalidTransition`
(scheduler/states.py), which is not in this tree and has no HTTP status of its own.
"""

from __future__ import annotations

from typing import ClassVar


class ChatStreamError(Exception):
    """Base class. `message` is written for the caller or operator who must act next."""

    code: ClassVar[str] = "internal_error"
    """Stable identifier; the same in bodies, events, metrics and docs."""
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    """The coarse `type` of OpenAI's error object."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The wrong field, by its name on the wire."""
        self.retry_after_s = retry_after_s
        """Seconds until a retry makes sense; None: a retry does not help."""


class InvalidRequest(ChatStreamError):
    """The caller must change the request."""

    code = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt and answer do not fit the model's context."""

    code = "prompt_too_long"


class UnsupportedParameter(InvalidRequest):
    """The engine does not support a parameter; it is refused by name, never ignored."""

    code = "unsupported_parameter"


class BodyTooLarge(InvalidRequest):
    """The request body is over the server's limit."""

    code = "body_too_large"
    http_status = 413


class NotFound(InvalidRequest):
    """There is no such request, model or path."""

    code = "not_found"
    http_status = 404


class AccessDenied(ChatStreamError):
    """The caller must present another key."""

    openai_type = "authentication_error"


class Unauthorized(AccessDenied):
    """No key was presented, or an unknown one."""

    code = "unauthorized"
    http_status = 401


class Forbidden(AccessDenied):
    """The key or the origin of the call has no right to do this."""

    code = "forbidden"
    http_status = 403
    openai_type = "permission_error"


class Overloaded(ChatStreamError):
    """The caller must try again later; `retry_after_s` estimates when."""


class QueueFull(Overloaded):
    """All slots are in use and the queue is full."""

    code = "queue_full"
    http_status = 429
    openai_type = "rate_limit_error"


class ClientLimit(Overloaded):
    """This client has the maximum number of waiting requests; other clients are served."""

    code = "client_limit"
    http_status = 429
    openai_type = "rate_limit_error"


class Infeasible(Overloaded):
    """The backlog is too long for the request to start in time; it is rejected at once instead of expiring later."""

    code = "infeasible"
    http_status = 429
    openai_type = "rate_limit_error"


class QueueTimeout(Overloaded):
    """The request did not start within its time to wait."""

    code = "queue_timeout"
    http_status = 429
    openai_type = "rate_limit_error"


class Paused(Overloaded):
    """An operator has paused admission. Waiting and running requests are served; new ones are rejected."""

    code = "paused"
    http_status = 503


class ShuttingDown(Overloaded):
    """The server is draining: it rejects new and waiting requests."""

    code = "shutting_down"
    http_status = 503


class EngineUnavailable(Overloaded):
    """The engine cannot serve the request now. The request is not at fault and may be tried again."""

    code = "engine_unavailable"
    http_status = 503


class Cancelled(ChatStreamError):
    """The request was cancelled before its answer was complete."""

    code = "cancelled"
    http_status = 409
    openai_type = "invalid_request_error"


class EngineError(ChatStreamError):
    """The engine failed during the generation. Its slot is free again; other requests are unaffected."""

    code = "engine_error"


class ConfigError(ChatStreamError):
    """A setting is wrong; raised before the start."""

    code = "config_error"
