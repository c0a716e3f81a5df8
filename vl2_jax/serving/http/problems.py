"""What went wrong with a request, as OpenAI's clients read it: a status and `{"error": {message, type, param, code}}`.

Messages are ours alone: what other software says of its errors may hold addresses of memory or names of files, so it is
logged and not sent.
"""

from __future__ import annotations

import math
from typing import Any

from vl2_jax.errors import ClosedError, ContextLengthError, ImageError, OverloadedError, RequestError, VL2Error

INVALID, MISSING, BUSY, DOWN = "invalid_request_error", "not_found_error", "rate_limit_error", "server_error"
_SECONDS_UNTIL_READY = 5  # after which a client may ask again whether a model is loaded


class Problem(Exception):
    """Why a request gets no answer.

    Attributes:
      status: of HTTP; clients try 429 and 5xx again.
      kind, param, code: OpenAI's `type`, the field that is wrong and a word for programs.
      headers: sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(param: str, message: str) -> Problem:
    """A field that cannot be honoured, where leaving it out silently would change the answer."""
    return Problem(400, message, param=param, code="unsupported_parameter")


def not_ready(message: str) -> Problem:
    return Problem(503, message, DOWN, code="not_ready", headers={"Retry-After": str(_SECONDS_UNTIL_READY)})


def problem_of(error: Exception) -> Problem:
    """What is told about an error; nothing of one that is not ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, OverloadedError):
        seconds = str(max(1, math.ceil(error.retry_after)))
        return Problem(429, str(error), BUSY, code="overloaded", headers={"Retry-After": seconds})
    if isinstance(error, ClosedError):
        return not_ready(str(error))
    if isinstance(error, ContextLengthError):
        return Problem(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ImageError):
        return Problem(422, str(error), param="messages", code="invalid_image")
    if isinstance(error, VL2Error):
        param = str(error).split(" ", 1)[0] if isinstance(error, RequestError) else "messages"
        return Problem(400, str(error), param=param if param.isidentifier() else None)
    return Problem(500, "the server failed at this request; its log says why, under the x-request-id.", DOWN)


def as_event(problem: Problem) -> dict[str, Any]:
    """The error of a stream that has begun: its status was sent, so the number goes into the code."""
    return {"error": problem.body["error"] | {"code": problem.body["error"]["code"] or str(problem.status)}}
