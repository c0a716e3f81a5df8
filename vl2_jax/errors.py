"""What can go wrong for a user, one type per cause.

Every message names the offending value, what was expected and what to do next. All of them are `ValueError`s
so that a program which does not care about the difference can catch one thing.
"""


class VL2Error(ValueError):
    """The base of everything this package raises on purpose."""


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
