"""The public face: `load` a model directory, ask it questions."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from convert.checkpoint import dtype_of
from convert.peft import read_adapters
from convert.weight_map import plan
from vl2_jax.compilation import keep_compiled_programs
from vl2_jax.config import CONFIG_FILE, PROCESSOR_FILE, VL2Config, WeightKind, read_config
from vl2_jax.errors import CheckpointError, ConversationError
from vl2_jax.files import is_file_on, is_remote, path_of, why_not_whole
from vl2_jax.heap import give_back, give_back_after_compiling
from vl2_jax.inference.answers import Answer
from vl2_jax.inference.generate import Generator
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import Memory, bucket, matmul_precision
from vl2_jax.model.attention import CacheKind, checked_cache
from vl2_jax.model.layers import ONE_DEVICE, Layout
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.batch import Batch, Processor, as_conversations
from vl2_jax.processing.conversation import Conversation
from vl2_jax.processing.messages import pictures_of, read_messages
from vl2_jax.processing.tokenizer import TOKENIZER_FILE
from vl2_jax.progress import Report, silent
from vl2_jax.sharding.layout import Dispatch, MeshLayout
from vl2_jax.sharding.mesh import make_mesh
from vl2_jax.sharding.processes import chosen_by_one
from vl2_jax.weights import read_weights

SHIPPED = "vl2-nano"  # the small model in vl2_jax/nano, trained by this project on pictures that it draws


def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    weights: WeightKind | None = None,
    cache: CacheKind | None = None,
    verify: bool = True,
    chunk_size: int | None = None,
    mesh: str | Mesh | None = None,
    dispatch: Dispatch = "ring",
    adapters: str | Path | None = None,
    merge: bool | None = None,
    arrays: bool = False,
    report: Report = silent,
) -> VL2:
    """A model from a released or a converted directory, or by its hub id.

    Args:
      model: a directory, or an id such as "deepseek-ai/deepseek-vl2-tiny" (needs a connection the first time).
      dtype: "bfloat16" or "float32"; `None` is the checkpoint's. Weights are kept in it and computed with in it, except
        that a CPU computes in float32, which is exact with bfloat16 weights and faster.
      weights: "int8" or "int4" quantises the decoder's matrices of a checkpoint of floats (`convert.quantise`); `None`
        is what the checkpoint holds.
      cache: "int8" keeps rows of the cache as whole numbers with a scale of each row (`ops.paging.pages`); `None` is in
        the dtype of products.
      verify: compare every byte with the checkpoint's manifest; damage is reported by name.
      chunk_size: prompt positions that are computed at a time, at most; `None` is what suits the platform.
      mesh: devices to spread the model over: "auto", "expert=4,tensor=2" (see `sharding.mesh`), a mesh with those axes,
        or `None` for one device.
      dispatch: how tokens reach their experts on a mesh, see `sharding.layout`.
      adapters: a directory of low-rank adapters in PEFT's layout; those of a base of another name are a `VL2Warning`.
      merge: add the adapters to the weights, which costs nothing later, or keep them beside, which loses nothing: the
        sum of a bfloat16 weight and a small update is mostly the weight. `None` merges into float32 weights alone.
      arrays: what is not quantised is plain arrays of `dtype`, as training takes it. Else it has the form that answers
        fastest: on a CPU, bfloat16 matrices are kept as whole numbers (`ops.narrow`).
      report: called with (phase, done, total) as loading goes on.

    Compiled programs are kept from here on, see `compilation`.

    Raises:
      ConfigError, CheckpointError, MeshError, RequestError: see their messages.
    """
    keep_compiled_programs()
    give_back_after_compiling()
    cache_kind, directory = checked_cache(cache), find_model(model)
    config = read_config(directory)
    if not all(is_file_on(directory / name) for name in (PROCESSOR_FILE, TOKENIZER_FILE)):
        Processor.from_directory(directory, config)  # says what is missing, before minutes are spent on the weights
    leaves = plan(config)
    wanted = dtype_of(dtype or config.torch_dtype)
    added = None
    if adapters is not None:  # before minutes are spent on the weights
        added = read_adapters(adapters, leaves, names_of(model, directory, config))
    layout: Layout = ONE_DEVICE
    if mesh is not None:
        layout = MeshLayout(make_mesh(mesh, config) if isinstance(mesh, str) else mesh, dispatch)
    params, computed = read_weights(
        directory, config, leaves, wanted, weights, layout, added, merge, arrays, verify, report
    )
    give_back()
    processor = Processor.from_directory(directory, config)  # small files too are read after the manifest was compared
    return VL2(config, params, processor, computed, chunk_size, layout, cache_kind)


def names_of(model: str | Path, directory: Path, config: VL2Config) -> list[str]:
    """What a model is called, the first as the user calls it."""
    return [str(model), str(directory), str(config.source.get("_name_or_path", ""))]


def find_model(model: str | Path) -> Path:
    """The directory of a model: here, on a bucket (`gs://bucket/model`), or "vl2-nano", which comes with the project.

    A hub id is downloaded.

    Raises:
      CheckpointError: there is no such directory, and the hub has no such model or cannot be reached.
    """
    directory = path_of(model)
    if is_remote(directory):
        return _with_config(directory)
    if directory.is_dir():
        if (directory / "checkpoints").is_dir() and not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{directory} is the folder of a run; give {directory / 'model'}, or what `vl2 export` makes of it."
            )
        return _with_config(directory)
    if directory.is_file():
        raise CheckpointError(f"{directory} is a file; give the directory that holds it, with {CONFIG_FILE} beside it.")
    if directory.is_symlink():
        raise CheckpointError(why_not_whole(directory))
    name = str(model)
    if name == SHIPPED:
        return Path(__file__).with_name("nano")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no directory {name!r}; give a model's directory, a hub id 'owner/name' or {SHIPPED}."
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.md", "LICENSE*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{name!r} is not a directory here and could not be downloaded ({reason}); "
            "check the name and the connection."
        ) from None


def _with_config(directory: Path) -> Path:
    config = directory / CONFIG_FILE
    if not is_file_on(config):
        raise CheckpointError(
            why_not_whole(config) or f"{directory} holds no {CONFIG_FILE}; give the directory of a model."
        )
    return directory


class VL2:
    """A model that answers.

    Answering changes nothing here: any number of threads may call one model at once, each for conversations of its own.
    The devices compute for one of them at a time, in turn (`inference.turns`), and every answer in progress holds a
    cache, so memory limits how many callers are sensible. What is assigned between answers holds for later ones.

    Attributes:
      config: what the model is.
      params: its parameters, nested dictionaries of arrays.
      processor: conversations to arrays.
    """

    def __init__(
        self,
        config: VL2Config,
        params: Params,
        processor: Processor,
        dtype: Any = jnp.float32,
        chunk_size: int | None = None,
        layout: Layout = ONE_DEVICE,
        cache_kind: CacheKind | None = None,
    ):
        self.config = config
        self.params = params
        self.processor = processor
        self.chunk_size = chunk_size
        mean, std = processor.config.image_mean, processor.config.image_std
        self.model = VL2Model(
            config, dtype, dtype, pixel_mean=mean, pixel_std=std, layout=layout, cache_kind=cache_kind
        )

    @property
    def generator(self) -> Generator:
        """Prompts to answers, with the parameters that are here now."""
        processor = self.processor
        return Generator(
            self.model, self.params, processor.tokenizer, self.chunk_size, as_released=processor.as_released
        )

    def generate(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        on_text: Callable[[int, str], None] | None = None,
        n: int = 1,
        boxes_on: int = -1,
        report: Report = silent,
        each: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answers for one conversation or a list of them, in one batch.

        Args:
          conversations: messages `{"role", "content", "images"}`; the last is the assistant's, empty or begun. It is
            added if the last is a user's.
          on_text: called with (row, text) while text comes.
          n: answers of each conversation, which is computed once; they stand together.
          boxes_on: the picture that boxes are pixels of, counted as lists are; the last, as released.
          report: called with (phase, done, total) until the first text.
          each: options of each conversation, beside and before those that all have.
          **options: fields of `SamplingOptions`: max_tokens, temperature, top_p, top_k, repetition_penalty, seed,
            ignore_eos, stop.

        Returns:
          A list of answers with `.text`, `.token_ids`, `.boxes`, `.logprobs`, `.timings`.

        Raises:
          ConversationError, ImageError, ContextLengthError, RequestError: see their messages.
        """
        sampling: SamplingOptions | list[SamplingOptions] = _agreed(SamplingOptions.of(options))
        if each is not None:
            sampling = [_agreed(SamplingOptions.of({**options, **own})) for own in each]
        prompts = [self.processor.encode(open_answer(c)) for c in as_conversations(conversations)]
        return self.generator.generate(prompts, sampling, on_text, n=n, boxes_on=boxes_on, report=report)[0]

    def chat(self) -> Chat:
        """A conversation that remembers: each turn computes only what is new."""
        return Chat(self)

    def warm_up(self, conversations: int = 1, *, greedy_only: bool = False, report: Report = silent) -> None:
        """Compiles all that answering so many conversations at once needs, so that no question waits for it.

        It takes about as long as a few answers, less where compiled programs were kept (`compilation`).

        Args:
          greedy_only: nothing will be sampled.
        """
        self.generator.warm_up(conversations, greedy_only=greedy_only, report=report)

    def logits(self, batch: Batch) -> Float[np.ndarray, "B T V"]:
        """float32 logits of every position of a batch, without sampling."""
        length, tiles = batch.input_ids.shape[1], len(batch.tiles)
        room = batch.padded_to(bucket(length, 16), bucket(tiles, 1) if tiles else 0, self.processor.tokenizer.pad_id)
        segments = room.attention_mask.astype(np.int32)
        with self.model.layout.on_devices():
            out = _logits(self.model, self.params, room.input_ids, segments, room.visual_index, room.tiles)
        return np.asarray(out)[:, :length]


class Chat:
    """Turns of one conversation that share a cache.

    Different conversations may be held in different threads; the turns of one come one after another.
    """

    def __init__(self, vl2: VL2):
        self._vl2 = vl2
        self._memory: Memory | None = None
        self._one_at_a_time = threading.Lock()
        self.messages: list[dict[str, Any]] = []

    def ask(
        self,
        text: str,
        images: Sequence[Any] = (),
        on_text: Callable[[int, str], None] | None = None,
        *,
        boxes_on: int = -1,
        report: Report = silent,
        **options: Any,
    ) -> Answer:
        """The answer to one more message. A turn that fails or is interrupted leaves the conversation as it was.

        Args:
          text: of the message; other arguments are those of `VL2.generate`.
          images: of the message.

        Raises:
          ConversationError: the answer before is still being written, or see `VL2.generate`.
        """
        if not self._one_at_a_time.acquire(blocking=False):
            raise ConversationError("this conversation is being answered; wait for that, or begin another one.")
        try:
            sampling = _agreed(SamplingOptions.of(options))
            turn = {"role": "user", "content": text, "images": pictures_of(images)}
            prompt = self._vl2.processor.encode(open_answer([*self.messages, turn]))
            memory, self._memory = self._memory, None  # its cache is used up
            (answer,), self._memory = self._vl2.generator.generate(
                [prompt], sampling, on_text, memory, boxes_on=boxes_on, report=report
            )
            self.messages += [turn, {"role": "assistant", "content": answer.text}]
            return answer
        finally:
            self._one_at_a_time.release()


def _agreed(options: SamplingOptions) -> SamplingOptions:
    """The options with a seed, if they need one, that is the same in every process of a slice."""
    if options.is_greedy or options.seed is not None:
        return options
    return dataclasses.replace(options, seed=chosen_by_one(secrets.randbits(62)))


def open_answer(conversation: Conversation) -> list[Any]:
    """The conversation with an empty answer at the end, if it ends with a user's message."""
    messages = read_messages(conversation)
    return [*messages, {"role": "assistant", "content": ""}] if messages[-1]["role"] == "user" else messages


@partial(jax.jit, static_argnums=0)
def _logits(
    model: VL2Model, params: Params, ids: Array, segments: Array, index: Array, tiles: Array
) -> Float[Array, "B T V"]:
    with matmul_precision(model.dtype):
        logits = apply(model, params, ids, segments, index, tiles).logits
    return model.layout.constrain(logits, None, None, None)
