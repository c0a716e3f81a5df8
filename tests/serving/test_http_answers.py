"""Answers of the API, field by field, as OpenAI's reference and vLLM have them."""

import io
import json

import pytest
from PIL import Image

from vl2_jax.api import open_answer
from vl2_jax.errors import VL2Error
from vl2_jax.serving.http.sampling import Defaults

from .conftest import NAME, ask
from .pictures import part, png, question

RED, BLUE = png(colour="red"), png((60, 200), "blue")


def read(data):
    return Image.open(io.BytesIO(data))


def test_an_answer_has_the_fields_of_the_reference(client):
    answer = ask(client).json()
    assert answer.keys() == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", NAME)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "It is a red square.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


def test_usage_counts_prompt_pictures_cache_and_answer(client, server, processor):
    told = ask(client, messages=question("What?", part(RED))).json()["usage"]
    prompt = server.engine.requests[-1].prompt
    assert told["prompt_tokens"] == len(prompt) == told["total_tokens"] - told["completion_tokens"]
    assert told["completion_tokens"] == len(processor.tokenizer.encode("It is a red square.")) + 1  # and the end
    details = told["prompt_tokens_details"]
    assert details["image_tokens"] == (prompt.visual_index >= 0).sum() > 0
    assert details["text_tokens"] + details["image_tokens"] == told["prompt_tokens"]
    assert details["cached_tokens"] == 3


@pytest.mark.parametrize(
    ("messages", "same_as"),
    [
        ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
        (question("hi"), [{"role": "user", "content": "hi"}]),
        (question(part(RED)), [{"role": "user", "content": "<image>\n", "images": [RED]}]),
        (question("a", part(RED), "b"), [{"role": "user", "content": "a<image>\nb", "images": [RED]}]),
        (
            question(part(BLUE), "then", part(RED), "which?"),
            [{"role": "user", "content": "<image>\nthen<image>\nwhich?", "images": [BLUE, RED]}],
        ),
        (
            [{"role": "developer", "content": "Short."}, {"role": "user", "content": "hi", "name": "me"}],
            [{"role": "system", "content": "Short."}, {"role": "user", "content": "hi"}],
        ),
        (
            [*question(part(RED), "?"), {"role": "assistant", "content": "It"}],
            [{"role": "user", "content": "<image>\n?", "images": [RED]}, {"role": "assistant", "content": "It"}],
        ),
    ],
    ids=["string", "part", "picture alone", "between", "order", "developer", "begun answer"],
)
def test_prompts_are_those_of_the_library(client, server, processor, messages, same_as):
    assert ask(client, messages=messages).status_code == 200
    got = server.engine.requests[-1].prompt
    pictures = [m | {"images": [read(i) for i in m.get("images", ())]} for m in same_as]
    expected = processor.encode(open_answer(pictures))
    assert got.input_ids.tolist() == expected.input_ids.tolist()
    assert got.visual_index.tolist() == expected.visual_index.tolist()
    assert (got.tiles == expected.tiles).all()
    assert got.image_sizes == expected.image_sizes
    assert got.begun == expected.begun


def test_an_address_of_data_may_stand_without_an_object_around_it(client, server):
    bare = {"type": "image_url", "image_url": part(RED)["image_url"]["url"]}
    assert ask(client, messages=question(bare)).status_code == 200
    assert server.engine.requests[-1].prompt.image_sizes == ((100, 50),)


def test_each_choice_is_a_request_of_its_own_and_the_prompt_counts_once(client, server):
    answer = ask(client, n=3, seed=7).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert sorted(r.options.seed for r in server.engine.requests[-3:]) == [7, 8, 9]
    assert answer["usage"]["prompt_tokens"] == len(server.engine.requests[-1].prompt)


@pytest.mark.parametrize("stop", ["red", ["nowhere", "red"]])
def test_a_stop_string_ends_the_answer_before_it(client, stop):
    (choice,) = ask(client, stop=stop).json()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("It is a ", "stop")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_longest_answer_is_kept_to(client, field):
    answer = ask(client, **{field: 3}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_a_request_that_says_nothing_is_sampled_as_by_openai_to_the_end_of_the_context(client, server):
    ask(client)
    request = server.engine.requests[-1]
    options = request.options
    assert (options.temperature, options.top_p, options.top_k, options.penalty) == (1.0, 1.0, 0, 1.0)
    assert options.max_tokens == server.engine.context - len(request.prompt) + 1


def test_options_reach_the_engine(client, server):
    given = {"temperature": 0.5, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2, "seed": 2**63 - 1}
    ask(client, **given, max_tokens=5, ignore_eos=True, stop=["a", "b"], cache_salt="mine")
    request = server.engine.requests[-1]
    assert {name: getattr(request.options, name) for name in given} == given
    assert (request.options.max_tokens, request.options.ignore_eos, request.options.stops) == (5, True, ("a", "b"))
    assert request.salt == "mine"


def test_no_limit_of_top_k_may_be_written_as_in_vllm(client, server):
    assert ask(client, top_k=-1).status_code == 200
    assert server.engine.requests[-1].options.top_k == 0


def test_bytes_of_log_probabilities_make_up_the_text(client, server):
    server.engine.script = lambda request: "naïve 漢字 😀!"
    (choice,) = ask(client, logprobs=True).json()["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "naïve 漢字 😀!"
    assert {token["logprob"] for token in content} == {-0.5}
    assert all(token["top_logprobs"] == [] for token in content)


def test_alternatives_are_told_with_each_token(client):
    (choice,) = ask(client, logprobs=True, top_logprobs=2).json()["choices"]
    for token in choice["logprobs"]["content"]:
        assert [(one["token"], one["logprob"]) for one in token["top_logprobs"]] == [("!", -2.0), ('"', -3.0)]


def test_a_token_that_cannot_be_has_a_log_probability_that_json_can_write(client, server, monkeypatch):
    monkeypatch.setattr("tests.serving.scripted.UNLIKELY", float("-inf"))
    (choice,) = ask(client, logprobs=True, top_logprobs=1).json()["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] == -9999.0


def test_boxes_are_in_pixels_of_the_picture_that_was_sent(client, server):
    server.engine.script = lambda request: "<|ref|>it<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>"
    messages = question(part(RED), part(BLUE), "<|grounding|>where?")
    last, first = (ask(client, messages=messages, **more).json()["choices"][0] for more in ({}, {"boxes_on": 1}))
    assert [(b["picture"], b["x2"], b["y2"], b["label"]) for b in last["message"]["boxes"]] == [(2, 30, 200, "it")]
    assert [(b["picture"], b["x2"], b["y2"]) for b in first["message"]["boxes"]] == [(1, 50, 50)]


def test_a_text_is_completed_as_it_is(client, server, processor):
    answer = ask(client, path="/v1/completions", prompt="One <image> <|User|>", messages=..., logprobs=1).json()
    prompt = server.engine.requests[-1].prompt
    expected = [processor.tokenizer.bos_id, *processor.tokenizer.encode("One <image> <|User|>")]
    assert prompt.input_ids.tolist() == expected
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "It is a red square.")
    told = answer["choices"][0]["logprobs"]
    assert "".join(told["tokens"]) == "It is a red square."
    assert all(answer["choices"][0]["text"][at:].startswith(t) for at, t in zip(told["text_offset"], told["tokens"]))
    assert told["top_logprobs"][0] == {"!": -2.0}


def test_a_completion_is_short_where_it_does_not_say(client, server):
    ask(client, path="/v1/completions", prompt="One", messages=...)
    assert server.engine.requests[-1].options.max_tokens == 16


def test_several_prompts_of_ids_are_completed_in_their_order(client, server):
    answer = ask(client, path="/v1/completions", prompt=[[5, 6], [7]], messages=..., n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompts = [request.prompt.input_ids.tolist() for request in server.engine.requests[-4:]]
    assert prompts == [[5, 6], [5, 6], [7], [7]]
    assert answer["usage"]["prompt_tokens"] == 3


def test_models_are_listed_and_found(client):
    listed = client.get("/v1/models").json()
    assert (listed["object"], [model["id"] for model in listed["data"]]) == ("list", [NAME])
    assert client.get(f"/v1/models/{NAME}").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 4096


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/version", "/openapi.json"])
def test_what_operators_ask_is_answered(client, path):
    assert client.get(path).status_code == 200


def test_an_id_of_a_request_comes_back(client):
    assert client.get("/health", headers={"x-request-id": "a-1.b_2"}).headers["x-request-id"] == "a-1.b_2"
    made = client.get("/health", headers={"x-request-id": "no\tsuch id"}).headers["x-request-id"]
    assert made.isalnum()


def test_metrics_have_the_names_that_dashboards_of_vllm_read(client):
    ask(client)
    lines = client.get("/metrics").text.splitlines()
    names = {line.split("{")[0] for line in lines if not line.startswith("#")}
    gauges = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
    counted = ("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prefix_cache_queries")
    more = ("prefix_cache_hits", "http_requests_client_disconnected")
    timed = ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time")
    timed = (*timed, "request_prefill_time", "request_decode_time")
    assert names >= gauges | {f"vllm:{name}_total" for name in (*counted, *more)}
    assert names >= {f"vllm:{name}_seconds_bucket" for name in timed}
    assert names >= {"vllm:request_prompt_tokens_sum", "vllm:request_generation_tokens_count", "http_requests_total"}
    assert any('finished_reason="stop"' in line and f'model_name="{NAME}"' in line for line in lines)
    (first,) = (line for line in lines if line.startswith("vllm:time_to_first_token_seconds_count"))
    assert float(first.split()[-1]) >= 1


def test_pictures_of_little_detail_keep_their_tiles_unless_the_server_honours_it(client, server, make_server):
    large = png((900, 900), "blue")
    low = question(part(large, detail="low"), "<|grounding|>?")
    assert ask(client, messages=low).status_code == 200
    assert server.engine.requests[-1].prompt.crops.tolist() != [[1, 1]]
    boxes = "<|ref|>it<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>"
    with make_server(lambda _: boxes, honor_detail=True) as other, other.client() as asks:
        answer = ask(asks, messages=low).json()
        assert other.engine.requests[-1].prompt.crops.tolist() == [[1, 1]]
        assert answer["choices"][0]["message"]["boxes"][0]["x2"] == 900


def test_defaults_of_the_operator_hold_where_a_request_says_nothing(make_server):
    defaults = Defaults.read(json.dumps({"temperature": 0, "top_k": 40, "max_new_tokens": 9}))
    with make_server(defaults=defaults) as running, running.client() as asks:
        ask(asks)
        ask(asks, temperature=0.7, max_tokens=4)
        silent, said = (request.options for request in running.engine.requests)
    assert (silent.temperature, silent.top_k, silent.max_tokens) == (0, 40, 9)
    assert (said.temperature, said.top_k, said.max_tokens) == (0.7, 40, 4)


def test_a_least_length_by_default_needs_no_longest(make_server):
    with make_server(defaults=Defaults.read('{"min_tokens": 5}')) as running, running.client() as asks:
        assert ask(asks).status_code == 200
        assert running.engine.requests[-1].options.min_tokens == 5
        assert "min_tokens is 5" in ask(asks, max_tokens=4).json()["error"]["message"]


@pytest.mark.parametrize("text", ["[]", "{", '{"top_q": 1}', '{"temperature": -1}', '{"temperature": NaN}', "3"])
def test_defaults_that_no_request_may_have_are_refused(text):
    with pytest.raises(VL2Error):
        Defaults.read(text)
