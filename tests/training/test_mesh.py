"""Training on 8 devices is training on one: the same update, and a checkpoint of one mesh goes on on another."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vl2_jax
from tests.conftest import GOLDENS
from vl2_jax.errors import MeshError
from vl2_jax.model.vl2 import VL2Model
from vl2_jax.sharding.batches import share_of_process
from vl2_jax.sharding.mesh import make_mesh
from vl2_jax.training.loop import train
from vl2_jax.training.objective import losses

EIGHT_ROWS = ("data.rows=4", "data.tiles=32", "loop.steps=3", "loop.checkpoint_every=1", "data.sequence_length=384")
# Adam divides a gradient by its own size, so that of nearly nothing it makes noise; not with this epsilon.
EIGHT_ROWS += ("optimizer.epsilon=0.01",)


def silent(_):
    pass


def test_a_sharded_step_is_the_step_of_one_device_and_goes_on_on_other_meshes(recipe, tmp_path):
    described = recipe(*EIGHT_ROWS)
    one = train(described, tmp_path / "one", silent)
    folder, told = tmp_path / "many", []
    # 8 devices, then 4, then 1; every step is that of one device.
    train(described, folder, silent, until=1, mesh="fsdp=2,expert=2,tensor=2")
    four = make_mesh("expert=2,tensor=2", one.model.config, jax.devices()[:4], training=True)
    train(described, folder, told.append, until=2, mesh=four)
    many = train(described, folder, told.append)
    assert told.count("going on from step 1") == told.count("going on from step 2") == 1

    def losses(run):
        return [json.loads(line)["loss"] for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]

    np.testing.assert_allclose(losses("many"), losses("one"), rtol=1e-5)
    for path, array in one.state.trained.items():
        np.testing.assert_allclose(many.state.trained[path], array, atol=1e-6, rtol=1e-5, err_msg=path)


def test_rows_that_do_not_divide_say_so(recipe, tmp_path):
    with pytest.raises(MeshError, match=r"rows a batch do not divide into 8 devices; change data\.rows"):
        train(recipe("data.rows=2"), tmp_path / "run", silent, mesh="fsdp=8")


@pytest.mark.parametrize(
    ("mesh", "owners", "shares"),
    [
        ("data=8", [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        ("expert=2,tensor=4", [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        ("tensor=2,data=4", [0, 0, 1, 1, 2, 2, 3, 3], [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("expert=4,tensor=2", [0, 1, 0, 1, 0, 1, 0, 1], [(0, 1), (0, 1)]),
    ],
)
def test_hosts_share_the_rows_of_a_batch(mesh, owners, shares):
    class Device:
        def __init__(self, owner):
            self.process_index = owner

    class Mesh:
        devices = np.asarray([Device(owner) for owner in owners])
        size = 8
        shape = dict.fromkeys(("data", "fsdp", "expert", "tensor"), 1)

    Mesh.shape |= {part.split("=")[0]: int(part.split("=")[1]) for part in mesh.split(",")}
    assert [share_of_process(Mesh, process) for process in range(len(shares))] == shares


@pytest.mark.parametrize("family", ["nano-tiny", "nano-base"])
def test_layers_as_a_loop_and_computed_again_give_the_same_gradients(family, first_layers):
    vl2 = vl2_jax.load(first_layers(family, layers=3, blocks=2), dtype="float32")
    picture = str(GOLDENS / "images" / "tiny.png")
    turns = [{"role": "user", "content": "<image>\nHow many?", "images": [picture]}]
    batch = vl2.processor([[*turns, {"role": "assistant", "content": "Two."}]])

    # Without what XLA fuses with for users, it splits the sums of the two in other places.
    is_unlike_users = "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]
    options = {"xla_cpu_use_fusion_emitters": True} if is_unlike_users else {}

    def gradients(**choices):
        model = VL2Model(vl2.config, jnp.float32, jnp.float32, **choices)
        found = jax.value_and_grad(lambda params: losses(model, params, batch).total)
        return jax.jit(found, compiler_options=options)(vl2.params)

    plain, looped = gradients(), gradients(remat=True, scan=True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)
