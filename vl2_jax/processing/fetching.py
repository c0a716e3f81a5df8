"""Pictures at http and https addresses, for callers who asked for it: in limited time, of limited size."""

from __future__ import annotations

import queue
import threading
import time
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit

from vl2_jax.errors import ImageError, one_line, shown

SECONDS = 30.0  # for all of it
MOST_BYTES = 64 << 20
_PIECE = 1 << 16


def fetch(address: str, seconds: float = SECONDS, most_bytes: int = MOST_BYTES) -> bytes:
    """What is at an address. It may lead to another one, but only of http or https, and not from https to http.

    Raises:
      ImageError: it cannot be had, takes longer than `seconds`, or holds more than `most_bytes`.
    """
    outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put(_download(address, time.monotonic() + seconds, most_bytes))
        except Exception as error:  # handed over to the caller, below
            outcome.put(error)

    # A thread, since names are looked up and headers are read without any limit of their own.
    threading.Thread(target=work, daemon=True, name="fetch a picture").start()
    try:
        found = outcome.get(timeout=seconds)
    except queue.Empty:
        found = TimeoutError()
    if isinstance(found, bytes):
        return found
    if isinstance(found, ImageError):
        raise found
    reason = found.reason if isinstance(found, URLError) and not isinstance(found, HTTPError) else found
    if isinstance(reason, TimeoutError):
        raise ImageError(f"{shown(address)} takes longer than {seconds:g} s; download it and give its path.")
    if isinstance(found, URLError | HTTPException | OSError | ValueError):
        told = one_line(reason) if isinstance(reason, BaseException) else str(reason)
        raise ImageError(f"{shown(address)} cannot be fetched ({told}).")
    raise found


class _SameKind(urllib.request.HTTPRedirectHandler):
    """Follows to http and https only; what was asked for over https stays there."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        leads_to = urljoin(req.full_url, headers.get("Location", ""))
        before, after = urlsplit(req.full_url).scheme, urlsplit(leads_to).scheme
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise ImageError(f"{shown(req.full_url)} leads to {shown(leads_to)}, which is not followed.")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _download(address: str, deadline: float, most_bytes: int) -> bytes:
    opener = urllib.request.OpenerDirector()  # without the handlers of file, ftp and data addresses
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _SameKind(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(
        quote(address, safe="%/:=&?~#+!$,;'@()*[]"), headers={"User-Agent": "vl2-jax", "Accept": "image/*"}
    )
    too_large = ImageError(f"{shown(address)} holds more than {most_bytes:,} bytes; download it and give its path.")
    with opener.open(request, timeout=max(0.1, deadline - time.monotonic())) as answer:
        if int(answer.headers.get("Content-Length") or 0) > most_bytes:
            raise too_large
        data = bytearray()
        while piece := answer.read1(_PIECE):
            data += piece
            if len(data) > most_bytes:
                raise too_large
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(data)
