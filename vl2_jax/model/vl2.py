"""DeepSeek-VL2: tiles and token ids to logits.

    tiles --vision--> features --projector--> [newline; separator; tokens of tile 0; ...]   the visual table
    ids ---embed----> text rows ----------------------------+-- visual_index picks its rows --> x --decoder--> logits

B batch, T positions, I tiles, S pixels along a tile's side, M tokens of a tile, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from vl2_jax.config import VL2Config
from vl2_jax.model.attention import CacheKind, OuterCache
from vl2_jax.model.decoder import Cache, Decoder, DecoderOutput
from vl2_jax.model.layers import ADAPTERS, ONE_DEVICE, Dtype, Layout, declare
from vl2_jax.model.moe import Routing
from vl2_jax.model.projector import Projector
from vl2_jax.model.vision import VisionTower

Params = Mapping[str, Any]


class ForwardOutput(NamedTuple):
    logits: Float[Array, "B T V"]
    routings: tuple[Routing, ...]


class VL2Model(nn.Module):
    """The whole network. `model.apply({"params": params}, ..., method=...)` is a pure function of its arguments."""

    config: VL2Config
    dtype: Dtype = jnp.bfloat16
    param_dtype: Dtype = jnp.bfloat16
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    layout: Layout = ONE_DEVICE
    remat: bool = False  # for gradients, layers are computed again instead of keeping what is inside of them
    scan: bool = False  # without a cache, alike layers are one loop: see `layers.scan_layers`
    cache_kind: CacheKind | None = None  # of its caches: see `attention.empty_pages`

    def setup(self) -> None:
        config = self.config
        loops: Any = {"remat": self.remat, "scan": self.scan}
        self.vision = VisionTower(config.vision_config, self.dtype, self.param_dtype, self.layout, **loops)
        self.projector = Projector(config.projector_config, self.dtype, self.param_dtype)
        self.language = Decoder(
            config.language_config, self.dtype, self.param_dtype, self.layout, self.remat, self.scan
        )
        width = config.language_config.hidden_size
        init = nn.initializers.normal(width**-0.5)
        self.image_newline = declare(self, "image_newline", init, (width,), ("embed",), self.param_dtype)
        self.view_separator = declare(self, "view_separator", init, (width,), ("embed",), self.param_dtype)

    def encode_tiles(self, tiles: UInt8[Array, "I S S 3"]) -> Float[Array, "I M D"]:
        """The tokens of every tile. Pixels travel to the device as bytes and are normalised there."""
        tiles = self.layout.constrain(tiles, "tile", None, None, None)
        with jax.named_scope("normalise"):
            scaled = divided_by_255(tiles.astype(jnp.float32))
            pixels = (scaled - jnp.asarray(self.pixel_mean)) / jnp.asarray(self.pixel_std)
        features = self.vision(pixels)
        self.sow("intermediates", "vision_out", features)
        tokens = self.layout.constrain(self.projector(features), None, None, None)
        self.sow("intermediates", "projector_out", tokens)
        return tokens

    def embed(
        self,
        input_ids: Int[Array, "B T"],
        visual_index: Int[Array, "B T"] | None = None,
        tile_tokens: Float[Array, "I M D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Rows of text and pictures, merged by one gather from the visual table (`processing.tiling`)."""
        x = self.layout.constrain(self.language.embed(input_ids), "batch", None, None)
        if visual_index is None or tile_tokens is None:
            return x
        layout = jnp.stack([self.image_newline, self.view_separator]).astype(self.dtype)
        table = jnp.concatenate([layout, tile_tokens.reshape(-1, x.shape[-1])])
        table = self.layout.constrain(table, None, None)
        rows = jnp.take(table, jnp.maximum(visual_index, 0), axis=0)
        return self.layout.constrain(jnp.where((visual_index >= 0)[..., None], rows, x), "batch", None, None)

    def decode(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        absorbed: bool | None = None,
        packed: bool = False,
        pages: Int[Array, "B per"] | OuterCache | None = None,
    ) -> DecoderOutput:
        """See `Decoder.__call__`."""
        return self.language(x, positions, segments, cache, absorbed, packed, pages)

    def decoder_layer(
        self, number: int, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """One layer of the decoder on given rows, without a cache: for comparing it alone."""
        return self.language.layer_alone(number, x, positions, segments)

    def end(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T V"]]:
        """The last norm and the logits of given rows of the last layer."""
        hidden = self.language.norm(x)
        return hidden, self.logits(hidden)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return self.language.logits(hidden)

    def hidden(
        self,
        input_ids: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        visual_index: Int[Array, "B T"] | None = None,
        tiles: UInt8[Array, "I S S 3"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        absorbed: bool | None = None,
    ) -> DecoderOutput:
        """Every position after the last norm, without a cache: for training, which makes logits a chunk at a time.

        With `positions` the rows are packed (see `Decoder.__call__`); without, a row is one sequence from 0 on.
        """
        tile_tokens = self.encode_tiles(tiles) if tiles is not None and len(tiles) else None
        x = self.embed(input_ids, visual_index, tile_tokens)
        self.sow("intermediates", "inputs_embeds", x)
        packed = positions is not None
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return self.decode(x, positions, segments, absorbed=absorbed, packed=packed)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        visual_index: Int[Array, "B T"] | None = None,
        tiles: UInt8[Array, "I S S 3"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        absorbed: bool | None = None,
    ) -> ForwardOutput:
        """Logits of every position, without a cache: for scoring."""
        out = self.hidden(input_ids, segments, visual_index, tiles, positions, absorbed)
        self.sow("intermediates", "final_norm_out", out.hidden)
        return ForwardOutput(self.logits(out.hidden), out.routings)


def apply(model: VL2Model, params: Params, *arguments: Any, method: str | None = None, **named: Any) -> Any:
    """`model`'s method as a pure function of its parameters and arguments.

    Args:
      params: with low-rank factors under `ADAPTERS`, they are added to the parameters of the same place
        (`convert.adapters.beside`).
    """
    variables = {"params": {name: part for name, part in params.items() if name != ADAPTERS}}
    if ADAPTERS in params:
        variables[ADAPTERS] = params[ADAPTERS]
    return model.apply(variables, *arguments, method=method, **named)


def divided_by_255(x: Float[Array, ...]) -> Float[Array, ...]:
    """`x / 255` of whole numbers up to 255, correctly rounded, as the released processor rounds.

    XLA multiplies with the reciprocal of a constant divisor. The last bit of half of all values is then another one,
    which becomes 3e-4 in the logits of the recorded models. The first product here is exact, the second is small.
    """
    leading = 257 / 65536
    return x * leading + x * (1 / 255 - leading)


@cache
def abstract_boxed_params(config: VL2Config, param_dtype: Dtype = jnp.bfloat16) -> Any:
    """Shape, dtype and logical axes of every parameter, at no memory cost.

    Traced once for a configuration, with one block and the first layer of each kind: the others are alike. All layers
    of the largest model took 5 seconds.
    """
    language, blocks = config.language_config, config.vision_config.layers
    kinds = [language.is_moe_layer(i) for i in range(language.num_hidden_layers)]
    short = config.replace(
        vision_config=config.vision_config.replace(layers=1),
        language_config=language.replace(num_hidden_layers=1 + max(map(kinds.index, set(kinds)))),
    )
    model = VL2Model(short, param_dtype, param_dtype)
    size = config.vision_config.image_size
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tiles = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)

    def init(key: Array, ids: Array, tiles: Array) -> Any:
        return model.init(key, ids, None, ids, tiles)["params"]

    boxed = jax.eval_shape(init, jax.random.key(0), ids, tiles)
    layers = {f"layers_{i}": boxed["language"][f"layers_{kinds.index(kind)}"] for i, kind in enumerate(kinds)}
    tower = {f"blocks_{i}": boxed["vision"]["blocks_0"] for i in range(blocks)}
    whole = {**boxed, "language": boxed["language"] | layers, "vision": boxed["vision"] | tower}
    return jax.tree.map(lambda leaf: leaf, whole)  # dictionaries come back sorted, as from tracing the whole


def map_boxed(function: Callable[[Any, tuple[str | None, ...]], Any], boxed: Any) -> Any:
    """`function(value, logical axes)` of every parameter."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda box: function(box.value, box.names), boxed, is_leaf=is_box)


def abstract_params(config: VL2Config, param_dtype: Dtype = jnp.bfloat16) -> Params:
    """`jax.ShapeDtypeStruct` of every parameter, as nested dictionaries."""
    return nn.unbox(abstract_boxed_params(config, param_dtype))


def init_params(config: VL2Config, key: Array, param_dtype: Dtype = jnp.float32, layout: Layout = ONE_DEVICE) -> Params:
    """Random parameters, each part made where it lies.

    The language model's are as the released classes have them (SPEC 5.8); the tower's and the projector's, which the
    release only ever loads, have a deviation of 1 / sqrt(fan-in) (LeCun).
    """
    model = VL2Model(config, param_dtype, param_dtype)
    size = config.vision_config.image_size
    ids, tiles = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, 3), jnp.uint8)

    def init(key: Array) -> Any:
        boxed = model.init(key, ids, None, ids, tiles)["params"]
        return map_boxed(lambda value, names: layout.constrain(value, *names), boxed)

    with layout.on_devices():
        return jax.jit(init)(key)
