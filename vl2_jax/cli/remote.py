"""A model behind `vl2 serve`, or any server of OpenAI's API, asked as one that is loaded here."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from PIL import Image

from vl2_jax.errors import RequestError, VL2Error, one_line, shown
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.processing.messages import ESCAPED_TAG, IMAGE_TAG, TAG
from vl2_jax.progress import Report, silent

_SECONDS = 600  # of silence: as long as OpenAI's client waits
_MOST_LOSSLESS = 4 << 20  # bytes; larger pictures are sent as JPEG
_QUALITY = 95


class Server:
    """A server, as `vl2_jax.VL2` is a model.

    Args:
      address: with or without the `/v1` at its end.
      model: the name of one of its models; by default the first.
      key: by default that of the environment.

    Raises:
      RequestError: there is no such server, or it refuses the key.
    """

    def __init__(self, address: str, model: str = "", key: str | None = None):
        self._address = address.rstrip("/").removesuffix("/v1")
        if not address.lower().startswith(("http://", "https://")):  # more of it is read where it is opened
            raise RequestError(f"--server is {shown(address)}; expected an address such as http://127.0.0.1:8000.")
        self._key = os.environ.get("VL2_API_KEY", "") if key is None else key
        self.model = model or str(self._json("/v1/models")["data"][0]["id"])

    def chat(self) -> RemoteChat:
        return RemoteChat(self)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of an answer, as they come.

        Raises:
          VL2Error: what the server tells of an error, before the answer or in it.
        """
        with self._open("/v1/chat/completions", {**body, "model": self.model, "stream": True}) as answer:
            for line in answer:
                text = line.removeprefix(b"data: ").strip()
                if not line.startswith(b"data: ") or text == b"[DONE]":
                    continue
                chunk = json.loads(text)
                if chunk.get("error"):
                    raise VL2Error(str(chunk["error"].get("message")))
                yield chunk

    def _json(self, path: str) -> Any:
        with self._open(path) as answer:
            return json.load(answer)

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        try:
            request = urllib.request.Request(self._address + path, data, headers)
            return urllib.request.urlopen(request, timeout=_SECONDS)
        except HTTPError as error:
            raise VL2Error(_told(error)) from None
        except (URLError, HTTPException, OSError, ValueError) as error:
            why = error.reason if isinstance(error, URLError) else error
            told = one_line(why) if isinstance(why, BaseException) else str(why)
            raise RequestError(f"no server answers at {shown(self._address)} ({told}); start one: vl2 serve.") from None


class RemoteChat:
    """Turns of one conversation, as `vl2_jax.api.Chat` holds them; the server has the prompt in its cache."""

    def __init__(self, server: Server):
        self._server = server
        self.messages: list[dict[str, Any]] = []

    def ask(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        on_text: Callable[[int, str], None] | None = None,
        *,
        report: Report = silent,
        **options: Any,
    ) -> str:
        """The answer to one more message. A turn that fails or is interrupted leaves the conversation as it was."""
        turn = {"role": "user", "content": text, "images": [_address_of(image) for image in images]}
        body = {"messages": [_as_openai(message) for message in [*self.messages, turn]], **_fields(options)}
        report("waiting for the server", 0, 0)
        said = ""
        for chunk in self._server.stream(body):
            for choice in chunk["choices"]:
                if part := choice["delta"].get("content"):
                    said += part
                    if on_text is not None:
                        on_text(0, part)
        self.messages += [turn, {"role": "assistant", "content": said}]
        return said


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """Sampling options as fields of a request, which has other defaults."""
    wanted = SamplingOptions.of(options)
    alike = ("max_tokens", "temperature", "top_p", "top_k", "ignore_eos", "presence_penalty", "frequency_penalty")
    said = {name: getattr(wanted, name) for name in (*alike, "min_p", "min_tokens")}
    more = {"seed": wanted.seed, "stop": list(wanted.stops) or None, "repetition_penalty": wanted.penalty}
    return said | {name: value for name, value in more.items() if value is not None}


def _as_openai(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the one form, with its pictures where their tags stand."""
    images = list(message.get("images", ()))
    if not images:
        return {"role": message["role"], "content": message["content"]}
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(TAG.split(message["content"])):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": _address_of(images[number - 1])}})
            text = text.removeprefix("\n")  # which a picture's part has by itself
        if text:
            parts.append({"type": "text", "text": text.replace(ESCAPED_TAG, IMAGE_TAG)})
    return {"role": message["role"], "content": parts}


def _address_of(image: Any) -> str:
    """A picture as a `data:` address: PNG, or JPEG where that would be large."""
    if isinstance(image, str):
        return image
    for kind, options in (("PNG", {"compress_level": 1}), ("JPEG", {"quality": _QUALITY})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        if kind == "JPEG" or file.tell() <= _MOST_LOSSLESS:
            break
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _told(error: HTTPError) -> str:
    """What the body of an error says."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"the server answers with {error.code} {error.reason}."
