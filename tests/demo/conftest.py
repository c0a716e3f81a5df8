"""Fixtures of the server's tests that those of the page share."""

from ..serving.conftest import processor

__all__ = ["processor"]
