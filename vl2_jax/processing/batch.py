"""Conversations to a `Batch` of arrays, the only thing the device sees (SPEC 4.4 to 4.7).

B batch, T positions, I tiles, S pixels along a tile's side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from vl2_jax.config import ProcessorConfig, VL2Config, read_config, read_processor_config
from vl2_jax.errors import ConversationError, shown
from vl2_jax.processing.conversation import (
    Conversation,
    Piece,
    pieces_of_conversation,
    pieces_of_text,
    render,
)
from vl2_jax.processing.images import MAX_PIXELS, Picture, load_image
from vl2_jax.processing.messages import checked_text, pictures_of, read_messages
from vl2_jax.processing.tiling import (
    FIRST_TOKEN_ROW,
    after_tiles,
    cut_tiles,
    normalise,
    released_tiles,
    select_best_resolution,
    visual_rows,
)
from vl2_jax.processing.tokenizer import Tokenizer

IGNORED = -100  # the label of a position that is not a target
TEXT = -1  # the visual row of a position that is text
MAX_TILED_IMAGES = 2  # more pictures than this in a conversation, and none is cut into tiles (SPEC 4.2)


@dataclass(frozen=True)
class Encoded:
    """One conversation: what its positions hold, and the tiles they look at."""

    input_ids: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T], IGNORED where there is no target
    visual_index: np.ndarray  # int32 [T], row of the visual table, TEXT for text
    tiles: np.ndarray  # uint8 [I, S, S, 3], each distinct tile once
    crops: np.ndarray  # int32 [images, 2], local tiles (across, down)
    image_sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels, as loaded
    tokens_per_tile: int
    text: str  # readable form
    branches: np.ndarray | None = None  # int32 [T], of questions apart (`training.packing`); None is all 0
    begun: str = ""  # what of the answer the conversation gives

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def picture_tokens(self) -> int:
        """Positions that show a picture."""
        return int((self.visual_index != TEXT).sum())

    def fingerprints(self) -> np.ndarray:
        """uint64 `[T]`: equal for two positions exactly if they feed the same thing to the model."""
        tile_hashes = np.array(
            [xxhash.xxh3_64_intdigest(np.ascontiguousarray(tile).data) for tile in self.tiles], np.uint64
        )
        visual = self.visual_index >= FIRST_TOKEN_ROW
        tile, token = np.divmod(self.visual_index[visual] - FIRST_TOKEN_ROW, self.tokens_per_tile)
        prints = self.input_ids.astype(np.uint64) + (self.visual_index.astype(np.int64) + 1).astype(np.uint64) * 2**32
        prints[visual] = tile_hashes[tile] + token.astype(np.uint64)
        return prints


@dataclass(frozen=True)
class Batch:
    """Conversations side by side. Padding positions hold `pad_id`, label IGNORED, visual row TEXT, mask False."""

    input_ids: np.ndarray  # int32 [B, T]
    labels: np.ndarray  # int32 [B, T]
    attention_mask: np.ndarray  # bool [B, T]
    visual_index: np.ndarray  # int32 [B, T], row of the batch's visual table
    tiles: np.ndarray  # uint8 [I, S, S, 3]
    crops: np.ndarray  # int32 [B, images, 2], zero where there is no picture

    @property
    def lengths(self) -> np.ndarray:
        return self.attention_mask.sum(axis=1)

    @property
    def images_mask(self) -> np.ndarray:
        """bool `[B, T]`: positions that show a picture."""
        return self.visual_index >= 0

    def padded_to(self, length: int, tiles: int, pad_id: int) -> Batch:
        """The same batch with room for `length` positions (added on the right) and `tiles` tiles."""
        right = ((0, 0), (0, length - self.input_ids.shape[1]))
        more_tiles = ((0, tiles - len(self.tiles)), (0, 0), (0, 0), (0, 0))
        return dataclasses.replace(
            self,
            input_ids=np.pad(self.input_ids, right, constant_values=pad_id),
            labels=np.pad(self.labels, right, constant_values=IGNORED),
            attention_mask=np.pad(self.attention_mask, right),
            visual_index=np.pad(self.visual_index, right, constant_values=TEXT),
            tiles=np.pad(self.tiles, more_tiles),
        )


@dataclass(frozen=True)
class Processor:
    """Messages and pictures to arrays. Host side: NumPy, Pillow and `tokenizers`, no jax.

    Attributes:
      as_released: reproduce the released processor's bytes: no camera orientation, transparency dropped onto
        whatever colour lies beneath, special tokens recognised inside of user text.
      max_pixels: the largest picture that will be decoded.
    """

    config: ProcessorConfig
    tokenizer: Tokenizer
    global_view_first: bool = True
    as_released: bool = False
    max_pixels: int = MAX_PIXELS

    @classmethod
    def from_directory(cls, directory: str | Path, model_config: VL2Config | None = None) -> Processor:
        """From the `processor_config.json` and tokenizer files of a model directory."""
        config = read_processor_config(directory)
        model_config = model_config or read_config(directory)
        tokenizer = Tokenizer.from_directory(directory, config.pad_token, config.image_token)
        return cls(config, tokenizer, global_view_first=model_config.global_view_pos == "head")

    def replace(self, **changes) -> Processor:
        return dataclasses.replace(self, **changes)

    def __call__(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        padding: str = "left",
        inference: bool = True,
    ) -> Batch:
        """One conversation, or a list of them, as a batch.

        Args:
          conversations: messages `{"role", "content", "images"}` (`processing.messages`), or a list of such lists.
          padding: the side on which shorter conversations are filled up.
          inference: leave the last answer open for the model to continue; False closes it (training).
        """
        return self.collate(
            [self.encode(c, inference=inference) for c in as_conversations(conversations)], padding=padding
        )

    def encode(self, conversation: Conversation, *, inference: bool = True) -> Encoded:
        """One conversation. With `inference` it ends inside of the last answer: empty, or a prefix to be continued.

        Raises:
          ConversationError: see `read_messages` and `pieces_of_conversation`; or the last message is not an answer.
          ImageError: see `load_image`.
        """
        messages = read_messages(conversation)
        pieces = self._open_pieces(messages) if inference else self._pieces(messages)
        images = [image for message in messages for image in message["images"]]
        encoded = self._assemble(pieces, images, render(messages), mask_prompt=self.config.mask_prompt)
        return dataclasses.replace(encoded, begun=messages[-1]["content"].strip()) if inference else encoded

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Ids as of `encode`, but one `image_id` for each picture, whatever it shows: its positions come later.

        Raises:
          ConversationError: see `encode`.
        """
        ids: list[int] = []
        for piece in self._open_pieces(read_messages(conversation)):
            ids += [self.tokenizer.image_id] if piece.kind == "image" else self._ids_of(piece)
        return ids

    def cut(self, picture: Image.Image, is_tiled: bool) -> tuple[tuple[int, int], np.ndarray]:
        """Local tiles (across, down) of a picture that is loaded, and uint8 `[tiles, S, S, 3]`, its global view first.

        Args:
          is_tiled: False is of a conversation with more than `MAX_TILED_IMAGES` pictures.
        """
        size, candidates = self.config.tile_size, self.config.candidate_resolutions
        best = select_best_resolution(picture.size, candidates if is_tiled else candidates[:1])
        return (best[0] // size, best[1] // size), cut_tiles(picture, best, size)

    def encode_apart(self, conversations: Sequence[Conversation]) -> Encoded:
        """Closed conversations that begin with the same pictures as one document, for `training.packing.pack`.

        What comes before and with the pictures stands once, as branch 0; what follows, as branches of their own.
        Where prompts are targets too, what is shared counts once, and the first token of a question not at all.

        Raises:
          ConversationError: see `encode`; or the conversations do not begin alike.
          ImageError: see `load_image`.
        """
        pieces = [self._pieces(read_messages(conversation)) for conversation in conversations]
        after = 1 + max((place for place, piece in enumerate(pieces[0]) if piece.kind == "image"), default=-1)
        if any(p[:after] != pieces[0][:after] for p in pieces):
            raise ConversationError("conversations apart must be alike until after their last picture.")
        first = self.encode(conversations[0], inference=False)
        visual = np.flatnonzero(first.visual_index != TEXT)
        shared = int(visual[-1]) + 1 if len(visual) else 0
        rest = [self._assemble(p[after:], (), "", mask_prompt=self.config.mask_prompt) for p in pieces[1:]]
        lengths = [shared, len(first) - shared, *map(len, rest)]
        return dataclasses.replace(
            first,
            input_ids=np.concatenate([part.input_ids for part in (first, *rest)]),
            labels=np.concatenate([part.labels for part in (first, *rest)]),
            visual_index=np.concatenate([part.visual_index for part in (first, *rest)]),
            branches=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        )

    def encode_text(self, text: str, images: Picture | Sequence[Picture] = (), *, inference: bool = True) -> Encoded:
        """A bare text with `<image>` tags and no roles; every text position is a target.

        Raises:
          ConversationError: what is no text, or a number of tags that differs from the number of pictures.
          ImageError: see `load_image`.
        """
        text, pictures = checked_text(text, "a prompt must be text"), pictures_of(images)
        pieces = pieces_of_text(text, len(pictures), "bos", "eos", self.as_released)
        return self._assemble(pieces[: -1 if inference else None], pictures, text, mask_prompt=False)

    def collate(self, encoded: Sequence[Encoded], *, padding: str = "left") -> Batch:
        """Conversations of any lengths as one batch; visual rows are renumbered for the batch's tiles."""
        if padding not in ("left", "right"):
            raise ConversationError(f"padding is {padding!r}; expected 'left' or 'right'.")
        length = max(map(len, encoded))
        images = max(1, max(len(e.crops) for e in encoded))

        def pad(row: np.ndarray, fill: int) -> np.ndarray:
            missing = length - len(row)
            return np.pad(row, (missing, 0) if padding == "left" else (0, missing), constant_values=fill)

        return Batch(
            input_ids=np.stack([pad(e.input_ids, self.tokenizer.pad_id) for e in encoded]),
            labels=np.stack([pad(e.labels, IGNORED) for e in encoded]),
            attention_mask=np.stack([pad(np.ones(len(e), bool), 0) for e in encoded]),
            visual_index=np.stack([pad(row, TEXT) for row in renumbered_rows(encoded)]),
            tiles=np.concatenate([e.tiles for e in encoded]),
            crops=np.stack([np.pad(e.crops, ((0, images - len(e.crops)), (0, 0))) for e in encoded]),
        )

    def released_pixels(self, batch: Batch) -> np.ndarray:
        """float32 `[B, tiles, 3, S, S]`, the tensor `images` of the released processor, zero padded (SPEC 4.7)."""
        tiles = self.normalise(batch.tiles[released_tiles(batch.crops)]).transpose(0, 3, 1, 2)
        counts = [len(released_tiles(crops)) for crops in batch.crops]
        pixels = np.zeros((len(counts), max(1, *counts), *tiles.shape[1:]), np.float32)
        for row, last, count in zip(pixels, np.cumsum(counts), counts):
            row[:count] = tiles[last - count : last]
        return pixels

    def normalise(self, tiles: np.ndarray) -> np.ndarray:
        mean, std = (self.config.image_mean, self.config.image_std) if self.config.normalize else ((0.0,), (1.0,))
        return normalise(tiles, mean, std)

    def _pieces(self, messages: Conversation) -> list[Piece]:
        return pieces_of_conversation(messages, "bos", "eos", self.as_released)

    def _open_pieces(self, messages: Conversation) -> list[Piece]:
        """Pieces up to where the model goes on, inside of the last answer."""
        pieces = self._pieces(messages)
        if messages[-1]["role"] != "assistant":
            raise ConversationError(
                "the last message must be the assistant's, with empty content (or the beginning of the answer), "
                f"got role {messages[-1]['role']!r}."
            )
        return pieces[:-1]

    def _assemble(self, pieces: list[Piece], images: Sequence[Picture], text: str, mask_prompt: bool) -> Encoded:
        pictures = [load_image(i, max_pixels=self.max_pixels, as_released=self.as_released) for i in images]
        tile_size = self.config.tile_size
        ids: list[int] = []
        labels: list[int] = []
        rows: list[int] = []
        tiles: list[np.ndarray] = []
        crops: list[tuple[int, int]] = []
        for piece in pieces:
            if piece.kind == "image":
                crop, new_tiles = self.cut(pictures[len(crops)], len(pictures) <= MAX_TILED_IMAGES)
                new_rows = visual_rows(crop, sum(map(len, tiles)), self.config.token_grid, self.global_view_first)
                tiles.append(new_tiles)
                crops.append(crop)
                new_ids = [self.tokenizer.image_id] * len(new_rows)
                rows += new_rows.tolist()
                labels += [IGNORED] * len(new_ids)
            else:
                new_ids = self._ids_of(piece)
                rows += [TEXT] * len(new_ids)
                is_target = piece.is_learned and (piece.is_answer or not mask_prompt)
                labels += new_ids if is_target else [IGNORED] * len(new_ids)
            ids += new_ids
        return Encoded(
            input_ids=np.asarray(ids, np.int32),
            labels=np.asarray(labels, np.int32),
            visual_index=np.asarray(rows, np.int32),
            tiles=np.concatenate(tiles) if tiles else np.zeros((0, tile_size, tile_size, 3), np.uint8),
            crops=np.asarray(crops, np.int32).reshape(-1, 2),
            image_sizes=tuple(picture.size for picture in pictures),
            tokens_per_tile=self.config.token_grid**2,
            text=text,
        )

    def _ids_of(self, piece: Piece) -> list[int]:
        """Ids of a text or a token."""
        if piece.kind == "token":
            return [self._token_id(piece.value)]
        encode = self.tokenizer.encode_as_released if self.as_released else self.tokenizer.encode
        return encode(piece.value)

    def _token_id(self, name: str) -> int:
        if name == "bos":
            return self.tokenizer.bos_id
        return self.tokenizer.eos_id if name == "eos" else self.tokenizer.id_of(name)


def renumbered_rows(encoded: Sequence[Encoded]) -> list[np.ndarray]:
    """`visual_index` of every conversation for the visual table of all their tiles, one conversation after another."""
    tokens = np.cumsum([0] + [len(e.tiles) * e.tokens_per_tile for e in encoded])
    return [after_tiles(e.visual_index, before).astype(np.int32) for e, before in zip(encoded, tokens)]


def as_conversations(conversations: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """A list of conversations, from one or several."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise ConversationError(
            f"expected a conversation (a list of messages) or a list of them, got {shown(conversations)}."
        )
    is_one = not isinstance(conversations[0], Sequence)
    return [conversations] if is_one else list(conversations)  # type: ignore[list-item, arg-type]
