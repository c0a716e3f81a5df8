"""The vLLM plug-in behind its interface, with fakes of vLLM; `make vllm` runs it in the real engine."""

import asyncio
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import vl2_jax
from tests.conftest import GOLDENS
from tests.serving import their_fakes
from tests.serving.pictures import address, png
from vl2_jax.errors import RequestError, VL2Error

ROOT = Path(__file__).parents[2]
PAGE, PAGES = 32, 14


@pytest.fixture
def theirs(monkeypatch):
    yield their_fakes.install(monkeypatch)
    for name in [name for name in sys.modules if name.startswith("vl2_jax.serving.vllm.")]:
        del sys.modules[name]  # they know the fakes


def config_of(model, mode="vl2", page=PAGE, whole=True, ahead=False, by_data=True, **plugin):
    return SimpleNamespace(
        additional_config={"vl2": plugin, "sharding": {"sharding_strategy": {"enable_dp_attention": by_data}}},
        model_config=SimpleNamespace(
            model=str(model), dtype=np.dtype("float32"), tokenizer_mode=mode, allowed_media_domains=None,
            multimodal_config=SimpleNamespace(get_limit_per_prompt=lambda modality: 3),
        ),
        cache_config=SimpleNamespace(block_size=page),
        scheduler_config=SimpleNamespace(disable_chunked_mm_input=whole, async_scheduling=ahead),
    )  # fmt: skip


def question(pictures, text="What is beside it?"):
    names = ["square.png", "wide.png", "tall.png"][:pictures]
    images = [str(GOLDENS / "images" / name) for name in names]
    return [
        {"role": "user", "content": "<image>\n" * pictures + text, "images": images},
        {"role": "assistant", "content": ""},
    ]


def caches_of(config):
    """Empty ones, as vLLM makes them."""
    language = config.language_config
    if language.use_mla:
        width = sum(-(-size // 128) * 128 for size in (language.kv_lora_rank, language.qk_rope_head_dim))
        shape = (PAGES, PAGE // 32, 32, width)
    else:
        shape = (PAGES, PAGE, 2 * language.num_key_value_heads, 1, -(-language.head_dim // 128) * 128)
    return [jnp.zeros(shape) for _ in range(language.num_hidden_layers)]


def metadata(done, new, rows):
    """Of a step of one sequence, beside one that does nothing."""
    ints = {
        "input_positions": [*range(done, done + new), *[0] * (rows - new)],
        "block_tables": [*reversed(range(1, PAGES)), *[0] * (PAGES - 1)],
        "seq_lens": [done + new, 0],
        "query_start_loc": [0, new, new],
        "request_distribution": [0, 0, 1],
    }
    return SimpleNamespace(**{name: jnp.asarray(values, jnp.int32) for name, values in ints.items()})


@pytest.mark.parametrize("family", ["nano-tiny", "nano-base"])  # heads and latents
def test_steps_of_the_model_give_the_logits_of_the_whole_prompt(theirs, first_layers, family):
    """Chunks of odd lengths and single tokens, filled up to 64 or 8 rows, over pages in no order."""
    from vl2_jax.serving.vllm.model import DeepseekVL2

    directory = first_layers(family)
    vl2 = vl2_jax.load(directory, dtype="float32")
    prompt = vl2.processor.encode(question(1))
    expected = vl2.logits(vl2.processor.collate([prompt]))[0]
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "attn_dp", "attn_dp_expert"))
    model = DeepseekVL2(config_of(directory), None, mesh)
    model.load_weights(None)
    (picture,) = model.embed_multimodal(prompt.tiles, prompt.crops)

    @jax.jit
    def step(caches, ids, pictures, is_picture, told):
        x = model.embed_input_ids(ids, pictures, is_multimodal=is_picture)
        caches, hidden, *_ = model(caches, None, SimpleNamespace(**told), x, None, (("layer.0", 1), ("layer.1", 0)))
        return caches, model.compute_logits(hidden)

    caches, done, seen = caches_of(vl2.config)[:2], 0, 0
    for new in (3, 40, len(prompt) - 46, 1, 1, 1):
        rows = 8 if new == 1 else 64
        ids, is_picture = (np.zeros(rows, kind) for kind in (np.int32, bool))
        ids[:new] = prompt.input_ids[done : done + new]
        is_picture[:new] = prompt.visual_index[done : done + new] >= 0
        shown = picture[seen : seen + is_picture.sum()]
        seen += len(shown)
        pictures = jnp.pad(shown, ((0, rows - len(shown)), (0, 0)))
        caches, logits = step(caches, ids, pictures, is_picture, vars(metadata(done, new, rows)))
        np.testing.assert_allclose(logits[:new], expected[done : done + new], atol=2e-4)
        done += new
    assert done == len(prompt)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mode": "auto"}, "--tokenizer-mode vl2"),
        ({"page": 16}, "multiple of 32"),
        ({"whole": False}, "--disable-chunked-mm-input"),
        ({"ahead": True}, "--no-async-scheduling"),
        ({"by_data": False}, "enable_dp_attention"),
        ({"quantised": "int8"}, "known are model, weights"),
    ],
)
def test_what_would_damage_answers_is_refused(theirs, changed, told):
    from vl2_jax.serving.vllm.model import DeepseekVL2

    with pytest.raises(RequestError, match=told):
        DeepseekVL2(config_of("vl2-nano", **changed), None, None)


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 1, "model": 1},  # of vLLM without NEW_MODEL_DESIGN
        {"data": 1, "attn_dp": 1, "attn_dp_expert": 1, "model": 2},  # with another attn_dp_size
    ],
)
def test_a_mesh_that_spreads_heads_is_refused(theirs, axes):
    from vl2_jax.serving.vllm.model import DeepseekVL2

    devices = np.resize(np.asarray(jax.devices()[:1]), tuple(axes.values()))
    mesh = SimpleNamespace(shape=axes, size=devices.size, devices=devices)
    with pytest.raises(RequestError, match=r"set NEW_MODEL_DESIGN=1, and attn_dp_size"):
        DeepseekVL2(config_of("vl2-nano"), None, mesh).load_weights(None)


def test_registering_twice_is_registering_once(theirs):
    from vl2_jax.serving.vllm import plugin
    from vl2_jax.serving.vllm.model import DeepseekVL2

    plugin.register()
    plugin.register()
    assert theirs.registered == {"DeepseekVLV2ForCausalLM": DeepseekVL2}
    assert theirs.RENDERER_REGISTRY["vl2"] == ("vl2_jax.serving.vllm.prompts", "VL2Renderer")
    assert theirs.TokenizerRegistry["vl2"] == ("vl2_jax.serving.vllm.tokens", "VL2Tokenizer")


@pytest.mark.parametrize("pictures", [0, 1, 2, 3])
def test_prompts_are_those_of_the_processor(theirs, processor, pictures):
    """Through OpenAI's messages, ids with one place a picture, and vLLM's multimodal processor."""
    from vl2_jax.api import find_model
    from vl2_jax.serving.vllm.pictures import LargestPictures, PictureInfo, Pictures
    from vl2_jax.serving.vllm.prompts import VL2Renderer

    text = "<image> <|User|>: \\<image> <｜end▁of▁sentence｜>"
    kinds = [png((300, 200)), png((90, 400), "blue"), png((50, 50), "green", "JPEG")][:pictures]
    urls = [{"type": "image_url", "image_url": {"url": address(data)}} for data in kinds]
    config = config_of(find_model("vl2-nano"))
    renderer = VL2Renderer(config, None)
    params = SimpleNamespace(chat_template_kwargs=None)
    _, prompt = renderer.render_messages([{"role": "user", "content": [*urls, {"type": "text", "text": text}]}], params)
    shown = prompt.get("multi_modal_data", {}).get("image", [])
    items = SimpleNamespace(items=shown, get_all_counts=lambda: {"image": len(shown)})
    ids, fields = prompt["prompt_token_ids"], {"tiles": np.zeros((0, 112, 112, 3), np.uint8)}
    if shown:
        info = PictureInfo(SimpleNamespace(model_config=config.model_config))
        inputs = SimpleNamespace(mm_data_items=items, prompt=ids, hf_processor_mm_kwargs={"is_tiled": "of a client"})
        ids, fields = Pictures(info, LargestPictures(info)).apply(inputs, None)
    written = "<image>\n" * pictures + text.replace("<image>", "\\<image>")
    expected = processor.encode([{"role": "user", "content": written, "images": shown}, question(0)[1]])
    assert ids == expected.input_ids.tolist()
    np.testing.assert_array_equal(fields["tiles"], expected.tiles)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}], "is not fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "send it in the request"),
        ([{"type": "image_url", "image_url": {"url": address()}}] * 4, "more than 3"),
        ([{"type": "image_url", "image_url": {"url": address(b"GIF89a, not")}}], "cannot be read"),
    ],
)
def test_pictures_are_taken_as_by_our_own_server(theirs, content, told):
    from vl2_jax.api import find_model
    from vl2_jax.serving.vllm.prompts import VL2Renderer

    renderer = VL2Renderer(config_of(find_model("vl2-nano")), None)
    with pytest.raises(VL2Error, match=told):
        renderer.render_messages([{"role": "user", "content": content}], SimpleNamespace(chat_template_kwargs=None))


def test_pictures_at_addresses_are_fetched_at_once_in_any_event_loop(theirs, monkeypatch):
    """More than are fetched at a time wait, and a second conversation waits in an event loop of its own."""
    from vl2_jax.api import find_model
    from vl2_jax.serving.http.fetching import Fetcher
    from vl2_jax.serving.vllm.prompts import VL2Renderer

    fetching, most, count = 0, 0, 20

    async def get(self, address):
        nonlocal fetching, most
        fetching += 1
        most = max(most, fetching)
        await asyncio.sleep(0.01)
        fetching -= 1
        return png((8, 8))

    monkeypatch.setattr(Fetcher, "_get", get)
    config = config_of(find_model("vl2-nano"))
    config.model_config.allowed_media_domains = ["example.org"]
    config.model_config.multimodal_config.get_limit_per_prompt = lambda modality: count
    renderer = VL2Renderer(config, None)
    parts = [{"type": "image_url", "image_url": {"url": f"https://example.org/{n}.png"}} for n in range(count)]
    for _ in range(2):
        _, prompt = renderer.render_messages(
            [{"role": "user", "content": parts}], SimpleNamespace(chat_template_kwargs=None)
        )
        assert len(prompt["multi_modal_data"]["image"]) == count
    assert 1 < most < count


def test_what_is_taken_from_vllm_is_imported_in_one_file():
    taken = re.compile(r"^\s*(import|from) (vllm|tpu_inference|torch|transformers)\b", re.MULTILINE)
    files = [path for path in (ROOT / "vl2_jax" / "serving").rglob("*.py") if taken.search(path.read_text())]
    assert files == [ROOT / "vl2_jax" / "serving" / "vllm" / "theirs.py"]
