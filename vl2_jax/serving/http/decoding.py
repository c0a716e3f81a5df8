"""Conversations with pictures to arrays, in processes of their own: a decoder that hangs, crashes or takes all memory
loses one request and nothing else.

    messages, files  --frames-->  a process: sizes from headers, then decoding, tiling  --frames-->  Encoded

Frames are JSON and bare arrays; nothing that a process of pictures sends back is executed or unpickled. Formats, pixels
and shapes are checked for all pictures of a request before the first is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

from vl2_jax.errors import ConversationError, ImageError, RequestError, VL2Error
from vl2_jax.processing.batch import Encoded, Processor
from vl2_jax.processing.images import load_image
from vl2_jax.processing.sources import content_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_ARRAYS = ("input_ids", "labels", "visual_index", "tiles", "crops")
_ERRORS: tuple[type[VL2Error], ...] = (ImageError, ConversationError, RequestError)
_SECONDS_TO_START = 120.0  # a process on a machine that is busy compiling
_YIELDS = 5  # of nice: text goes on at its pace while pictures are decoded


@dataclass(frozen=True)
class PictureLimits:
    """What is decoded for whoever sends it.

    Attributes:
      most: pictures in a request.
      pixels: of one; a model sees 1152 x 1152 of them.
      all_pixels: of all pictures of a request together.
      aspect: of the longer to the shorter side, at most.
      seconds: for all pictures of a request, from the first header to the last tile.
      memory: bytes that decoding may take beyond what its process has from its start; 40 megapixels take 0.7 GB.
    """

    most: int = 16
    pixels: int = 40_000_000
    all_pixels: int = 80_000_000
    aspect: float = 200.0
    seconds: float = 20.0
    memory: int = 2 << 30


class Decoders:
    """Processes that encode conversations, one at a time each; how many wait for them is the caller's to bound."""

    def __init__(self, processor: Processor, limits: PictureLimits, processes: int = 2):
        self._threads = ThreadPoolExecutor(processes, "decode")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._processes = [_Process(processor, limits) for _ in range(processes)]
        self._starting = [self._threads.submit(self._start, process) for process in self._processes]

    async def encode(
        self, messages: Sequence[dict[str, Any]], files: Sequence[bytes], low: Sequence[bool] = ()
    ) -> Encoded:
        """A conversation (`conversations.Asked`) whose pictures are here as files, as base64 or as `data:` addresses.

        Raises:
          ImageError, RequestError, ConversationError: see their messages.
        """
        # Where the client leaves, what has not begun is cancelled.
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._encode, messages, files, low)

    def wait_until_started(self) -> None:
        """So that no request waits for a process to start."""
        for starting in self._starting:
            starting.result()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _start(self, process: _Process) -> None:
        try:
            process.start()
        finally:
            self._idle.put(process)

    def _encode(self, messages: Sequence[dict[str, Any]], files: Sequence[bytes], low: Sequence[bool]) -> Encoded:
        process = self._idle.get()
        try:
            return process.encode(messages, files, low)
        finally:
            self._idle.put(process)


class _Process:
    """One process; where it was lost, the next request starts another."""

    def __init__(self, processor: Processor, limits: PictureLimits):
        self._processor, self._limits = processor, limits
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> Connection:
        if self._pipe is not None and self._process.is_alive():
            return self._pipe
        self.end()
        context = multiprocessing.get_context("spawn")  # a fork would take the engine's threads and memory along
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, self._processor, self._limits), daemon=True, name="decode"
        )
        self._process.start()
        theirs.close()
        try:
            if self._pipe.poll(_SECONDS_TO_START) and self._pipe.recv_bytes():
                return self._pipe
        except (OSError, EOFError):
            pass
        self.end()
        raise RuntimeError("a process that decodes pictures does not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def encode(self, messages: Sequence[dict[str, Any]], files: Sequence[bytes], low: Sequence[bool]) -> Encoded:
        pipe = self.start()
        try:
            pipe.send_bytes(json.dumps({"messages": list(messages), "low": list(low), "files": len(files)}).encode())
            for file in files:
                pipe.send_bytes(file)
            if not pipe.poll(self._limits.seconds):
                raise TimeoutError
            head = json.loads(pipe.recv_bytes())
            if "error" in head:
                raise next((kind for kind in _ERRORS if kind.__name__ == head["kind"]), ImageError)(head["error"])
            arrays = {name: _array(pipe.recv_bytes(), *head["arrays"][name]) for name in _ARRAYS}
        except TimeoutError:
            self.end()
            raise ImageError(
                f"the pictures take longer than {self._limits.seconds:g} s to decode; send smaller ones."
            ) from None
        except (OSError, EOFError):
            self.end()
            raise ImageError("the pictures cannot be decoded; save them again, as PNG or JPEG.") from None
        sizes = tuple((int(width), int(height)) for width, height in head["sizes"])
        return Encoded(**arrays, image_sizes=sizes, tokens_per_tile=head["tokens"], text="", begun=head["begun"])


def _array(data: bytes, dtype: str, shape: list[int]) -> np.ndarray:
    return np.frombuffer(data, np.dtype(dtype)).reshape(shape)


def _work(pipe: Connection, processor: Processor, limits: PictureLimits) -> None:
    """The life of a process: it ends with whoever started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which drains
    if hasattr(os, "nice"):
        os.nice(_YIELDS)
    _limit_memory(limits.memory)
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            head = json.loads(pipe.recv_bytes())
            files = [pipe.recv_bytes() for _ in range(head["files"])]
            try:
                encoded = encode(processor, limits, head["messages"], files, head["low"])
            except _ERRORS as error:
                pipe.send_bytes(json.dumps({"error": str(error), "kind": type(error).__name__}).encode())
            except MemoryError:
                told = "the pictures take more memory than this server gives them; send smaller ones."
                pipe.send_bytes(json.dumps({"error": told, "kind": "ImageError"}).encode())
            else:
                _send(pipe, encoded)


def _limit_memory(more: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there is no such limit
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def _send(pipe: Connection, encoded: Encoded) -> None:
    arrays = {name: np.ascontiguousarray(getattr(encoded, name)) for name in _ARRAYS}
    head = {
        "arrays": {name: (array.dtype.str, array.shape) for name, array in arrays.items()},
        "sizes": encoded.image_sizes,
        "tokens": encoded.tokens_per_tile,
        "begun": encoded.begun,
    }
    pipe.send_bytes(json.dumps(head).encode())
    for array in arrays.values():
        pipe.send_bytes(array.tobytes())


def encode(
    processor: Processor,
    limits: PictureLimits,
    messages: Sequence[dict[str, Any]],
    files: Sequence[bytes],
    low: Sequence[bool] = (),
) -> Encoded:
    """A conversation whose messages have numbers of `files` for images; those that are `low` are seen as one tile.

    Raises:
      ImageError: a picture that cannot be read.
      RequestError: a picture, or all of them, beyond a limit.
      ConversationError: see `Processor.encode`.
    """
    pictures = load_pictures(limits, files)
    upright = [picture.size for picture in pictures]
    for picture, is_low in zip(pictures, low):
        if is_low:
            picture.thumbnail((processor.config.tile_size,) * 2)
    filled = [message | {"images": [pictures[number] for number in message["images"]]} for message in messages]
    encoded = processor.encode(filled)
    return replace(encoded, image_sizes=tuple(upright), text="")


def load_pictures(limits: PictureLimits, files: Sequence[bytes]) -> list[Image.Image]:
    """RGB pictures, the right way up, of files, base64 or `data:` addresses, after all headers were looked at.

    Raises:
      ImageError, RequestError: see `encode`.
    """
    contents = [_content(file, number) for number, file in enumerate(files, 1)]
    sizes = [_size(content, number, limits) for number, content in enumerate(contents, 1)]
    total = sum(width * height for width, height in sizes)
    if total > limits.all_pixels:
        raise RequestError(
            f"the pictures hold {total:,} pixels together, more than the limit of {limits.all_pixels:,}; "
            "send fewer or smaller ones."
        )
    return [_told(number, "decoded", load_image, content) for number, content in enumerate(contents, 1)]


def _content(file: bytes, number: int) -> bytes:
    _, content = _told(number, "read", content_of, file)
    return content


def _size(content: bytes, number: int, limits: PictureLimits) -> tuple[int, int]:
    """Width and height, from the header."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise RequestError(
            f"picture {number} has more than the limit of {limits.pixels:,} pixels; scale it down."
        ) from None
    except Exception:  # Pillow's readers raise whatever a damaged header makes them raise
        raise ImageError(
            f"picture {number} is damaged or not one of the accepted formats: {', '.join(FORMATS)}."
        ) from None
    if width * height > limits.pixels:
        raise RequestError(
            f"picture {number} has {width} x {height} = {width * height:,} pixels, more than the limit of "
            f"{limits.pixels:,}; scale it down."
        )
    if min(width, height) < 1 or max(width, height) > limits.aspect * min(width, height):
        raise RequestError(
            f"picture {number} has {width} x {height} pixels; its sides may differ by a factor of {limits.aspect:g}."
        )
    return width, height


def _told(number: int, what: str, work: Callable[[bytes], Any], content: bytes) -> Any:
    """What `work` makes of a picture; why it cannot is told in our words: Pillow's may hold addresses of memory."""
    try:
        return work(content)
    except MemoryError:
        raise
    except Exception:
        raise ImageError(f"picture {number} cannot be {what}; send a whole file, in base64, as PNG or JPEG.") from None
