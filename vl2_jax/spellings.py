"""Configuration files as newer tools write them, to what the released ones would say.

    "dtype": "torch.bfloat16"                                    "torch_dtype": "bfloat16"
    "rope_parameters": {"rope_type": "default",                  "rope_scaling": None,
                        "rope_theta": 10000.0}                   "rope_theta": 10000.0
    "image_processor": {"image_mean": ..., "do_normalize": ...}  "image_mean": ..., "normalize": ...

Keys that mean nothing here stay as they are. Those that would change what the model computes are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vl2_jax.errors import ConfigError, shown

Json = Mapping[str, Any]

_DTYPES = {"half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32", "bf16": "bfloat16"}
# What each key may be beside null; any other value changes the maths.
_VISION = {"class_token": (False,), "ignore_head": (True,)}
_LANGUAGE = {
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleave": (True,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "layer_types": ("full_attention",),
}
_PREPROCESSOR = {"do_rescale": (True,), "do_pad": (True,), "rescale_factor": (1 / 255,)}
_ROPE = {"attention_factor": (), "partial_rotary_factor": (1,), "truncate": (True,)}


def model(data: Json) -> Json:
    """Of `config.json`, sections aside."""
    language = data.get("language_config")
    places = [data, language if isinstance(language, Mapping) else {}]
    for place in places:
        if place.get("quantization_config"):
            method = place["quantization_config"]
            if isinstance(method, Mapping):
                method = method.get("quant_method", method.get("quant_algo", "a method that is not named"))
            raise ConfigError(
                f"config.json has a quantization_config ({shown(method)}), and quantised weights cannot be read; give "
                "the model in bfloat16, float16 or float32 that it was made from."
            )
    named = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
    dtype = next((name for name in named if name not in (None, "auto")), None)
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
        dtype = _DTYPES.get(dtype, dtype)
    return {**data, "torch_dtype": dtype}


def vision(data: Json) -> Json:
    _refuse_others("vision_config", data, _VISION)
    return data


def language(data: Json) -> Json:
    _refuse_others("language_config", data, _LANGUAGE)
    if data.get("sliding_window") is not None and data.get("use_sliding_window") is not False:
        raise ConfigError(f"sliding_window {shown(data['sliding_window'])} is not supported; every position is seen.")
    described = {key: data[key] for key in ("rope_parameters", "rope_scaling") if data.get(key)}
    scalings = [_rope_scaling(key, value) for key, value in described.items()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ConfigError(f"rope_parameters {shown(scalings[0])} and rope_scaling {shown(scalings[1])} differ.")
    thetas = [value["rope_theta"] for value in described.values() if value.get("rope_theta") is not None]
    spelled = {**data, "rope_scaling": scalings[0] if scalings else None}
    if thetas:
        spelled["rope_theta"] = thetas[0]
    if data.get("hidden_act") == "swish":
        spelled["hidden_act"] = "silu"
    return spelled


def processor(data: Json) -> Json:
    """Of `processor_config.json` and of `preprocessor_config.json`."""
    nested = data.get("image_processor")
    given = {key: value for key, value in data.items() if value is not None}
    spelled = {**(nested if isinstance(nested, Mapping) else {}), **given}
    _refuse_others("the processor's configuration", spelled, _PREPROCESSOR)
    if spelled.get("normalize") is None and spelled.get("do_normalize") is not None:
        spelled["normalize"] = spelled["do_normalize"]
    return spelled


def _rope_scaling(key: str, value: Any) -> Json | None:
    """The released form, or None for embeddings that are not scaled."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {shown(value)}; expected an object or null.")
    given = {name: item for name, item in value.items() if item is not None and name != "rope_theta"}
    _refuse_others(key, given, _ROPE)
    kinds = {shown(given.pop(name)): name for name in ("rope_type", "type") if name in given}
    rest = {name: item for name, item in given.items() if name not in _ROPE}
    if len(kinds) == 2:
        raise ConfigError(f"{key} has rope_type and type, which differ ({', '.join(kinds)}).")
    if not kinds and rest:
        raise ConfigError(f"{key} {shown(value)} is not understood: it has no rope_type.")
    kind = next((value[name] for name in kinds.values()), "default")
    return None if kind == "default" else {"type": kind, **rest}


def _refuse_others(where: str, data: Json, accepted: Mapping[str, Iterable[Any]]) -> None:
    for key, values in accepted.items():
        for value in data[key] if isinstance(data.get(key), list) else [data.get(key)]:
            if value is not None and value not in values:
                raise ConfigError(f"{where} has {key} {shown(value)}, which is not supported; the released have none.")
