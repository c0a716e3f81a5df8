"""`vl2 plan`: whether a model fits on a slice, asked of the TPU compiler."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vl2_jax.cli.info import config_of
from vl2_jax.cli.terminal import print_json, tell
from vl2_jax.errors import MeshError, shown


def plan(
    model: str,
    topology: str = "",
    purpose: Annotated[Literal["decode", "prefill", "train"], tyro.conf.arg(name="for")] = "decode",
    batch: int = 32,
    context: int = 4096,
    mesh: str = "auto",
    dispatch: Literal["ring", "ragged"] = "ring",
    weights: str | None = None,
    cache: str | None = None,
    recipe: Path | None = None,
    search: bool = False,
    json: bool = False,
    save: Path | None = None,
) -> None:
    """Ask the TPU compiler whether a model fits on a slice, and how fast it can be; no TPU is needed.

    Example: vl2 plan --model vl2-base --topology v5e:4x4 --for decode --batch 32

    Args:
        model: The name of a size (vl2-tiny, vl2-small, vl2-base), a model's directory or a hub id.
        topology: A slice such as v5e:2x4; with --search kinds such as v5e or v5e,v6e, by default all.
        purpose: One decode step, one prefill chunk (several prompts, up to 4096 positions each), or a training step.
        batch: Sequences, over all devices.
        context: Positions of each: cache slots, or the packed row of a training step.
        mesh: auto, one axis, or sizes such as expert=4,tensor=2.
        dispatch: How tokens reach their experts on other devices: ring or ragged.
        weights: int8 or int4: the decoder's matrices in so many bits, in training beside adapters; by default bfloat16.
        cache: int8: rows of the cache in eight bits; by default bfloat16.
        recipe: Of a training step; by default a full fine-tune with AdamW, layers computed again for gradients.
        search: Find the smallest slice that it fits on, and the best mesh there.
        json: Print one object.
        save: Draw memory and time to a picture.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler is wanted, not the chip
    from convert.quantise import checked_kind
    from vl2_jax.model.attention import checked_cache
    from vl2_jax.planning import picture
    from vl2_jax.planning import plan as planning
    from vl2_jax.planning.slices import TOPOLOGIES
    from vl2_jax.training.recipe import read_recipe

    if save is not None:
        picture.check(save)
    config = config_of(model)
    if not (topology or search):
        raise MeshError("plan needs a slice: --topology v5e:2x4, or --search for the smallest that does.")
    if weights is not None:
        checked_kind(weights)
    checked_cache(cache)
    training = None if recipe is None else read_recipe(recipe)
    if search:
        kinds = [kind.strip() for kind in topology.split(",")] if topology else list(TOPOLOGIES)
        unknown = [kind for kind in kinds if kind not in TOPOLOGIES]
        if unknown:
            raise MeshError(f"there is no kind of TPU {shown(unknown[0])}; choose from {', '.join(TOPOLOGIES)}.")
        found = planning.search(model, config, kinds, purpose, batch, context, tell, training, weights, cache)
    else:
        found = planning.make_plan(
            model, config, topology, purpose, batch, context, mesh, dispatch, training, weights, cache
        )
    if save is not None:
        picture.draw(found, save)
    if json:
        print_json(found.to_json())
    else:
        print(planning.described(found))
