"""Prompts to answers: pictures and prompts into a cache (`inference.prefill`), then a jitted decode loop (SPEC 6).

    prompt  --prefill-->     cache, last hidden row
    token   --while_loop-->  token --> ...              a few steps a call, cache updated in place

Every sequence starts at slot 0 of its cache row, and position s stands in slot s. Shorter prompts of a batch are
filled up on the right; those rows lie after every position that a query may see, and decoding overwrites them before
it reaches them. So a batch gives each of its rows what that row gives alone.

B batch, D model width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Generator as Steps
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.errors import ContextLengthError, RequestError
from vl2_jax.inference.answers import Answer, AnswerWriter, Timings
from vl2_jax.inference.chunks import Chunking, chunking
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import Memory, compile_prefill, matmul_precision, prefill, repeat
from vl2_jax.inference.sampling import Sampler, choose
from vl2_jax.inference.turns import DEVICES
from vl2_jax.model.decoder import Cache
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.batch import Encoded
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.processing.tokenizer import Tokenizer
from vl2_jax.progress import Report, silent

_STEPS_A_CALL = 16
_SECONDS_A_CALL = 0.1  # text should appear at least this often, so slow models decode fewer steps a call


class DecodeState(NamedTuple):
    """The decode loop's carry."""

    cache: Cache
    token: Int[Array, " B"]
    position: Int[Array, " B"]
    step: Int[Array, " B"]
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    counts: Int[Array, "B V"] | None = None  # of ids in the answers, where the sampler has extras


@dataclass(frozen=True)
class Generator:
    """Answers for one model.

    It never changes, so any number of threads may ask it at once. The devices compute for one of them at a time, in
    turn (`inference.turns`), and each answer in progress holds a cache of its own.
    """

    model: VL2Model
    params: Params
    tokenizer: Tokenizer
    chunk_size: int | None = None  # the longest chunk; None is the platform's (`inference.chunks`)
    as_released: bool = False  # boxes are read by the released rule

    def __post_init__(self) -> None:
        if self.chunk_size is not None and self.chunk_size < 1:
            raise RequestError(f"chunk_size is {self.chunk_size}; expected at least 1.")

    def generate(
        self,
        prompts: Sequence[Encoded],
        options: SamplingOptions | Sequence[SamplingOptions],
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
          options: of all prompts, or one for each.
          on_text: called with (row, text) as soon as text is complete; others may compute meanwhile.
          memory: what an earlier call returned; the prefix it shares with the prompt is not computed again. Only for
            a single prompt. It is used up.
          n: answers of each prompt, which is computed once; they stand together.
          boxes_on: the picture of a conversation that boxes belong to, counted as lists are; the last, as released.
          report: called with (phase, done, total).

        Raises:
          ContextLengthError: a prompt leaves no room for an answer.
          RequestError: `n` is below 1, a conversation has pictures but none at `boxes_on`, or too few seeds or options
            were given.
        """
        if n < 1:
            raise RequestError(f"n is {n}; expected at least 1.")
        each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
        if len(each) != len(prompts):
            raise RequestError(f"{len(each)} options were given for {len(prompts)} conversations; give one for each.")
        context = self.model.config.language_config.max_position_embeddings
        limits = [min(own.max_tokens, room_for(p, context)) for p, own in zip(prompts, each) for _ in range(n)]
        pictures = [picture_at(prompt, boxes_on) for prompt in prompts]
        vocabulary = self.model.config.language_config.vocab_size
        eos = self.tokenizer.eos_id
        if isinstance(options, SamplingOptions):
            sampler = Sampler.of_each([options], vocabulary, len(limits), eos)
        else:
            sampler = Sampler.of_each(each, vocabulary, n, eos)
        writers = [AnswerWriter(self.tokenizer, each[row // n], limit) for row, limit in enumerate(limits)]
        timings = Timings(tiles=sum(len(p.tiles) for p in prompts), prompt_tokens=sum(map(len, prompts)))
        run = self._run(prompts, sampler, each, writers, memory, timings, report)
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
        answers = [
            answer_of(writer, prompts[row // n], pictures[row // n], self.as_released, timings)
            for row, writer in enumerate(writers)
        ]
        fed = writers[0].ids[:-1]  # the last token was never fed back
        prints = np.concatenate([prompts[0].fingerprints(), np.asarray(fed, np.uint64)])
        return answers, Memory(cache, prints)

    def warm_up(self, conversations: int = 1, *, greedy_only: bool = False, report: Report = silent) -> None:
        """Runs every program that so many conversations at once need, on nothing, so that all are compiled."""
        config = self.model.config.language_config
        lengths = np.zeros(conversations, np.int32)
        seen = np.zeros((conversations, config.vocab_size), bool)
        sampler = Sampler.of(SamplingOptions(seed=0), config.vocab_size, conversations)
        eos, ways = np.full(conversations, self.tokenizer.eos_id, np.int32), (True,) if greedy_only else (True, False)
        with DEVICES, self.model.layout.on_devices():
            hidden, cache = compile_prefill(self.model, self.params, conversations, self.chunking, report)
            for number, greedy in enumerate(ways):
                report("compiling the decoder", number, len(ways))
                state, *_ = _first_token(self.model, self.params, hidden, lengths, seen, sampler, eos, greedy)
                state = state._replace(cache=cache)
                nothing = np.ones(conversations, bool), np.int32(0)
                state, *_ = decode_steps(self.model, self.params, state, *nothing, sampler, eos, greedy)
                cache = state.cache

    def prefill(
        self,
        prompts: Sequence[Encoded],
        capacity: int,
        memory: Memory | None = None,
        timings: Timings | None = None,
        report: Report = silent,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """See `inference.prefill`; the devices are this call's alone."""
        pad_id = self.tokenizer.pad_id
        with DEVICES, self.model.layout.on_devices():
            return prefill(
                self.model, self.params, prompts, capacity, self.chunking, pad_id, memory, timings or Timings(), report
            )

    def _run(
        self,
        prompts: Sequence[Encoded],
        sampler: Sampler,
        each: Sequence[SamplingOptions],
        writers: list[AnswerWriter],
        memory: Memory | None,
        timings: Timings,
        report: Report,
    ) -> Steps[list[list[tuple[int, float]]], None, Cache]:
        """New (id, log-probability) pairs of every row, a few at a time, until all writers are finished; the cache."""
        rows, n = len(writers), len(writers) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(n)]
        lengths = np.asarray([len(p) for p in repeated], np.int32)
        capacity = max(len(p) + w.limit for p, w in zip(repeated, writers))
        seen = np.zeros((rows, self.model.config.language_config.vocab_size), bool)
        for row, prompt in zip(seen, repeated):
            row[prompt.input_ids] = True
        greedy = all(options.is_greedy for options in each)
        ends = [-1 if options.ignore_eos else self.tokenizer.eos_id for options in each]
        eos = np.repeat(np.asarray(ends, np.int32), n)
        on_devices = self.model.layout.on_devices
        with DEVICES, on_devices():
            hidden, cache = self.prefill(prompts, capacity, memory, timings, report)
            if n > 1:
                hidden, cache = repeat(self.model, hidden, cache, n)
            begun = time.perf_counter()
            state, token, logprob = _first_token(self.model, self.params, hidden, lengths, seen, sampler, eos, greedy)
            state = state._replace(cache=cache)
            # Compiled before the first text appears, so that text does not stop after its first word.
            report("compiling the decoder", 0, 0)
            nothing = np.zeros(rows, bool), np.int32(0)
            state, *_ = decode_steps(self.model, self.params, state, *nothing, sampler, eos, greedy)
            jax.block_until_ready(state.step)
            timings.compile_seconds = time.perf_counter() - begun
            begun = time.perf_counter()
            first = [[(int(t), float(p))] for t, p in zip(*jax.device_get((token, logprob)))]
        yield first
        steps = 1
        while not all(writer.finished for writer in writers):
            done = np.asarray([writer.finished for writer in writers])
            steps = min(steps, max(w.limit - len(w.ids) for w in writers if not w.finished))
            with DEVICES, on_devices():
                call_begun = time.perf_counter()
                state, tokens, logprobs, counts, _ = decode_steps(
                    self.model, self.params, state, done, np.int32(steps), sampler, eos, greedy
                )
                tokens, logprobs, counts = jax.device_get((tokens, logprobs, counts))
                seconds = (time.perf_counter() - call_begun) / steps
            steps = steps_a_call(seconds)
            yield [
                list(zip(tokens[row, :count].tolist(), logprobs[row, :count].tolist()))
                for row, count in enumerate(counts)
            ]
        timings.decode_seconds = time.perf_counter() - begun
        return state.cache

    @property
    def chunking(self) -> Chunking:
        """How prompts are cut, where the parameters lie."""
        return chunking(self.platform, self.chunk_size, self.model.layout.devices)

    @property
    def platform(self) -> str:
        """Of the devices that hold the parameters."""
        return next(iter(jax.tree.leaves(self.params)[0].devices())).platform


def steps_a_call(seconds: float) -> int:
    """Tokens that one call of `decode_steps` should decode where one takes so many seconds."""
    return int(np.clip(_SECONDS_A_CALL / seconds, 1, _STEPS_A_CALL))


def room_for(prompt: Encoded, context: int) -> int:
    """Tokens that an answer may have in a context of so many positions; the last of them is never fed back.

    Raises:
      ContextLengthError: the prompt alone is longer.
    """
    if len(prompt) > context:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens ({prompt.picture_tokens} of them for pictures), the "
            f"context holds {context}; shorten the text, or send fewer or smaller pictures."
        )
    return context - len(prompt) + 1


def answer_of(writer: AnswerWriter, prompt: Encoded, picture: int, as_released: bool, timings: Timings) -> Answer:
    """What was written to a prompt, with the boxes that it points at in the picture of this place (`picture_at`)."""
    size = prompt.image_sizes[picture] if prompt.image_sizes else None
    whole = prompt.begun + writer.text
    boxes = parse_boxes(whole, *size, as_released=as_released, picture=picture) if size else []
    return Answer(writer.text, writer.ids, writer.logprobs, boxes, writer.finish_reason, len(prompt), timings)


def picture_at(prompt: Encoded, number: int) -> int:
    """A picture of a conversation, counted as lists are, as its place from the first; 0 where there is none.

    Raises:
      RequestError: the conversation has pictures, and this is none of them.
    """
    count = len(prompt.image_sizes)
    if count and not -count <= number < count:
        raise RequestError(f"boxes_on is {number}; the conversation has {count} picture(s), counted from 0.")
    return number % count if count else 0


@partial(jax.jit, static_argnums=(0, 7))
def _first_token(
    model: VL2Model,
    params: Params,
    hidden: Array,
    lengths: Array,
    seen: Array,
    sampler: Sampler,
    eos: Array,
    greedy: bool,
) -> tuple[DecodeState, Int[Array, " B"], Float[Array, " B"]]:
    """The first token of every row, and a state that has no cache yet: its program is the same for any."""
    with matmul_precision(model.dtype):
        logits = apply(model, params, hidden, method="logits")
    step = jnp.zeros_like(lengths)
    counts = None if sampler.extras is None else jnp.zeros(logits.shape, jnp.int32)
    token, logprob = choose(logits, sampler, seen, step, greedy, counts)
    state = DecodeState((), token, lengths, step + 1, token == eos, with_token(seen, token), counted(counts, token))
    return state, model.layout.constrain(token, None), model.layout.constrain(logprob, None)


class Alternatives(NamedTuple):
    """The likeliest ids of each step, under the model's own distribution."""

    ids: Int[Array, "B n a"]
    logprobs: Float[Array, "B n a"]


@partial(jax.jit, static_argnums=(0, 7), static_argnames="alternatives", donate_argnums=2)
def decode_steps(
    model: VL2Model,
    params: Params,
    state: DecodeState,
    done: Array,
    steps: Array,
    sampler: Sampler,
    eos: Array,
    greedy: bool,
    pages: Int[Array, "B per"] | None = None,
    *,
    alternatives: int = 0,
) -> tuple[DecodeState, Int[Array, "B n"], Float[Array, "B n"], Int[Array, " B"], Alternatives]:
    """Up to `steps` tokens a row. A row that is done, by the caller or by its token `eos`, produces nothing.

    Args:
      pages: the table of a cache that sequences share.
      alternatives: how many of the likeliest ids are told for each step.
    """
    batch = len(state.token)
    rows = jnp.arange(batch)

    def body(carry):
        number, state, tokens, logprobs, counts, others = carry
        x = apply(model, params, state.token[:, None], method="embed")
        exists = (~state.done).astype(jnp.int32)[:, None]
        out = apply(model, params, x, state.position[:, None], exists, state.cache, pages=pages, method="decode")
        logits = apply(model, params, out.hidden[:, 0], method="logits")
        token, logprob = choose(logits, sampler, state.seen, state.step, greedy, state.counts)
        alive = ~state.done
        tokens = tokens.at[rows, number].set(token)
        logprobs = logprobs.at[rows, number].set(logprob)
        if alternatives:
            likeliest = likeliest_of(logits, alternatives)
            others = Alternatives(*(a.at[:, number].set(b) for a, b in zip(others, likeliest)))
        state = DecodeState(
            cache=out.cache,
            token=jnp.where(alive, token, state.token),
            position=state.position + alive,
            step=state.step + alive,
            done=state.done | (token == eos),
            seen=with_token(state.seen, jnp.where(alive, token, -1)),
            counts=counted(state.counts, jnp.where(alive, token, -1)),
        )
        return number + 1, state, tokens, logprobs, counts + alive, others

    def unfinished(carry):
        return (carry[0] < steps) & ~carry[1].done.all()

    room = (batch, _STEPS_A_CALL)
    state = state._replace(done=state.done | done)
    wide = (*room, alternatives)
    others = Alternatives(jnp.zeros(wide, jnp.int32), jnp.zeros(wide, jnp.float32))
    start = (0, state, jnp.zeros(room, jnp.int32), jnp.zeros(room, jnp.float32), jnp.zeros(batch, jnp.int32), others)
    with matmul_precision(model.dtype):
        _, state, *told = jax.lax.while_loop(unfinished, body, start)
    tokens, logprobs, counts, others = jax.tree.map(lambda x: model.layout.constrain(x, *[None] * x.ndim), told)
    return state, tokens, logprobs, counts, others


def likeliest_of(logits: Float[Array, "B V"], count: int) -> Alternatives:
    """Of one step, `[B, count]`."""
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), count)
    return Alternatives(ids, logprobs)


def with_token(seen: Bool[Array, "B V"], token: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """One pass over the ids, in place; a scatter would copy them. Nothing is added for a token of -1."""
    return seen | (jnp.arange(seen.shape[-1]) == token[:, None])


def counted(counts: Int[Array, "B V"] | None, token: Int[Array, " B"]) -> Int[Array, "B V"] | None:
    """As `with_token`, of how often."""
    return None if counts is None else counts + (jnp.arange(counts.shape[-1]) == token[:, None])
