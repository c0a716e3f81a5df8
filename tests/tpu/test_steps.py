"""Compiled decode steps move nothing that they need not: no copies of weights or of the cache."""

import math

import numpy as np
import pytest
from jax.sharding import Mesh

from tests.tpu.compiling import LARGE, TARGETS, copies, devices_of
from vl2_jax.config import VL2Config
from vl2_jax.planning.programs import build
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.rules import AXES


def step_of(size, target, axes, batch, layers=2):
    config = VL2Config.preset(f"vl2-{size}")
    config = config.replace(language_config=config.language_config.replace(num_hidden_layers=layers))
    shape = [axes.get(name, 1) for name in AXES]
    mesh = Mesh(np.asarray(devices_of(target)[: math.prod(shape)]).reshape(shape), AXES)
    layout = MeshLayout(mesh)
    program = build("decode", config, layout, batch, 4096)
    with layout.on_devices():
        return program.lower().compile().as_text()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_decode_step_copies_nothing_large(target, size):
    text = step_of(size, target, {"expert": 4}, batch=32)
    assert "tpu_custom_call" in text
    # For TPU7x, XLA lays weights that come in tiles of 8 rows in tiles of 16, once a call: we cannot keep it from that.
    assert not [copy for copy in copies(text) if copy[1] > LARGE and (target != "tpu7x" or copy[2])]


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_nor_does_one_on_a_single_chip_or_with_heads_spread(size):
    for axes in ({}, {"expert": 2, "tensor": 2}):
        text = step_of(size, "v5e", axes, batch=8)
        assert not [copy for copy in copies(text) if copy[1] > LARGE]


def test_what_would_be_copied_is_seen():
    text = "ENTRY %main {\n  %copy.1 = bf16[2048,3072]{0,1:T(8,128)} copy(%p)\n}"
    assert list(copies(text)) == [("copy.1", 2 * 2048 * 3072, False)]
