"""The network equals the released one on every recorded case: every layer, every router choice, the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vl2_jax
from tests.conftest import CASES, CONFIGS, GOLDENS, load_case, with_pictures
from vl2_jax.config import LanguageConfig, RopeScaling, read_config
from vl2_jax.model.attention import LatentAttention, Placement
from vl2_jax.model.moe import balance_loss, route
from vl2_jax.model.projector import Projector
from vl2_jax.model.rope import rotary_tables, rotate, softmax_scale
from vl2_jax.model.vl2 import VL2Model, abstract_boxed_params
from vl2_jax.processing.tiling import released_tiles
from vl2_jax.verification import from_recorded_rows

INFERENCE_CASES = [(config, case) for config, case in CASES if not case.startswith("train")]
ATOL = 2e-4
LARGE = 20  # rows of hidden states beyond this size have a tolerance relative to it
LONGEST, MOST_TILES = 174, 17  # of all cases: a model compiles once for one row, for three, and for no picture


@functools.cache
def loaded(config):
    vl2 = vl2_jax.load(GOLDENS / config, dtype="float32")
    run = jax.jit(functools.partial(vl2.model.apply, mutable=["intermediates"]))
    return vl2, vl2.processor.replace(as_released=True), run


@pytest.mark.parametrize(("config", "case"), INFERENCE_CASES)
def test_forward_pass_equals_the_recorded_one(config, case):
    info, arrays = load_case(config, case)
    vl2, processor, run = loaded(config)
    batch = processor([with_pictures(c) for c in info["conversations"]])
    length = batch.input_ids.shape[1]
    real = batch.attention_mask
    wide = batch.padded_to(LONGEST, MOST_TILES if len(batch.tiles) else 0, processor.tokenizer.pad_id)
    segments = wide.attention_mask.astype(np.int32)
    out, variables = run({"params": vl2.params}, wide.input_ids, segments, wide.visual_index, wide.tiles)

    def recorded_positions(x):
        return np.asarray(x)[:, :length] if x.shape[1] == LONGEST else np.asarray(x)

    found = out, jax.nn.logsumexp(out.logits, axis=-1), variables["intermediates"]
    out, logsumexp, seen = jax.tree.map(recorded_positions, found)

    def close(quantity, ours, recorded, mask=slice(None)):
        np.testing.assert_allclose(np.asarray(ours)[mask], recorded[mask], atol=ATOL, rtol=0, err_msg=quantity)

    layers, final, logits = seen["language"]["layer_out"], seen["final_norm_out"][0], out.logits
    if np.abs(arrays.get("layer_out", 0)).max() > LARGE:  # see `vl2_jax.verification`
        layers, final, logits = from_recorded_rows(vl2, batch, arrays)

    np.testing.assert_array_equal(np.argmax(out.logits, -1)[real], arrays["logits_argmax"][real])
    close("logits", logsumexp, arrays["logits_logsumexp"], real)
    recorded = arrays["logits"] if "logits" in arrays else arrays["logits_tail"]
    tail = recorded.shape[1]
    close("logits", np.asarray(logits)[:, length - tail :], recorded, real[:, length - tail :])
    close("embeddings", seen["inputs_embeds"][0], arrays["inputs_embeds"], real)
    for ours, layer in zip(layers, arrays.get("layer_out", ())):
        largest = np.abs(layer).max(axis=-1, keepdims=True)
        assert (np.abs(np.asarray(ours) - layer) <= np.maximum(ATOL, 1e-5 * largest))[real].all()
    if "final_norm_out" in arrays:
        close("layers", final, arrays["final_norm_out"], real)
    stored = released_tiles(batch.crops)
    if "vision_out" in arrays:
        close("vision", seen["vision_out"][0][stored], arrays["vision_out"])
        close("vision", seen["projector_out"][0][stored], arrays["projector_out"])
    for ours, block in zip(seen.get("vision", {}).get("vision_block_out", ()), arrays.get("vision_block_out", ())):
        close("vision", ours[stored], block)
    for routing, ids, weights in zip(out.routings, arrays["router_idx"], arrays["router_weight"], strict=True):
        order = np.argsort(routing.expert_ids, axis=-1)
        chosen = np.take_along_axis(np.asarray(routing.expert_ids), order, -1).reshape(ids.shape)
        np.testing.assert_array_equal(chosen[real.ravel()], ids[real.ravel()])
        ours = np.take_along_axis(np.asarray(routing.weights), order, -1).reshape(weights.shape)
        scale = vl2.config.language_config.routed_scaling_factor
        close("weights", ours / scale, weights / scale, real.ravel())


@pytest.mark.parametrize("changes", [{}, {"moe_layer_freq": 2, "num_hidden_layers": 5}, {"first_k_dense_replace": 4}])
def test_parameters_are_described_as_all_layers_have_them(changes):
    """Blocks and layers of a kind are described by one of them."""
    config = read_config(GOLDENS / "nano-base")
    config = config.replace(language_config=config.language_config.replace(**changes))
    ids, tiles = np.zeros((1, 1), np.int32), np.zeros((1, *(2 * (config.vision_config.image_size,)), 3), np.uint8)
    model = VL2Model(config, jnp.float32, jnp.bfloat16)
    whole = jax.eval_shape(model.init, jax.random.key(0), ids, None, ids, tiles)["params"]
    assert abstract_boxed_params(config) == whole


@pytest.mark.parametrize("config", CONFIGS[1:])
def test_absorbed_and_expanded_attention_agree(config):
    vl2, _, _ = loaded(config)
    language = vl2.config.language_config
    params = vl2.params["language"]["layers_1"]["self_attn"]
    x = jax.random.normal(jax.random.key(0), (2, 50, language.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(100, 150), (2, 50))
    mask = jnp.tril(jnp.ones((1, 50, 50), bool))
    attention = LatentAttention(language, jnp.float32, jnp.float32)
    placement = Placement(positions, mask, rotary_tables(language, positions))
    absorbed, expanded = (attention.apply({"params": params}, x, placement, None, form)[0] for form in (True, False))
    np.testing.assert_allclose(absorbed, expanded, atol=1e-5, rtol=0)


def unit(name):
    import json

    with np.load(GOLDENS / "units" / f"{name}.npz") as arrays:
        path = GOLDENS / "units" / f"{name}.json"
        return dict(arrays), json.loads(path.read_text()) if path.is_file() else None


@pytest.mark.parametrize("row", unit("router")[1], ids=lambda row: row["name"])
def test_routers_equal_the_recorded_ones(row):
    arrays = {k.split("/")[1]: v for k, v in unit("router")[0].items() if k.startswith(row["name"] + "/")}
    config = LanguageConfig(
        n_routed_experts=row["n_experts"],
        num_experts_per_tok=row["top_k"],
        topk_method=row["topk_method"],
        scoring_func=row["scoring_func"],
        n_group=row["g"],
        topk_group=row["tg"],
        norm_topk_prob=row["norm"],
        routed_scaling_factor=row["rsf"],
        aux_loss_alpha=row["alpha"],
        seq_aux=row["seq_aux"],
    )
    logits = jnp.einsum("btd,ed->bte", arrays["x"], arrays["weight"])
    routing = route(config, logits, arrays.get("bias"))
    order = np.argsort(routing.expert_ids, axis=-1)
    ids = np.take_along_axis(np.asarray(routing.expert_ids), order, -1).reshape(arrays["idx"].shape)
    weights = np.take_along_axis(np.asarray(routing.weights), order, -1).reshape(ids.shape)
    recorded = np.argsort(arrays["idx"], axis=-1)
    np.testing.assert_array_equal(ids, np.take_along_axis(arrays["idx"], recorded, -1))
    np.testing.assert_allclose(weights, np.take_along_axis(arrays["topk_weight"], recorded, -1), rtol=2e-6)
    if "aux_loss" in arrays:
        np.testing.assert_allclose(balance_loss(config, routing), arrays["aux_loss"][0], atol=1e-7)


@pytest.mark.parametrize("row", unit("rope")[1]["rotary"], ids=lambda row: row["name"])
def test_rotary_tables_equal_the_recorded_ones(row):
    arrays, _ = unit("rope")
    scaling = None
    kind = row["kind"].removeprefix("DeepseekV2").removesuffix("RotaryEmbedding").lower()
    if kind:
        names = {f.name for f in RopeScaling.__dataclass_fields__.values()}
        known = {k: v for k, v in row.items() if k in names}
        name = {"linearscaling": "linear", "dynamicntkscaling": "dynamic", "yarn": "yarn"}[kind]
        scaling = RopeScaling(type=name, factor=row["scaling_factor"], **known)
    config = LanguageConfig(
        qk_rope_head_dim=row["dim"],
        rope_theta=row["base"],
        max_position_embeddings=row["max_position_embeddings"],
        rope_scaling=scaling,
    )
    positions = jnp.asarray(arrays["positions"])
    # the dynamic table depends on the longest position, which is recorded as seq_len
    row_of = jnp.concatenate([positions, jnp.asarray([row["seq_len"] - 1])])
    cos, sin = (np.asarray(t[0, :-1]) for t in rotary_tables(config, row_of[None]))
    half = row["dim"] // 2
    np.testing.assert_allclose(cos, arrays[f"{row['name']}/cos"][:, :half], atol=5e-5)
    np.testing.assert_allclose(sin, arrays[f"{row['name']}/sin"][:, :half], atol=5e-5)


def test_rotations_equal_the_recorded_ones():
    arrays, table = unit("rope")
    cos, sin = (arrays[f"plain/{name}"][None, :, :32] for name in ("cos", "sin"))
    for form, interleaved in (("mla", True), ("mha", False)):
        for part in "qk":
            turned = rotate(jnp.asarray(arrays[part]).swapaxes(1, 2), cos, sin, interleaved=interleaved)
            np.testing.assert_allclose(turned.swapaxes(1, 2), arrays[f"{form}_{part}_rot"], atol=1e-6)
    for row in table["softmax_scale"]:
        scaling = row["rope_scaling"] and RopeScaling(**row["rope_scaling"])
        width = row["q_head_dim"]
        config = LanguageConfig(qk_nope_head_dim=width - 8, qk_rope_head_dim=8, rope_scaling=scaling)
        np.testing.assert_allclose(softmax_scale(config), row["softmax_scale"], rtol=1e-6)


@pytest.mark.parametrize("grid", ["g4", "g5", "g7"])
def test_projector_equals_the_recorded_one(grid):
    from vl2_jax.config import ProjectorConfig

    arrays = {k.split("/", 1)[1]: v for k, v in unit("projector")[0].items() if k.startswith(grid + "/")}
    params = {
        name.replace(".", "_"): {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}
        for name in ("layers.0", "layers.2")
    }
    config = ProjectorConfig(input_dim=6, n_embed=10)
    y = Projector(config, jnp.float32, jnp.float32).apply({"params": params}, arrays["x"])
    np.testing.assert_allclose(y, arrays["y"], atol=2e-6)
