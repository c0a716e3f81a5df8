"""What can go wrong for a user, one type per cause.

Every message names the offending value, what was expected and what to do next. All of them are `ValueError`s
so that a program which does not care about the difference can catch one thing.
"""

from typing import Any

_LONGEST = 80  # characters of a value in a message


def shown(value: Any, longest: int = _LONGEST) -> str:
    """A value as a message shows it: like `repr`, on one line, at most about `longest` characters."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value):,} bytes"
    if isinstance(value, str):
        value = value[: longest + 1]  # the repr of megabytes is not made first
    try:
        text = repr(value)
    except Exception:  # of whatever object a caller gave
        text = f"a {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\n", " ")
    return text if len(text) <= longest + 2 else text[:longest] + "..."


def one_line(error: BaseException, longest: int = 120) -> str:
    """What an error of other software says, as a part of a message of ours."""
    text = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode("utf-8") or type(error).__name__
    return text if len(text) <= longest else text[:longest] + "..."


class VL2Error(ValueError):
    """The base of everything this package raises on purpose."""


class VL2Warning(UserWarning):
    """Something that was done, and that the user may not have meant."""


class ConfigError(VL2Error):
    """A configuration that is missing, unreadable or describes something the model cannot be."""


class CheckpointError(VL2Error):
    """A checkpoint that is incomplete, does not fit its configuration or was damaged."""


class ImageError(VL2Error):
    """A picture that cannot be read, is empty, is too large or has a format that is not accepted."""


class ConversationError(VL2Error):
    """Messages that do not form a conversation: unknown role, `<image>` tags and pictures that do not match."""


class ContextLengthError(VL2Error):
    """A prompt that does not fit the model's context window."""


class RequestError(VL2Error):
    """A generation option outside of its range."""


class VerificationError(VL2Error):
    """A model that does not give the recorded numbers."""


class MeshError(VL2Error):
    """A mesh that does not fit the devices or the model, or processes that do not find each other."""


class OverloadedError(VL2Error):
    """So many requests wait already that one more is refused; `retry_after` seconds are likely to be enough."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(VL2Error):
    """An engine that takes nothing on any more."""
