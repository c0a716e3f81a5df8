"""Prompts to answers: vision in chunks, prefill in chunks, a jitted decode loop (SPEC 6).

    tiles   --[tile chunk]-->  tokens of tiles
    prompt  --[chunk] [chunk] [chunk]-->  cache, last hidden row        one compilation, any prompt length
    token   --while_loop-->  token --> ...                              a few steps a call, cache updated in place

Every sequence starts at slot 0 of its cache row, and position s stands in slot s. Shorter prompts of a batch are
filled up on the right; those rows lie after every position that a query may see, and decoding overwrites them before
it reaches them. So a batch gives each of its rows what that row gives alone.

B batch, C positions of a chunk, S cache slots, I tiles, D model width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.errors import ContextLengthError, RequestError
from vl2_jax.inference.sampling import Sampler, SamplingOptions, choose
from vl2_jax.model.decoder import Cache, init_cache
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.batch import TEXT, Encoded, renumbered_rows
from vl2_jax.processing.grounding import Box, parse_boxes
from vl2_jax.processing.tokenizer import AnswerStream, Tokenizer
from vl2_jax.progress import Report, silent

_SHORTEST_CHUNK = 64
_SMALLEST_CACHE = 256
_STEPS_A_CALL = 16
_SECONDS_A_CALL = 0.1  # text should appear at least this often, so slow models decode fewer steps a call


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
      text: without control tokens; grounding tags are kept.
      token_ids: as generated, the end-of-sentence id included.
      logprobs: log-probability of each id under the model's own distribution.
      boxes: what the text points at, in pixels of the conversation's last picture.
      finish_reason: "stop" (end of sentence or a stop string) or "length".
      prompt_tokens: length of the prompt.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    boxes: list[Box]
    finish_reason: str
    prompt_tokens: int


@dataclass
class Timings:
    """Seconds spent, and what they were spent on."""

    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tiles: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0


@dataclass
class Memory:
    """What a cache holds after an answer, so that the next turn of the conversation computes only what is new."""

    cache: Cache
    fingerprints: np.ndarray  # uint64 [positions], of the one sequence in the cache


class DecodeState(NamedTuple):
    """The decode loop's carry."""

    cache: Cache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    step: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]


@dataclass
class Generator:
    """Answers for one model. Compiled programs are kept for the shapes that were met, rounded up to few."""

    model: VL2Model
    params: Params
    tokenizer: Tokenizer
    chunk_size: int = 512
    tile_chunk: int = 4
    report: Report = silent
    timings: Timings = field(default_factory=Timings)
    _cache: Cache | None = None

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise RequestError(f"chunk_size is {self.chunk_size}; expected at least 1.")

    def generate(
        self,
        prompts: Sequence[Encoded],
        options: SamplingOptions,
        on_text: Callable[[int, str], None] | None = None,
        memory: Memory | None = None,
    ) -> tuple[list[Answer], Memory]:
        """Answers of all prompts, in one batch.

        Args:
          prompts: encoded conversations that end where the answer begins.
          on_text: called with (row, text) as soon as text is complete.
          memory: what an earlier call returned; the prefix it shares with the prompt is not computed again. Only for
            a single prompt. Its cache is used up.

        Raises:
          ContextLengthError: a prompt leaves no room for an answer.
        """
        with self.model.layout.on_devices():
            return self._generate(prompts, options, on_text, memory)

    def _generate(
        self,
        prompts: Sequence[Encoded],
        options: SamplingOptions,
        on_text: Callable[[int, str], None] | None,
        memory: Memory | None,
    ) -> tuple[list[Answer], Memory]:
        limits = [self._room_for(prompt, options.max_tokens) for prompt in prompts]
        writers = [_AnswerWriter(self.tokenizer, options, limit) for limit in limits]
        self.timings = Timings(tiles=sum(len(p.tiles) for p in prompts), prompt_tokens=sum(map(len, prompts)))
        for tokens in self._run(prompts, options, limits, writers, memory):
            for row, (writer, new) in enumerate(zip(writers, tokens)):
                text = "".join(writer.push(id_, logprob) for id_, logprob in new)
                if writer.finished:
                    text += writer.close()
                if text and on_text is not None:
                    on_text(row, text)
        self.timings.new_tokens = sum(len(writer.ids) for writer in writers)
        assert self._cache is not None
        answers = []
        for prompt, writer in zip(prompts, writers):
            boxes = parse_boxes(writer.text, *prompt.image_sizes[-1]) if prompt.image_sizes else []
            reason = writer.finish_reason
            answers.append(Answer(writer.text, writer.ids, writer.logprobs, boxes, reason, len(prompt)))
        fed = writers[0].ids[:-1]  # the last token was never fed back
        prints = np.concatenate([prompts[0].fingerprints(), np.asarray(fed, np.uint64)])
        return answers, Memory(self._cache, prints)

    def encode_tiles(self, tiles: np.ndarray) -> Float[Array | np.ndarray, "I M D"]:
        """Tokens of all tiles, at most `tile_chunk` at a time; a bucket of chunks, the last of them empty."""
        if not len(tiles):
            return np.zeros((0, self.model.config.tokens_per_tile, self._width), self.model.dtype)
        devices = self.model.layout.devices
        chunks = -(-len(tiles) // (self.tile_chunk * devices))
        chunk = -(-len(tiles) // (chunks * devices)) * devices  # 5 tiles are 2 x 3, not 2 x 4; each device has as many
        padded = np.pad(tiles, ((0, chunks * chunk - len(tiles)), (0, 0), (0, 0), (0, 0)))
        parts: list[Array] = []
        for i in range(chunks):
            self._tell("looking at pictures", i, chunks, parts[-1:])
            parts.append(_encode_tiles(self.model, self.params, padded[i * chunk : (i + 1) * chunk]))
        room = bucket(chunks, 1) - chunks
        return jnp.concatenate([*parts, *[jnp.zeros_like(parts[0])] * room])

    def prefill(
        self, prompts: Sequence[Encoded], capacity: int, memory: Memory | None = None
    ) -> tuple[Float[Array, "B D"], Cache]:
        """The hidden row of every prompt's last position, and the cache of all before it and itself."""
        start = 0
        longest = max(map(len, prompts))
        if memory is not None and len(prompts) == 1:
            start = _shared_prefix(memory.fingerprints, prompts[0].fingerprints())
        # As few chunks as allowed, all of one size, little longer than needed: 1087 positions in 3 x 384, not 3 x 512.
        chunks = -(-(longest - start) // self.chunk_size)
        chunk = min(self.chunk_size, chunk_length(-(-(longest - start) // chunks)))
        capacity = bucket(max(capacity, start + chunks * chunk), _SMALLEST_CACHE)
        cache = self._room_in(memory if start else None, len(prompts), capacity)
        self.timings.reused_tokens = start

        begun = time.perf_counter()
        shows_pictures = any((p.visual_index[start:] != TEXT).any() for p in prompts)
        tiles = np.concatenate([p.tiles for p in prompts])
        table = self.encode_tiles(tiles if shows_pictures else tiles[:0])
        jax.block_until_ready(table)
        self.timings.vision_seconds = time.perf_counter() - begun

        begun = time.perf_counter()
        ids = np.full((len(prompts), start + chunks * chunk), self.tokenizer.pad_id, np.int32)
        index = np.full_like(ids, TEXT)
        for row, (prompt, visual_rows) in enumerate(zip(prompts, renumbered_rows(prompts))):
            ids[row, : len(prompt)] = prompt.input_ids
            index[row, : len(prompt)] = visual_rows
        last = np.asarray([len(p) - 1 for p in prompts], np.int32)
        hidden: Any = np.zeros((len(prompts), self._width), self.model.dtype)
        for i in range(chunks):
            begin = start + i * chunk
            self._tell("reading the prompt", i, chunks, hidden)
            part = slice(begin, begin + chunk)
            x = _embed(self.model, self.params, ids[:, part], index[:, part], table)
            hidden, cache = prefill_chunk(self.model, self.params, x, cache, hidden, np.int32(begin), last)
        jax.block_until_ready(hidden)
        self.timings.prefill_seconds = time.perf_counter() - begun
        return hidden, cache

    def _run(
        self,
        prompts: Sequence[Encoded],
        options: SamplingOptions,
        limits: list[int],
        writers: list[_AnswerWriter],
        memory: Memory | None,
    ) -> Iterator[list[list[tuple[int, float]]]]:
        """New (id, log-probability) pairs of every row, a few at a time, until all writers are finished."""
        vocabulary = self.model.config.language_config.vocab_size
        lengths = np.asarray([len(p) for p in prompts], np.int32)
        capacity = bucket(max(len(p) + limit for p, limit in zip(prompts, limits)), _SMALLEST_CACHE)
        hidden, cache = self.prefill(prompts, capacity, memory)
        seen = np.zeros((len(prompts), vocabulary), bool)
        for row, prompt in zip(seen, prompts):
            row[prompt.input_ids] = True
        sampler, greedy = Sampler.of(options, vocabulary), options.temperature == 0
        eos = np.int32(-1 if options.ignore_eos else self.tokenizer.eos_id)
        begun = time.perf_counter()
        state, token, logprob = _first_token(
            self.model, self.params, hidden, cache, lengths, seen, sampler, eos, greedy
        )
        # Compiled before the first text appears, so that text does not stop after its first word.
        self._tell("compiling the decoder", 0, 0, token)
        nothing = np.zeros(len(prompts), bool), np.int32(0)
        state, *_ = decode_steps(self.model, self.params, state, *nothing, sampler, eos, greedy)
        yield [[(int(t), float(p))] for t, p in zip(token, logprob)]
        steps = 1
        while not all(writer.finished for writer in writers):
            call_begun = time.perf_counter()
            done = np.asarray([writer.finished for writer in writers])
            steps = min(steps, max(w.limit - len(w.ids) for w in writers if not w.finished))
            state, tokens, logprobs, counts = decode_steps(
                self.model, self.params, state, done, np.int32(steps), sampler, eos, greedy
            )
            tokens, logprobs, counts = jax.device_get((tokens, logprobs, counts))
            seconds = (time.perf_counter() - call_begun) / steps
            steps = int(np.clip(_SECONDS_A_CALL / seconds, 1, _STEPS_A_CALL))
            yield [
                list(zip(tokens[row, :count].tolist(), logprobs[row, :count].tolist()))
                for row, count in enumerate(counts)
            ]
        self._cache = state.cache
        self.timings.decode_seconds = time.perf_counter() - begun

    def _tell(self, phase: str, done: int, total: int, result: Any) -> None:
        """Reports progress, once the step before is really done; without a listener nothing waits."""
        if self.report is not silent:
            jax.block_until_ready(result)
            self.report(phase, done, total)

    @property
    def _width(self) -> int:
        return self.model.config.language_config.hidden_size

    def _room_for(self, prompt: Encoded, max_tokens: int) -> int:
        """Tokens that may be generated; the last of them is never fed back."""
        context = self.model.config.language_config.max_position_embeddings
        if len(prompt) > context:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens ({(prompt.visual_index >= 0).sum()} of them for pictures), the "
                f"model's context holds {context}; shorten the text, or send fewer or smaller pictures."
            )
        return min(max_tokens, context - len(prompt) + 1)

    def _room_in(self, memory: Memory | None, batch: int, capacity: int) -> Cache:
        """An empty cache, or the remembered one grown to `capacity` slots."""
        config = self.model.config.language_config
        if memory is None:
            return _empty_cache(self.model, batch, capacity)
        axis = 1 if config.use_mla else 2
        missing = capacity - memory.cache[0][0].shape[axis]
        if missing <= 0:
            return memory.cache

        def grow(old: Array) -> Array:
            return jnp.pad(old, [(0, missing if a == axis else 0) for a in range(old.ndim)])

        return jax.tree.map(grow, memory.cache)


class _AnswerWriter:
    """Turns the ids of one row into text, and knows where the answer ends."""

    def __init__(self, tokenizer: Tokenizer, options: SamplingOptions, limit: int):
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.limit = limit
        self.finish_reason = ""
        self._stream: AnswerStream = tokenizer.stream()
        self._eos = -1 if options.ignore_eos else tokenizer.eos_id
        self._stop = options.stop
        self._unsent = ""
        self._closed = False
        self._was_cut = False

    @property
    def finished(self) -> bool:
        return bool(self.finish_reason)

    def push(self, id_: int, logprob: float) -> str:
        """Text that can be shown now: it cannot be the beginning of a stop string any more."""
        if self.finished:
            return ""
        self.ids.append(id_)
        self.logprobs.append(logprob)
        self._unsent += self._stream.push(id_)
        if id_ == self._eos or self._cut_at_stop():
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
        return "" if self.finished else self._send(len(self._unsent) - self._held_back())

    def close(self) -> str:
        """What was held back; nothing the second time."""
        if self._closed:
            return ""
        self._closed = True
        if not self._was_cut:
            self._unsent += self._stream.finish()
            self._cut_at_stop()
        return self._send(len(self._unsent))

    def _cut_at_stop(self) -> bool:
        places = [place for stop in self._stop if (place := self._unsent.find(stop)) >= 0]
        if places:
            self._unsent, self._was_cut = self._unsent[: min(places)], True
        return bool(places)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._unsent.endswith(stop[:n]))
        return max(lengths, default=0)

    def _send(self, length: int) -> str:
        text, self._unsent = self._unsent[:length], self._unsent[length:]
        self.text += text
        return text


def chunk_length(positions: int) -> int:
    """`positions` rounded up to a sixteenth of their power of two, at least 64: little waste, few shapes."""
    step = max(_SHORTEST_CHUNK, 1 << max(0, positions.bit_length() - 5))
    return -(-positions // step) * step


def bucket(size: int, smallest: int) -> int:
    """`size` rounded up to a power of two, or to one and a half of one: few shapes, at most a third too large."""
    power = max(smallest, 1 << max(0, size - 1).bit_length())
    return power * 3 // 4 if power * 3 // 4 >= max(size, smallest) and power % 4 == 0 else power


def matmul_precision(dtype: Any) -> Any:
    """float32 products are float32 on every platform; a TPU would round their inputs to bfloat16 otherwise."""
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else "default")


@partial(jax.jit, static_argnums=0)
def _encode_tiles(model: VL2Model, params: Params, tiles: Array) -> Float[Array, "I M D"]:
    with matmul_precision(model.dtype):
        return apply(model, params, tiles, method="encode_tiles")


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(model: VL2Model, batch: int, capacity: int) -> Cache:
    return init_cache(model.config.language_config, batch, capacity, model.dtype, model.layout)


@partial(jax.jit, static_argnums=0)
def _embed(model: VL2Model, params: Params, ids: Array, index: Array, table: Array) -> Float[Array, "B C D"]:
    return apply(model, params, ids, index, table, method="embed")


@partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def prefill_chunk(
    model: VL2Model, params: Params, x: Array, cache: Cache, hidden: Array, begin: Array, last: Array
) -> tuple[Float[Array, "B D"], Cache]:
    """One chunk: fills slots `begin` to `begin + C`, and keeps the hidden rows of prompts that end inside of it."""
    length = x.shape[1]
    positions = jnp.broadcast_to(begin + jnp.arange(length), x.shape[:2])
    with matmul_precision(model.dtype):
        out = apply(model, params, x, positions, None, cache, method="decode")
    within = last - begin
    row = jnp.take_along_axis(out.hidden, jnp.clip(within, 0, length - 1)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(((within >= 0) & (within < length))[:, None], row, hidden)
    return model.layout.constrain(hidden, None, None), out.cache


@partial(jax.jit, static_argnums=(0, 8), donate_argnums=3)
def _first_token(
    model: VL2Model,
    params: Params,
    hidden: Array,
    cache: Cache,
    lengths: Array,
    seen: Array,
    sampler: Sampler,
    eos: Array,
    greedy: bool,
) -> tuple[DecodeState, Int[Array, " B"], Float[Array, " B"]]:
    with matmul_precision(model.dtype):
        logits = apply(model, params, hidden, method="logits")
    step = jnp.zeros_like(lengths)
    token, logprob = choose(logits, sampler, seen, step, greedy)
    rows = jnp.arange(len(token))
    state = DecodeState(cache, token, lengths, step + 1, token == eos, seen.at[rows, token].set(True))
    return state, model.layout.constrain(token, None), model.layout.constrain(logprob, None)


@partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def decode_steps(
    model: VL2Model,
    params: Params,
    state: DecodeState,
    done: Array,
    steps: Array,
    sampler: Sampler,
    eos: Array,
    greedy: bool,
) -> tuple[DecodeState, Int[Array, "B n"], Float[Array, "B n"], Int[Array, " B"]]:
    """Up to `steps` tokens a row. A finished row stays where it is and produces nothing."""
    batch = len(state.token)
    rows = jnp.arange(batch)

    def body(carry):
        number, state, tokens, logprobs, counts = carry
        x = apply(model, params, state.token[:, None], method="embed")
        out = apply(model, params, x, state.position[:, None], None, state.cache, method="decode")
        logits = apply(model, params, out.hidden[:, 0], method="logits")
        token, logprob = choose(logits, sampler, state.seen, state.step, greedy)
        alive = ~state.done
        tokens = tokens.at[rows, number].set(token)
        logprobs = logprobs.at[rows, number].set(logprob)
        state = DecodeState(
            cache=out.cache,
            token=jnp.where(alive, token, state.token),
            position=state.position + alive,
            step=state.step + alive,
            done=state.done | (token == eos),
            seen=state.seen.at[rows, token].max(alive),
        )
        return number + 1, state, tokens, logprobs, counts + alive

    def unfinished(carry):
        return (carry[0] < steps) & ~carry[1].done.all()

    room = (batch, _STEPS_A_CALL)
    state = state._replace(done=state.done | done)
    start = (0, state, jnp.zeros(room, jnp.int32), jnp.zeros(room, jnp.float32), jnp.zeros(batch, jnp.int32))
    with matmul_precision(model.dtype):
        _, state, tokens, logprobs, counts = jax.lax.while_loop(unfinished, body, start)
    whole = model.layout.constrain
    return state, whole(tokens, None, None), whole(logprobs, None, None), whole(counts, None)


def _shared_prefix(old: np.ndarray, new: np.ndarray) -> int:
    """Positions that need not be computed again; the last one always is, for its hidden row."""
    length = min(len(old), len(new) - 1)
    different = np.flatnonzero(old[:length] != new[:length])
    return int(different[0]) if len(different) else length
