"""What the plug-in takes from vLLM, with the same interface and nothing inside: `vl2_jax.serving.vllm.theirs`."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np

_NAME = "vl2_jax.serving.vllm.theirs"


class Table(dict):
    """A registry."""

    tokenizers = property(lambda self: self)

    def register(self, mode, module, name):
        assert mode not in self, "registered twice"
        self[mode] = (module, name)

    def register_processor(self, processor, *, info, dummy_inputs):
        def onto(model):
            self[model] = (processor, info, dummy_inputs)
            return model

        return onto


class Renderer:
    def __init__(self, config, tokenizer):
        self.config, self.model_config, self.tokenizer, self._executor = config, config.model_config, tokenizer, None


class Info:
    def __init__(self, ctx):
        self.ctx = ctx


class Inputs:
    def __init__(self, info):
        self.info = info


class Processor:
    """Pictures are processed and `<image>` ids replaced, without vLLM's cache."""

    def __init__(self, info, dummy_inputs):
        self.info, self.dummy_inputs = info, dummy_inputs

    def apply(self, inputs, timing_ctx):
        fields = self._call_hf_processor({"images": inputs.mm_data_items.items}, inputs.hf_processor_mm_kwargs)
        assert set(self._get_mm_fields_config(fields, inputs.hf_processor_mm_kwargs)) == {"tiles", "crops"}
        items = [{"crops": SimpleNamespace(data=crop)} for crop in fields["crops"]]
        (update,) = self._get_prompt_updates(None, inputs.hf_processor_mm_kwargs, {"image": items})
        ids, number = [], 0
        for id_ in inputs.prompt:
            if [id_] == update.target:
                ids += update.replacement(number)
                number += 1
            else:
                ids.append(id_)
        return ids, fields


class ClientError(Exception):
    """What is wrong with a request."""


class Engine:
    """Answers every prompt with the ids of `said`, or with an error that is there instead."""

    said = ()

    @classmethod
    def from_engine_args(cls, arguments):
        engine = cls()
        engine.arguments, engine.prompts = arguments, []
        return engine

    async def generate(self, prompt, sampling, request_id):
        self.prompts.append(prompt)
        if isinstance(self.said, Exception):
            raise self.said
        ids = self.said[: sampling.max_tokens]
        for end in range(1, len(ids) + 1):
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[:end], finish_reason="length")])


def _fields_of():
    return SimpleNamespace(flat_from_sizes=lambda name, sizes: (name, sizes), batched=lambda name: name)


def install(monkeypatch):
    """The fakes in place of vLLM until the test ends; returns them."""
    fake = ModuleType(_NAME)
    fake.registered = {}
    fake.register_model = fake.registered.__setitem__
    fake.TokenizerRegistry, fake.RENDERER_REGISTRY, fake.MULTIMODAL_REGISTRY = Table(), Table(), Table()
    fake.ShardingAxisName = SimpleNamespace(ATTN_DATA="data")
    fake.BaseRenderer, fake.BaseProcessingInfo, fake.BaseDummyInputsBuilder = Renderer, Info, Inputs
    fake.BaseMultiModalProcessor, fake.MultiModalFieldConfig, fake.BatchFeature = Processor, _fields_of(), dict
    fake.PromptReplacement, fake.from_numpy = SimpleNamespace, np.asarray
    fake.AsyncEngineArgs, fake.SamplingParams, fake.VLLMClientError = SimpleNamespace, SimpleNamespace, ClientError
    fake.AsyncLLMEngine = type("AsyncLLMEngine", (Engine,), {})
    package = sys.modules.get("vl2_jax.serving.vllm")
    for name in [name for name in sys.modules if name.startswith("vl2_jax.serving.vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, _NAME, fake)
    if package is not None:
        monkeypatch.setattr(package, "theirs", fake, raising=False)
    return fake
