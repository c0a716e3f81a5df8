"""Reading a compiled program's collectives, and what one device holds, told from shapes."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
import pytest

from vl2_jax.config import VL2Config
from vl2_jax.errors import VL2Error
from vl2_jax.planning.collectives import axes_of, find_collectives
from vl2_jax.planning.programs import build
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.mesh import make_mesh
from vl2_jax.training.recipe import read_recipe


@dataclass
class Mesh:
    """What is asked of a mesh of 2 x 4."""

    axis_names = ("expert", "tensor")
    shape: ClassVar = {"expert": 2, "tensor": 4}
    devices = np.zeros((2, 4))
    size = 8


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("replica_groups=[2,4]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("expert",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("expert",)),
        ("replica_groups=[1,8]<=[8]", ("expert", "tensor")),
        ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", ("?",)),
    ],
)
def test_groups_become_axes(groups, axes):
    assert axes_of(f"%x), {groups}, dimensions={{0}}", Mesh()) == axes


def test_what_a_loop_does_counts_as_often_as_it_goes_round():
    text = """
%five (p: (s32[])) -> pred[] {
  %k = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %k), direction=LT
}

%three (p: (s32[])) -> pred[] {
  %k = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %k), direction=LT
}

%unknown (p: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.1 (p: (bf16[8])) -> (bf16[8]) {
  %g = bf16[8]{0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8]
}

%outer.2 (p: (bf16[8])) -> (bf16[8]) {
  %w = (bf16[8]) while(%t), condition=%five, body=%body.1
}

%other.3 (p: (bf16[8])) -> (bf16[8]) {
  %g = bf16[8]{0} all-gather(%a), channel_id=3, replica_groups=[2,4]<=[8]
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %x = (bf16[8]) while(%t), condition=%three, body=%outer.2
  %z = (bf16[8]) while(%t), condition=%unknown, body=%other.3
  %y = bf16[8]{0} all-gather(%a), channel_id=2, replica_groups=[2,4]<=[8]
}
"""
    (gather,) = find_collectives(text, Mesh())
    assert gather.number == 17


def test_asynchronous_pieces_count_once_and_sizes_are_bytes():
    name = 'metadata={op_name="jit(f)/layers_1/mlp/routed_experts/all_gather"}'
    line = f"all-gather(%a), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), {name}"
    text = "\n".join(
        [
            f"  %g = bf16[32,1,2560]{{2,1,0}} {line}",
            f"  %g.2 = bf16[32,1,2560]{{2,1,0}} {line}",
            "  %s = f32[4]{0} reduce-scatter(%b), channel_id=4, replica_groups=[2,4]<=[8]",
        ]
    )
    gather, scatter = find_collectives(text, Mesh())
    assert gather == ("all-gather", ("expert",), 32 * 2560 * 2, 1, "routed_experts")
    assert scatter == ("reduce-scatter", ("tensor",), 4 * 4 * 4, 1, "rest")


SMALL = VL2Config.preset("vl2-small")


def held(purpose="decode", **kinds):
    """Bytes of one device, for 8 sequences of 4096 positions."""
    layout = MeshLayout(make_mesh("auto", SMALL, jax.devices()[:1]))
    return build(purpose, SMALL, layout, 8, 4096, **kinds).kinds


def test_narrow_weights_and_caches_are_counted_as_they_lie():
    experts, rows = 26 * 64 * 3 * 2048 * 1408, 27 * 8 * 4096
    floats, whole, least = held(), held(weights="int8"), held(weights="int4", cache="int8")
    assert floats["routed experts"] == 2 * experts
    assert floats["cache"] == 2 * rows * (512 + 64)
    assert whole["routed experts"] == pytest.approx(experts, rel=0.003)  # and a scale of each column
    assert whole["cache"] == floats["cache"]
    assert least["routed experts"] == experts * (1 / 2 + 4 / 128)  # and one of each 128 rows and column
    assert least["cache"] == rows * (512 + 64 + 2 * 2)  # and two of each row
    assert floats["vision and projector"] == least["vision and projector"]
    assert sum(least.values()) < 0.65 * 15.75 * 2**30  # one v5e chip


def test_weights_beside_adapters_are_those_of_the_flag_or_of_the_recipe():
    recipe = read_recipe("lora-small")
    told = read_recipe("lora-small", ["model.weights=int4"])
    assert held("train", recipe=recipe, weights="int4") == held("train", recipe=told)
    assert held("train", recipe=told)["routed experts"] == held(weights="int4")["routed experts"]
    with pytest.raises(VL2Error, match=r"model\.weights is 'int4', which gradients cannot change"):
        held("train", recipe=read_recipe("sft-small"), weights="int4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "int3"}, "weights of kind 'int3' are not known; choose one of int8, int4"),
        ({"cache": "int4"}, "a cache of kind 'int4' is not known; choose int8, or none"),
        ({"purpose": "train", "weights": "int8"}, "a training step .* plan it without --weights int8"),
        ({"purpose": "train", "cache": "int8"}, "a training step .* plan it without --cache int8"),
    ],
)
def test_kinds_that_cannot_be_planned_are_refused(given, message):
    with pytest.raises(VL2Error, match=message):
        held(**given)
