"""vLLM's interface for models in JAX (`tpu_inference.models`) around `VL2Model`.

T rows of all sequences one after another, D model width, V vocabulary, I tiles, S pixels along a tile's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.errors import RequestError
from vl2_jax.inference.prefill import encode_tiles, matmul_precision
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.tiling import tiles_of, visual_rows
from vl2_jax.serving.vllm.attention import EngineCache, Step
from vl2_jax.serving.vllm.settings import Settings
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.rules import AXES


class DeepseekVL2(nnx.Module):
    """DeepSeek-VL2 as vLLM's engine runs it.

    It is made without weights, in a trace, and `load_weights` fills it. Its parameters are a flat list, whatever they
    are kept in.
    """

    supports_multimodal = True
    supports_multimodal_raw_input_only = False
    requires_raw_input_tokens = False

    def __init__(self, vllm_config: Any, rng_key: Array, mesh: Mesh):
        del rng_key
        self.settings = Settings.of(vllm_config)
        self.dtype = jnp.dtype(vllm_config.model_config.dtype)
        self.mesh = mesh

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>" if modality == "image" else None

    def load_weights(self, rng_key: Array) -> None:
        from vl2_jax.api import load

        del rng_key
        vl2 = load(**asdict(self.settings), dtype=self.dtype.name, mesh=own_mesh(self.mesh))
        self.model = vl2.model
        self.config, self.global_view_first = vl2.processor.config, vl2.processor.global_view_first
        leaves, self.tree = jax.tree.flatten(vl2.params)
        self.leaves = nnx.List([nnx.Param(leaf) for leaf in leaves])

    @property
    def params(self) -> Params:
        return jax.tree.unflatten(self.tree, [leaf.get_value() for leaf in self.leaves])

    def __call__(
        self,
        kv_caches: list[Array],
        input_ids: Int[Array, " T"] | None,
        attention_metadata: Any,
        inputs_embeds: Float[Array, "T D"] | None = None,
        input_positions: Int[Array, " T"] | None = None,
        layer_map: tuple[tuple[str, int], ...] = (),
        *others: Any,
    ) -> tuple[list[Array], Float[Array, "T D"], list[Array], None]:
        """One step of the decoder.

        Args:
          kv_caches: an array a layer, which are updated in place.
          layer_map: which of them each layer has.
          others: adapters and stages of a pipeline, of which there are none.

        Returns:
          The arrays, the rows after the last norm, and two results that nothing asks for.
        """
        del input_positions, others
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        number_of = dict(layer_map)
        order = [number_of.get(f"layer.{i}", i) for i in range(len(kv_caches))]
        ordered = [kv_caches[i] for i in order]
        new, hidden = decode(self.model, self.params, ordered, inputs_embeds, attention_metadata, self.mesh)
        return [new[order.index(i)] for i in range(len(new))], hidden, [], None

    def compute_logits(self, hidden: Float[Array, "n D"]) -> Float[Array, "n V"]:
        return in_own_names(self.model, self.params, hidden, method="logits")

    def embed_input_ids(
        self,
        ids: Int[Array, " T"],
        pictures: Float[Array, "T D"] | None = None,
        *,
        is_multimodal: Bool[Array, " T"] | None = None,
    ) -> Float[Array, "T D"]:
        """Rows of text, and of pictures where `is_multimodal` says so, in the order in which `pictures` has them."""
        x = in_own_names(self.model, self.params, ids[:, None], method="embed")[:, 0]
        if pictures is None or is_multimodal is None:
            return x
        rows = jnp.take(pictures, jnp.maximum(jnp.cumsum(is_multimodal) - 1, 0), axis=0)
        return jnp.where(is_multimodal[:, None], rows.astype(x.dtype), x)

    def embed_multimodal(self, tiles: Any, crops: Any, **others: Any) -> tuple[Float[Array, "n D"], ...]:
        """The rows of every picture, newlines and separator among them.

        Args:
          tiles: uint8 `[I, S, S, 3]`, of one picture after another, as `pictures.Pictures` makes them.
          crops: `[pictures, 2]`, local tiles (across, down).
        """
        del others
        params, pictures, first = self.params, [], 0
        with self.model.layout.on_devices():
            table = encode_tiles(self.model, params, np.asarray(tiles))
            for across, down in np.asarray(crops).tolist():
                rows = visual_rows((across, down), first, self.config.token_grid, self.global_view_first)
                pictures.append(_rows(self.model, params, rows, table))
                first += tiles_of(across, down)
        return tuple(pictures)

    def precompile_vision_encoder(self, run: Callable[..., Any]) -> None:
        """Compiles what looks at pictures of every raster."""
        size = self.config.tile_size
        for across, down in sorted(set(self.config.rasters)):
            tiles = np.zeros((tiles_of(across, down), size, size, 3), np.uint8)
            run(f"pictures of {across} x {down} tiles", self.embed_multimodal, tiles, [(across, down)])

    def modules(self) -> Sequence[Any]:
        """Parts that hold anything outside of JAX: none."""
        return ()


def decode(
    model: VL2Model,
    params: Params,
    caches: Sequence[Array],
    x: Float[Array, "T D"],
    metadata: Any,
    mesh: Mesh,
) -> tuple[Sequence[Array], Float[Array, "T D"]]:
    """One step of the decoder over vLLM's caches, an array a layer: the caches, and the rows after the last norm.

    Args:
      metadata: vLLM's `AttentionMetadata`.
      mesh: vLLM's.
    """
    step = Step(metadata, mesh)
    positions, exists = metadata.input_positions[:, None], step.exists()[:, None].astype(jnp.int32)
    more: Any = {"segments": exists, "cache": tuple(caches), "pages": EngineCache(step)}
    out = in_own_names(model, params, x[:, None], positions, method="decode", **more)
    return out.cache, out.hidden[:, 0]


def in_own_names(model: VL2Model, params: Params, *arguments: Any, **named: Any) -> Any:
    """A method of the model in a program of vLLM's, whose mesh is called by our names meanwhile."""
    layout = model.layout
    names = (
        jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh) if isinstance(layout, MeshLayout) else nullcontext()
    )
    with matmul_precision(model.dtype), names:
        return apply(model, params, *arguments, **named)


def own_mesh(mesh: Mesh) -> Mesh | None:
    """The devices of vLLM's mesh under our names; `None` for one device.

    Sequences, and with them the cache, are spread over `attn_dp`, our `expert`, which experts are spread over too.

    Raises:
      RequestError: heads are spread over devices, or could be.
    """
    data, spread = mesh.shape["data"], mesh.shape.get("attn_dp", 0) * mesh.shape.get("attn_dp_expert", 0)
    if data * spread != mesh.size:
        raise RequestError(
            f"attention is not by data on all of vLLM's {mesh.size} device(s); set NEW_MODEL_DESIGN=1, and "
            "attn_dp_size of the sharding_strategy to --tensor-parallel-size."
        )
    return None if mesh.size == 1 else Mesh(mesh.devices.reshape(data, 1, spread, 1), AXES)


@partial(jax.jit, static_argnums=0)
def _rows(
    model: VL2Model, params: Params, index: Int[Array, " n"], table: Float[Array, "I M D"]
) -> Float[Array, "n D"]:
    """Rows of the visual table."""
    return apply(model, params, jnp.zeros_like(index)[None], index[None], table, method="embed")[0]
