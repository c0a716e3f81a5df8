"""Arithmetic of the model, for the share of a chip's peak that training reaches.

    MFU = operations that the model needs for the positions and tiles of a step / (seconds * peak of all chips)

As in PaLM (arXiv 2204.02311, appendix B): multiplications and additions of matrix products and attention, forward once
and backward twice; what is computed again to save memory does not count. A position attends to those before it in its
document, and to itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from convert.weight_map import flatten
from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import abstract_params
from vl2_jax.training.lora import adapted_paths, whole_paths
from vl2_jax.training.optimizer import is_trained
from vl2_jax.training.recipe import Recipe


@dataclass(frozen=True)
class Costs:
    """Operations of one forward pass."""

    position: float  # of the language model, without attention
    attended: float  # a position, for each position that it attends to
    tile: float

    def forward(self, positions: float, attended: float, tiles: float) -> float:
        """Operations for `positions`, which attend to `attended` positions in sum, and `tiles`."""
        return positions * self.position + attended * self.attended + tiles * self.tile


def costs_of(config: VL2Config) -> Costs:
    """Every matrix takes 2 operations a weight and position; of the routed experts those that a position visits."""
    language, vision = config.language_config, config.vision_config
    weights = {"language": 0.0, "vision": 0.0, "projector": 0.0}
    for path, leaf in flatten(abstract_params(config)).items():
        part = path.split("/")[0]
        if (
            len(leaf.shape) < 2
            or part not in weights
            or "embed_tokens" in path
            or "pool" in path
            or "pos_embed" in path
        ):
            continue
        visited = (language.num_experts_per_tok or 0) / (language.n_routed_experts or 1) if "/experts_" in path else 1.0
        weights[part] += visited * leaf.size
    heads, layers = language.num_attention_heads, language.num_hidden_layers
    if language.use_mla:
        head = language.qk_nope_head_dim + language.qk_rope_head_dim + language.v_head_dim
    else:
        head = 2 * language.hidden_size // heads
    patches, tokens = vision.grid**2, config.tokens_per_tile
    tile = 2 * weights["vision"] * patches + 4 * vision.layers * vision.width * patches**2
    return Costs(2 * weights["language"], 2.0 * layers * heads * head, tile + 2 * weights["projector"] * tokens)


@dataclass(frozen=True)
class TrainingCosts:
    """Operations of an update: those of one forward pass, and how often each part takes them."""

    forward: Costs
    passes: int  # of the language model
    tile_passes: int

    def of(self, positions: float, attended: float, tiles: float) -> float:
        """See `Costs.forward`."""
        return self.passes * self.forward.forward(positions, attended, 0) + self.tile_passes * self.forward.tile * tiles


def training_costs(config: VL2Config, recipe: Recipe) -> TrainingCosts:
    """What training as `recipe` says takes.

    A part in which nothing is trained has no gradients of weights; the vision tower then has no gradients at all.
    """
    paths = list(flatten(abstract_params(config)))
    if recipe.lora.rank:
        whole, adapted = whole_paths(recipe, paths), adapted_paths(recipe, paths)
    else:
        whole, adapted = [path for path in paths if is_trained(path, recipe.optimizer.frozen)], []

    def passes_of(part: str, untrained: int) -> int:
        is_in = [any(path.startswith(part) for path in some) for some in (whole, adapted)]
        return 3 if is_in[0] else 2 if is_in[1] else untrained

    passes, tile_passes = passes_of("language/", 2), passes_of("vision/", 1)
    return TrainingCosts(costs_of(config), passes, tile_passes)
