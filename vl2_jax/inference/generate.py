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
from collections.abc import Callable, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.errors import ContextLengthError, RequestError
from vl2_jax.inference.answers import Answer, AnswerWriter, Timings
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.sampling import Sampler, choose
from vl2_jax.inference.turns import DEVICES
from vl2_jax.model.decoder import Cache, init_cache, laid_out
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.batch import TEXT, Encoded, renumbered_rows
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.processing.tokenizer import Tokenizer
from vl2_jax.progress import Report, silent

_SHORTEST_CHUNK = 64
_SMALLEST_CACHE = 256
_STEPS_A_CALL = 16
_SECONDS_A_CALL = 0.1  # text should appear at least this often, so slow models decode fewer steps a call


@dataclass
class Memory:
    """What a cache holds after an answer, so that the next turn of the conversation computes only what is new.

    It belongs to one conversation. The call that takes it uses it up, whether it can reuse the cache or not: there is
    never an old cache beside a new one.
    """

    cache: Cache
    fingerprints: np.ndarray  # uint64 [positions], of the one sequence in the cache

    def free(self) -> None:
        for leaf in jax.tree.leaves(self.cache):
            leaf.delete()


class DecodeState(NamedTuple):
    """The decode loop's carry."""

    cache: Cache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    step: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]


@dataclass(frozen=True)
class Generator:
    """Answers for one model. Compiled programs are kept for the shapes that were met, rounded up to few.

    It never changes, so any number of threads may ask it at once. The devices compute for one of them at a time, in
    turn (`inference.turns`), and each answer in progress holds a cache of its own.
    """

    model: VL2Model
    params: Params
    tokenizer: Tokenizer
    chunk_size: int = 512
    tile_chunk: int = 4
    as_released: bool = False  # boxes are read by the released rule

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise RequestError(f"chunk_size is {self.chunk_size}; expected at least 1.")

    def generate(
        self,
        prompts: Sequence[Encoded],
        options: SamplingOptions,
        on_text: Callable[[int, str], None] | None = None,
        memory: Memory | None = None,
        *,
        n: int = 1,
        boxes_on: int = -1,
        report: Report = silent,
    ) -> tuple[list[Answer], Memory]:
        """Answers of all prompts, in one batch.

        Args:
          prompts: encoded conversations that end where the answer begins.
          on_text: called with (row, text) as soon as text is complete; others may compute meanwhile.
          memory: what an earlier call returned; the prefix it shares with the prompt is not computed again. Only for
            a single prompt. It is used up.
          n: answers of each prompt, which is computed once; they stand together.
          boxes_on: the picture of a conversation that boxes belong to, counted as lists are; the last, as released.
          report: called with (phase, done, total).

        Raises:
          ContextLengthError: a prompt leaves no room for an answer.
          RequestError: `n` is below 1, a conversation has pictures but none at `boxes_on`, or too few seeds were given.
        """
        if n < 1:
            raise RequestError(f"n is {n}; expected at least 1.")
        limits = [self._room_for(prompt, options.max_tokens) for prompt in prompts for _ in range(n)]
        pictures = [picture_at(prompt, boxes_on) for prompt in prompts]
        sampler = Sampler.of(options, self.model.config.language_config.vocab_size, len(limits))
        writers = [AnswerWriter(self.tokenizer, options, limit) for limit in limits]
        timings = Timings(tiles=sum(len(p.tiles) for p in prompts), prompt_tokens=sum(map(len, prompts)))
        run = self._run(prompts, sampler, options, writers, memory, timings, report)
        while True:
            try:
                tokens = next(run)
            except StopIteration as ended:
                cache: Cache = ended.value
                break
            for row, (writer, new) in enumerate(zip(writers, tokens)):
                text = "".join(writer.push(id_, logprob) for id_, logprob in new)
                if writer.finished:
                    text += writer.close()
                if text and on_text is not None:
                    on_text(row, text)
        timings.new_tokens = sum(len(writer.ids) for writer in writers)
        answers = []
        for row, writer in enumerate(writers):
            prompt, picture = prompts[row // n], pictures[row // n]
            size = prompt.image_sizes[picture] if prompt.image_sizes else None
            whole = prompt.begun + writer.text
            boxes = parse_boxes(whole, *size, as_released=self.as_released, picture=picture) if size else []
            reason = writer.finish_reason
            answers.append(Answer(writer.text, writer.ids, writer.logprobs, boxes, reason, len(prompt), timings))
        fed = writers[0].ids[:-1]  # the last token was never fed back
        prints = np.concatenate([prompts[0].fingerprints(), np.asarray(fed, np.uint64)])
        return answers, Memory(cache, prints)

    def encode_tiles(self, tiles: np.ndarray, report: Report = silent) -> Float[Array | np.ndarray, "I M D"]:
        """Tokens of all tiles, at most `tile_chunk` at a time; a bucket of chunks, the last of them empty."""
        if not len(tiles):
            return np.zeros((0, self.model.config.tokens_per_tile, self._width), self.model.dtype)
        devices = self.model.layout.devices
        chunks = -(-len(tiles) // (self.tile_chunk * devices))
        chunk = -(-len(tiles) // (chunks * devices)) * devices  # 5 tiles are 2 x 3, not 2 x 4; each device has as many
        padded = np.pad(tiles, ((0, chunks * chunk - len(tiles)), (0, 0), (0, 0), (0, 0)))
        parts: list[Array] = []
        for i in range(chunks):
            _tell(report, "looking at pictures", i, chunks, parts[-1:])
            parts.append(_encode_tiles(self.model, self.params, padded[i * chunk : (i + 1) * chunk]))
        room = bucket(chunks, 1) - chunks
        return jnp.concatenate([*parts, *[jnp.zeros_like(parts[0])] * room])

    def prefill(
        self,
        prompts: Sequence[Encoded],
        capacity: int,
        memory: Memory | None = None,
        timings: Timings | None = None,
        report: Report = silent,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """The hidden row of every prompt's last position, and the cache of all before it and itself.

        What it took is added to `timings`.
        """
        with DEVICES, self.model.layout.on_devices():
            return self._prefill(prompts, capacity, memory, timings or Timings(), report)

    def _prefill(
        self, prompts: Sequence[Encoded], capacity: int, memory: Memory | None, spent: Timings, report: Report
    ) -> tuple[Float[Array, "B D"], Cache]:
        start = 0
        longest = max(map(len, prompts))
        if memory is not None and len(prompts) == 1:
            start = _shared_prefix(memory.fingerprints, prompts[0].fingerprints())
        # As few chunks as allowed, all of one size, little longer than needed: 1087 positions in 3 x 384, not 3 x 512.
        chunks = -(-(longest - start) // self.chunk_size)
        chunk = min(self.chunk_size, chunk_length(-(-(longest - start) // chunks)))
        capacity = bucket(max(capacity, start + chunks * chunk), _SMALLEST_CACHE)
        spent.reused_tokens = start
        if memory is not None and not start:
            memory.free()
        cache = _grown(memory, self._slot_axis, capacity) if memory and start else None

        begun = time.perf_counter()
        shows_pictures = any((p.visual_index[start:] != TEXT).any() for p in prompts)
        tiles = np.concatenate([p.tiles for p in prompts])
        table = self.encode_tiles(tiles if shows_pictures else tiles[:0], report)
        jax.block_until_ready(table)
        spent.vision_seconds = time.perf_counter() - begun

        begun = time.perf_counter()
        ids = np.full((len(prompts), start + chunks * chunk), self.tokenizer.pad_id, np.int32)
        index = np.full_like(ids, TEXT)
        for row, (prompt, visual_rows) in enumerate(zip(prompts, renumbered_rows(prompts))):
            ids[row, : len(prompt)] = prompt.input_ids
            index[row, : len(prompt)] = visual_rows
        last = np.asarray([len(p) - 1 for p in prompts], np.int32)
        hidden: Any = np.zeros((len(prompts), self._width), self.model.dtype)
        cache = _empty_cache(self.model, len(prompts), capacity) if cache is None else cache
        for i in range(chunks):
            begin = start + i * chunk
            _tell(report, "reading the prompt", i, chunks, hidden)
            part = slice(begin, begin + chunk)
            x = _embed(self.model, self.params, ids[:, part], index[:, part], table)
            hidden, cache = prefill_chunk(self.model, self.params, x, cache, hidden, np.int32(begin), last)
        jax.block_until_ready(hidden)
        spent.prefill_seconds = time.perf_counter() - begun
        return hidden, cache

    def _run(
        self,
        prompts: Sequence[Encoded],
        sampler: Sampler,
        options: SamplingOptions,
        writers: list[AnswerWriter],
        memory: Memory | None,
        timings: Timings,
        report: Report,
    ) -> Steps[list[list[tuple[int, float]]], None, Cache]:
        """New (id, log-probability) pairs of every row, a few at a time, until all writers are finished; the cache."""
        rows, n = len(writers), len(writers) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(n)]
        lengths = np.asarray([len(p) for p in repeated], np.int32)
        capacity = bucket(max(len(p) + w.limit for p, w in zip(repeated, writers)), _SMALLEST_CACHE)
        seen = np.zeros((rows, self.model.config.language_config.vocab_size), bool)
        for row, prompt in zip(seen, repeated):
            row[prompt.input_ids] = True
        greedy, eos = options.is_greedy, np.int32(-1 if options.ignore_eos else self.tokenizer.eos_id)
        on_devices = self.model.layout.on_devices
        with DEVICES, on_devices():
            hidden, cache = self._prefill(prompts, capacity, memory, timings, report)
            if n > 1:
                hidden, cache = _repeat(self.model, hidden, n), _each_replaced(cache, partial(_repeat, self.model, n=n))
            begun = time.perf_counter()
            state, token, logprob = _first_token(
                self.model, self.params, hidden, cache, lengths, seen, sampler, eos, greedy
            )
            # Compiled before the first text appears, so that text does not stop after its first word.
            _tell(report, "compiling the decoder", 0, 0, token)
            nothing = np.zeros(rows, bool), np.int32(0)
            state, *_ = decode_steps(self.model, self.params, state, *nothing, sampler, eos, greedy)
            first = [[(int(t), float(p))] for t, p in zip(token, logprob)]
        yield first
        steps = 1
        while not all(writer.finished for writer in writers):
            done = np.asarray([writer.finished for writer in writers])
            steps = min(steps, max(w.limit - len(w.ids) for w in writers if not w.finished))
            with DEVICES, on_devices():
                call_begun = time.perf_counter()
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
        timings.decode_seconds = time.perf_counter() - begun
        return state.cache

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

    @property
    def _slot_axis(self) -> int:
        return 1 if self.model.config.language_config.use_mla else 2


def picture_at(prompt: Encoded, number: int) -> int:
    """A picture of a conversation, counted as lists are, as its place from the first; 0 where there is none.

    Raises:
      RequestError: the conversation has pictures, and this is none of them.
    """
    count = len(prompt.image_sizes)
    if count and not -count <= number < count:
        raise RequestError(f"boxes_on is {number}; the conversation has {count} picture(s), counted from 0.")
    return number % count if count else 0


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


def _grown(memory: Memory, axis: int, capacity: int) -> Cache:
    """The remembered cache with room for `capacity` positions."""
    missing = capacity - memory.cache[0][0].shape[axis]
    if missing <= 0:
        return memory.cache
    return _each_replaced(
        memory.cache, lambda old: jnp.pad(old, [(0, missing if a == axis else 0) for a in range(old.ndim)])
    )


def _each_replaced(cache: Cache, change: Callable[[Array], Array]) -> Cache:
    """`change` of every array of a cache; each old one is freed before the next new one is made."""

    def replaced(old: Array) -> Array:
        new = jax.block_until_ready(change(old))
        old.delete()
        return new

    return jax.tree.map(replaced, cache)


@partial(jax.jit, static_argnums=(0, 2))
def _repeat(model: VL2Model, rows: Array, n: int) -> Array:
    """Every row of a batch `n` times, laid out as what it was."""
    repeated = jnp.repeat(rows, n, axis=0)
    if rows.ndim == 2:  # hidden rows
        return model.layout.constrain(repeated, None, None)
    return laid_out((repeated,), model.layout)[0]


def _tell(report: Report, phase: str, done: int, total: int, result: Any) -> None:
    """Reports progress, once the step before is really done; without a listener nothing waits."""
    if report is not silent:
        jax.block_until_ready(result)
        report(phase, done, total)


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
    state = DecodeState(cache, token, lengths, step + 1, token == eos, _with_token(seen, token))
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
            seen=_with_token(state.seen, jnp.where(alive, token, -1)),
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


def _with_token(seen: Bool[Array, "B V"], token: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """One pass over the ids, in place; a scatter would copy them. Nothing is added for a token of -1."""
    return seen | (jnp.arange(seen.shape[-1]) == token[:, None])


def _shared_prefix(old: np.ndarray, new: np.ndarray) -> int:
    """Positions that need not be computed again; the last one always is, for its hidden row."""
    length = min(len(old), len(new) - 1)
    different = np.flatnonzero(old[:length] != new[:length])
    return int(different[0]) if len(different) else length
