"""Every error a user of ChatStream can meet, and whose turn it is next.

ChatStreamError
├─ InvalidRequest 400          the caller changes the request
│  ├─ PromptTooLong 400
│  ├─ UnsupportedParameter 400
│  ├─ BodyTooLarge 413
│  └─ NotFound 404             no such request, model or path
├─ AccessDenied                the caller is someone else
│  ├─ Unauthorized 401         no key
│  └─ Forbidden 403            a key that may not
├─ Overloaded                  the caller comes back later
│  ├─ QueueFull 429
│  ├─ ClientLimit 429          this client has enough in line already
│  ├─ Infeasible 429           it would start too late; better said now than later
│  ├─ QueueTimeout 429         waited as long as it was allowed to
│  ├─ Paused 503               an operator takes nobody new
│  ├─ ShuttingDown 503
│  └─ EngineUnavailable 503    nobody can serve this now; the request itself was not at fault
├─ Cancelled 409               somebody ended it: the client, an operator, a stalled reader
├─ EngineError 500             the model failed on this request; the slot is free again
└─ ConfigError                 the operator corrects a setting before we start

`asyncio.CancelledError` stays itself. A wrong state transition is our bug and raises `InvalidTransition`
(scheduler/states.py), which is not in this tree and never an HTTP answer of its own.
"""

from __future__ import annotations

from typing import ClassVar


class ChatStreamError(Exception):
    """Base class. `message` is written for the person who must act next."""

    code: ClassVar[str] = "internal_error"
    """Stable; the same word in bodies, events, metrics and docs."""
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    """The coarse `type` of OpenAI's error object."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field at fault, by its name on the wire."""
        self.retry_after_s = retry_after_s
        """When it makes sense to try again, in seconds; None: trying again does not help."""


class InvalidRequest(ChatStreamError):
    """The caller must change the request."""

    code = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"


class PromptTooLong(InvalidRequest):
    """Prompt and answer do not fit the model's context."""

    code = "prompt_too_long"


class UnsupportedParameter(InvalidRequest):
    """A parameter this engine cannot honour; refused by name, never ignored."""

    code = "unsupported_parameter"


class BodyTooLarge(InvalidRequest):
    """The request body is over the server's limit."""

    code = "body_too_large"
    http_status = 413


class NotFound(InvalidRequest):
    """No such request, model or path."""

    code = "not_found"
    http_status = 404


class AccessDenied(ChatStreamError):
    """The caller must be someone else."""

    openai_type = "authentication_error"


class Unauthorized(AccessDenied):
    """No key was presented."""

    code = "unauthorized"
    http_status = 401


class Forbidden(AccessDenied):
    """The key or the origin of the call is not allowed to do this."""

    code = "forbidden"
    http_status = 403
    openai_type = "permission_error"


class Overloaded(ChatStreamError):
    """The caller comes back later; `retry_after_s` says when."""


class QueueFull(Overloaded):
    """All slots are taken and all waiting places too."""

    code = "queue_full"
    http_status = 429
    openai_type = "rate_limit_error"


class ClientLimit(Overloaded):
    """This client has as many requests in line as one client may have; others are served."""

    code = "client_limit"
    http_status = 429
    openai_type = "rate_limit_error"


class Infeasible(Overloaded):
    """By the backlog, the request would probably not start in time; refused now rather than given up later."""

    code = "infeasible"
    http_status = 429
    openai_type = "rate_limit_error"


class QueueTimeout(Overloaded):
    """The request waited as long as it was allowed to and did not start."""

    code = "queue_timeout"
    http_status = 429
    openai_type = "rate_limit_error"


class Paused(Overloaded):
    """An operator has paused the intake: those who wait and run are served, nobody new is taken."""

    code = "paused"
    http_status = 503


class ShuttingDown(Overloaded):
    """The server is draining: it takes nothing new and refuses those who wait."""

    code = "shutting_down"
    http_status = 503


class EngineUnavailable(Overloaded):
    """No engine can serve this now. The request was not at fault and may be tried again, here or elsewhere."""

    code = "engine_unavailable"
    http_status = 503


class Cancelled(ChatStreamError):
    """Somebody ended the request before its answer was complete."""

    code = "cancelled"
    http_status = 409
    openai_type = "invalid_request_error"


class EngineError(ChatStreamError):
    """The model failed while it generated. The slot is free again; other requests go on."""

    code = "engine_error"


class ConfigError(ChatStreamError):
    """A setting is wrong; said before anything starts."""

    code = "config_error"
