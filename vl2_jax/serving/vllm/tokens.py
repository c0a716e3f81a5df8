"""Our tokenizer in the form of vLLM's: whatever a text holds stays text, and answers keep their grounding tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from vl2_jax.processing.batch import Processor
from vl2_jax.processing.tokenizer import GROUNDING_TAGS, Tokenizer
from vl2_jax.serving.vllm.theirs import TokenizersBackend


class VL2Tokenizer(TokenizersBackend):
    """Encodes as `Tokenizer.encode` does and decodes as `transformers` does, for vLLM's fast detokenizer."""

    def __init__(self, own: Tokenizer, **options: Any):
        super().__init__(tokenizer_object=_with_plain_tags(own), **options)
        self.own = own

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *arguments: Any, **options: Any) -> VL2Tokenizer:
        del arguments, options
        own = Processor.from_directory(path_or_repo_id).tokenizer
        names = {"bos_token": own.bos_id, "eos_token": own.eos_id, "pad_token": own.pad_id}
        return cls(own, **{name: own.decode([id_]) for name, id_ in names.items()})

    def encode(self, text: str, *arguments: Any, **options: Any) -> list[int]:
        del arguments
        return self(text, **options)["input_ids"]

    def __call__(self, text: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        del arguments
        if not isinstance(text, str):
            each = [self(one, **options) for one in text]
            return {key: [one[key] for one in each] for key in ("input_ids", "attention_mask")}
        ids = self.own.encode(text)
        if options.get("add_special_tokens", True):
            ids = [self.own.bos_id, *ids]
        if options.get("truncation") and options.get("max_length") is not None:
            ids = ids[: options["max_length"]]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    @property
    def max_token_id(self) -> int:
        return len(self.own) - 1

    @property
    def max_chars_per_token(self) -> int:
        return self.own.longest_token


def _with_plain_tags(own: Tokenizer) -> HfTokenizer:
    """The vocabulary with grounding tags as ordinary added tokens: what is special is left out of answers."""
    data = json.loads(own.to_json())
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in GROUNDING_TAGS
    return HfTokenizer.from_str(json.dumps(data))
