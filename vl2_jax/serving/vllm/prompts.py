"""Messages of OpenAI's API to prompts exactly as released, in vLLM's front end.

The rules are those of our own server: `<image>` and control tokens that a user typed stay text, pictures are read by
its decoder within its limits of pixels and shape, and addresses are fetched from the hosts of
`--allowed-media-domains` alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vl2_jax.errors import RequestError
from vl2_jax.processing.batch import Processor
from vl2_jax.serving.http.conversations import Asked, read_conversation
from vl2_jax.serving.http.decoding import PictureLimits, load_pictures
from vl2_jax.serving.http.fetching import Fetcher
from vl2_jax.serving.http.problems import Problem
from vl2_jax.serving.vllm.theirs import BaseRenderer

_LIMITS = PictureLimits()


class VL2Renderer(BaseRenderer):
    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        self._processor = Processor.from_directory(self.model_config.model)
        self._fetcher = Fetcher(frozenset(self.model_config.allowed_media_domains or ()))

    def render_messages(self, messages: Sequence[Any], params: Any) -> tuple[list[Any], dict[str, Any]]:
        asked = self._asked(messages, params)
        with ThreadPoolExecutor(1) as own_loop:
            fetcher = replace(self._fetcher)  # one is of one event loop
            files = own_loop.submit(asyncio.run, _files(asked, fetcher)).result()
        return self._rendered(asked, files)

    async def render_messages_async(self, messages: Sequence[Any], params: Any) -> tuple[list[Any], dict[str, Any]]:
        asked = self._asked(messages, params)
        files = await _files(asked, self._fetcher)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._rendered, asked, files)

    def _asked(self, messages: Sequence[Any], params: Any) -> Asked:
        if (params.chat_template_kwargs or {}).get("tools"):
            raise RequestError("tools are given, which the model cannot use; leave them out.")
        most = self.model_config.multimodal_config.get_limit_per_prompt("image")
        try:
            return read_conversation([dict(message) for message in messages], most)
        except Problem as problem:  # which vLLM does not know: of a ValueError it makes status 400
            raise RequestError(problem.message) from None

    def _rendered(self, asked: Asked, files: Sequence[bytes]) -> tuple[list[Any], dict[str, Any]]:
        pictures = load_pictures(_LIMITS, files)
        filled = [
            message | {"images": [pictures[number] for number in message["images"]]} for message in asked.messages
        ]
        prompt: dict[str, Any] = {"prompt_token_ids": self._processor.prompt_ids(filled)}
        if pictures:
            prompt["multi_modal_data"] = {"image": pictures}
        return asked.messages, prompt


async def _files(asked: Asked, fetcher: Fetcher) -> list[bytes]:
    try:
        return await fetcher.files(asked.pictures)
    except Problem as problem:
        raise RequestError(problem.message) from None
