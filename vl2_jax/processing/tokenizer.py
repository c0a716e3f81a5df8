"""A thin wrapper over the `tokenizers` library: special ids, plain-text encoding, streaming decoding (SPEC 4.8)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream

from vl2_jax.errors import CheckpointError, ConversationError, shown
from vl2_jax.files import path_of, why_not_whole

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
GROUNDING_TAGS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
_GROUNDING_TAG = re.compile("(" + "|".join(map(re.escape, GROUNDING_TAGS)) + ")")

# The letters that byte-level vocabularies write bytes with: printable ones as themselves, the others from 256 on.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


class Tokenizer:
    """Text to ids and back.

    Two encoders share one vocabulary. `encode` turns role and control tokens that stand in the text into ordinary
    text, and keeps the meaning of the grounding tags; `encode_as_released` recognises every special token wherever
    it stands, as the released code does.
    """

    def __init__(self, tokenizer: HfTokenizer, bos: str, eos: str, pad: str, image: str):
        # The released processor adds what is missing, in this order, which decides the ids (SPEC 4.8).
        for group in ([pad], [image], list(GROUNDING_TAGS), [USER, ASSISTANT]):
            missing = [token for token in group if tokenizer.token_to_id(token) is None]
            tokenizer.add_special_tokens(missing)
        self._tokenizer = tokenizer
        self._plain = HfTokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        self.bos_id, self.eos_id, self.pad_id, self.image_id = (self.id_of(t) for t in (bos, eos, pad, image))
        self._added_ids = frozenset(tokenizer.get_added_tokens_decoder())
        self.control_ids = frozenset(
            id_
            for id_, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content not in GROUNDING_TAGS
        )

    @classmethod
    def from_directory(cls, directory: str | Path, pad: str, image: str) -> Tokenizer:
        """From `tokenizer.json` and `tokenizer_config.json`.

        Raises:
          CheckpointError: a file is missing or not a tokenizer.
        """
        directory = path_of(directory)
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(
                why_not_whole(path)
                or f"{path} does not exist; download the tokenizer files of the model into the same directory."
            )
        try:
            tokenizer = HfTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            reason = why_not_whole(path) or f"{path} is not a tokenizer file ({error}); download it again."
            raise CheckpointError(reason) from None
        names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
        config_path = directory / TOKENIZER_CONFIG_FILE
        if config_path.is_file():
            try:
                config = json.loads(config_path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{config_path} is not valid JSON ({error}); download it again.") from None
            names |= {key: _content(config[key]) for key in names if config.get(key)}
        return cls(tokenizer, names["bos_token"], names["eos_token"], pad, image)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int:
        id_ = self._tokenizer.token_to_id(token)
        if id_ is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}; it is not a DeepSeek-VL2 tokenizer.")
        return id_

    def encode(self, text: str) -> list[int]:
        """Ids of user-written text: grounding tags keep their meaning, any other special token is plain text.

        Raises:
          ConversationError: it is no text. What is not Unicode in it is encoded as U+FFFD.
        """
        ids: list[int] = []
        for i, part in enumerate(_GROUNDING_TAG.split(as_unicode(text))):
            if i % 2:
                ids.append(self.id_of(part))
            elif part:
                ids += self._plain.encode(part, add_special_tokens=False).ids
        return ids

    def encode_as_released(self, text: str) -> list[int]:
        return self._tokenizer.encode(as_unicode(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_answer(self, ids: Iterable[int]) -> str:
        """Text of generated ids: grounding tags are kept, control tokens are not text."""
        return self.decode(i for i in ids if int(i) not in self.control_ids)

    def bytes_of(self, id_: int) -> bytes:
        """What an id adds to the UTF-8 of a text, which may be a part of a character; of an added token, its name."""
        token = self._tokenizer.id_to_token(id_) or ""
        if id_ in self._added_ids or not _BYTES.keys() >= set(token):
            return token.encode()
        return bytes(_BYTES[letter] for letter in token)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that a token can stand for at most: a text of n bytes has at least n / `longest_token` tokens."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def to_json(self) -> str:
        """The whole tokenizer as `tokenizer.json` holds it, with what was missing."""
        return self._tokenizer.to_str()

    def stream(self) -> AnswerStream:
        return AnswerStream(self)


class AnswerStream:
    """Ids one at a time to text as it becomes complete, never half of a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._sent = ""

    def push(self, id_: int) -> str:
        """The text that `id_` completed, possibly empty."""
        if id_ in self._tokenizer.control_ids:
            return ""
        self._ids.append(id_)
        text = self._stream.step(self._tokenizer._tokenizer, id_) or ""
        self._sent += text
        return text

    def finish(self) -> str:
        """What is left at the end: bytes that never became a character, as replacement characters."""
        return self._tokenizer.decode(self._ids)[len(self._sent) :]


def as_unicode(text: str) -> str:
    """Text that can be written as UTF-8: pairs of surrogates are joined, one that stands alone is U+FFFD.

    Raises:
      ConversationError: it is no text.
    """
    if not isinstance(text, str):
        raise ConversationError(f"only text can be encoded, got {type(text).__name__} {shown(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token
