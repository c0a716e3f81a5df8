"""Fixtures of the server's tests that those of the page share."""

from ..serving.conftest import make_server, processor

__all__ = ["make_server", "processor"]
