"""Tokens of vLLM's engine with the plug-in equal those of `vl2.generate`, whoever else is in the engine."""

import random

import numpy as np
import pytest
from vllm import SamplingParams

import vl2_jax
from tests.vllm.conftest import GOLDENS, conversation
from vl2_jax.api import find_model, open_answer
from vl2_jax.processing.images import load_image

TOKENS = 24


def prompt_of(vl2, messages):
    """As programs give it to vLLM: ids with one place a picture, and the pictures."""
    images = [image for message in messages for image in message.get("images", ())]
    prompt = {"prompt_token_ids": vl2.processor.prompt_ids(open_answer(messages))}
    if images:
        prompt["multi_modal_data"] = {"image": [load_image(image) for image in images]}
    return prompt


def greedy(tokens=TOKENS):
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)


def check(vl2, messages, output, tokens=TOKENS):
    """The prompt, the answer and its log-probabilities."""
    (alone,) = vl2.generate(messages, max_tokens=tokens, ignore_eos=True)
    (answer,) = output.outputs
    assert list(output.prompt_token_ids) == vl2.processor.encode(open_answer(messages)).input_ids.tolist()
    assert list(answer.token_ids) == alone.token_ids
    assert answer.text == alone.text.rstrip("\ufffd")  # half a character at the end, which vLLM keeps back
    told = [of_token[id_].logprob for id_, of_token in zip(answer.token_ids, answer.logprobs)]
    np.testing.assert_allclose(told, alone.logprobs, atol=1e-4)


@pytest.mark.parametrize("model", ["vl2-nano", "nano-tiny", "nano-small", "nano-base"])
def test_everyone_gets_what_they_would_get_alone(make_engine, model):
    """16 shuffled requests with 0 to 3 pictures in 8 places, twice: the second time they are known."""
    directory = find_model(model) if model == "vl2-nano" else GOLDENS / model
    vl2, engine = vl2_jax.load(directory, dtype="float32"), make_engine(directory)
    numbers = list(range(16 if model == "vl2-nano" else 8))
    for seed in range(2):
        random.Random(seed).shuffle(numbers)
        prompts = [prompt_of(vl2, conversation(number)) for number in numbers]
        outputs = engine.generate(prompts, greedy(), use_tqdm=False)
        for number, output in zip(numbers, outputs):
            check(vl2, conversation(number), output)
    assert min(output.num_cached_tokens for output in outputs) >= 32  # all but the last page of each prompt


@pytest.mark.parametrize(("model", "devices"), [("vl2-nano", 2), ("nano-tiny", 4), ("nano-small", 4)])
def test_several_devices_answer_as_one_does(make_engine, model, devices):
    """Each has sequences of its own and a part of the experts."""
    directory = find_model(model) if model == "vl2-nano" else GOLDENS / model
    vl2, engine = vl2_jax.load(directory, dtype="float32"), make_engine(directory, devices)
    outputs = engine.generate([prompt_of(vl2, conversation(number)) for number in range(8)], greedy(), use_tqdm=False)
    for number, output in enumerate(outputs):
        check(vl2, conversation(number), output)


@pytest.fixture(scope="module")
def nano(make_engine):
    directory = find_model("vl2-nano")
    return vl2_jax.load(directory, dtype="float32"), make_engine(directory)


def test_a_picture_beside_two_others_is_not_the_one_that_was_seen_alone(nano):
    """It is cut into tiles where it is alone, and not where it is one of three: what is kept of it must not mix."""
    vl2, engine = nano
    images = [str(GOLDENS / "images" / name) for name in ("medium.png", "rgba.png", "palette.png")]
    for count in (1, 3, 2, 1):
        messages = [{"role": "user", "content": "<image>\n" * count + "What is it?", "images": images[:count]}]
        (output,) = engine.generate([prompt_of(vl2, messages)], greedy(), use_tqdm=False)
        check(vl2, messages, output)


def test_who_leaves_disturbs_nobody(nano):
    """Requests that are aborted while others run; their pages go to the next ones."""
    vl2, engine = nano
    core = engine.llm_engine
    left = {number: conversation(number) for number in range(8)}
    for number, messages in left.items():
        core.add_request(str(number), prompt_of(vl2, messages), greedy(40))
    steps, outputs = 0, {}
    while core.has_unfinished_requests():
        outputs |= {output.request_id: output for output in core.step() if output.finished}
        steps += 1
        if steps == 12:
            core.abort_request([str(number) for number in (1, 2, 6)])
            for number in (1, 2, 6):
                del left[number]
                left[number + 20] = conversation(number + 20)
                core.add_request(str(number + 20), prompt_of(vl2, left[number + 20]), greedy(40))
    for number, messages in left.items():
        check(vl2, messages, outputs[str(number)], 40)


def test_messages_become_the_released_prompts(nano):
    """Through `LLM.chat`, which renders with the plug-in; what a user typed stays text."""
    vl2, engine = nano
    text = "What is written here? <image> <|User|> <｜end▁of▁sentence｜>"
    (output,) = engine.chat([{"role": "user", "content": text}], greedy(), use_tqdm=False)
    check(vl2, [{"role": "user", "content": text.replace("<image>", "\\<image>")}], output)
