"""The network against independent implementations, on random float32 weights: `make peers` installs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import vl2_jax
from tests.conftest import GOLDENS, load_case, with_pictures
from tests.peers.transformers_models import decoder, released_tensors, vision_tower
from vl2_jax.config import RopeScaling, VL2Config
from vl2_jax.model.projector import Projector
from vl2_jax.model.vl2 import VL2Model, apply, init_params

YARN = RopeScaling("yarn", factor=40.0, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.707)
SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
GROUPS = SOFTMAX | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}
FAMILIES = {
    "v2 greedy": SOFTMAX,
    "v2 groups, low-rank queries, yarn": GROUPS | {"q_lora_rank": 24, "rope_scaling": YARN},
    "v3": {},
    "v3 groups, low-rank queries": {"n_group": 4, "topk_group": 2, "q_lora_rank": 24},
}


def random_model(gain=3, **changes):
    """Kernels are drawn `gain` times as large as at the start of training: far from linear, as trained ones are."""
    config = VL2Config.preset("vl2-nano")
    config = config.replace(language_config=config.language_config.replace(**changes))
    params = init_params(config, jax.random.key(0))
    return config, jax.tree.map(lambda a: a * gain if a.ndim > 1 else a, params)


def test_the_vision_tower_equals_siglip():
    """SigLIP in float64, so that only our own rounding shows; at a gain of 3 PyTorch's float32 is 3e-4 away from it."""
    config, params = random_model(gain=2)
    size = config.vision_config.image_size
    tiles = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    ours = jax.jit(
        lambda p, t: VL2Model(config, jnp.float32, jnp.float32).apply(
            {"params": p}, t, method="encode_tiles", mutable=["intermediates"]
        )
    )(params, tiles)[1]
    pixels = torch.from_numpy(tiles.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    with torch.no_grad():
        peer = vision_tower(config, released_tensors(config, params)).double()
        theirs = peer(pixels.double()).last_hidden_state.numpy()
    np.testing.assert_allclose(ours["intermediates"]["vision_out"][0], theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_equals_deepseeks(family):
    config, params = random_model(**FAMILIES[family])
    for layer in range(1, config.language_config.num_hidden_layers):
        gate = params["language"][f"layers_{layer}"]["mlp"]["gate"]
        if "correction_bias" in gate:  # positive, so that no biased score is below the fill value of a masked group
            gate["correction_bias"] = jax.random.uniform(jax.random.key(layer), gate["correction_bias"].shape)
    ids = np.random.default_rng(1).integers(0, config.language_config.vocab_size, (2, 70))
    model = VL2Model(config, jnp.float32, jnp.float32)
    ours = np.asarray(jax.jit(lambda p, i: apply(model, p, i).logits)(params, ids))
    with torch.no_grad():
        peer = decoder(config.language_config, released_tensors(config, params))
        theirs = peer(torch.from_numpy(ids), use_cache=False).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.parametrize("case", ["ground_one", "multi_turn"])
def test_pytorch_itself_is_as_far_from_the_recording_of_nano_v2(case):
    """Its expert outputs are scaled by 16, so the order of float32 sums shows, which each CPU's libraries choose.

    The recorded pictures and ids go through PyTorch on this machine and through ours: the distance between PyTorch and
    its own recording is the accuracy that the recording has, and ours must be of the same order.
    """
    info, arrays = load_case("nano-v2", case)
    vl2 = vl2_jax.load(GOLDENS / "nano-v2", dtype="float32")
    tensors = released_tensors(vl2.config, vl2.params)
    batch = vl2.processor.replace(as_released=True)([with_pictures(c) for c in info["conversations"]])
    pixels = torch.from_numpy(vl2.processor.normalise(batch.tiles).transpose(0, 3, 1, 2).copy())

    def embeddings(tile_tokens):
        return apply(vl2.model, vl2.params, batch.input_ids, batch.visual_index, tile_tokens, method="embed")

    with torch.no_grad():
        features = vision_tower(vl2.config, tensors)(pixels).last_hidden_state.numpy()
        projector = Projector(vl2.config.projector_config, jnp.float32, jnp.float32)
        x = embeddings(projector.apply({"params": vl2.params["projector"]}, features))
        peer = decoder(vl2.config.language_config, tensors)
        theirs = peer(inputs_embeds=torch.from_numpy(np.array(x)), use_cache=False).logits.numpy()
    ours = vl2.logits(batch)
    here, there = (np.abs(logits - arrays["logits"]).max() for logits in (ours, theirs))
    print(f"\n{case}: logits differ from the recording by {here:.1e} here, by {there:.1e} in PyTorch")
    assert here < 4 * there  # which of the two is nearer depends on the processor
