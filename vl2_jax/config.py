"""Configuration: what a DeepSeek-VL2 model is, read from and written to the official JSON files.

Field names and defaults are those of the official configuration classes (SPEC 1.1), so that a key which a released
`config.json` leaves out means here what it means there. `source` keeps the JSON that was read: `to_hf` writes
it back with the fields that were changed, and nothing else, so that keys we do not know survive a round trip.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from vl2_jax.errors import ConfigError
from vl2_jax.files import path_of

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "processor_config.json"


def _source() -> Any:
    return field(default_factory=dict, compare=False, hash=False, repr=False)


class _HfDataclass:
    """Reading and writing of one JSON object; nested sections are handled by `VL2Config`."""

    source: dict[str, Any]

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls) if f.name != "source"}  # type: ignore[arg-type]
        values = {key: _freeze(value) for key, value in data.items() if key in known}
        return cls(**values, source=copy.deepcopy(dict(data)))  # type: ignore[call-arg]

    def to_hf(self) -> dict[str, Any]:
        """The JSON object: the keys that were read, plus every field that differs from its default."""
        data = copy.deepcopy(self.source)
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if f.name == "source":
                continue
            value = getattr(self, f.name)
            is_new = f.name not in data and value != _default(f)
            is_changed = f.name in data and _freeze(data[f.name]) != value
            if is_new or is_changed:
                data[f.name] = _thaw(value)
        return data

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class VisionConfig(_HfDataclass):
    """The SigLIP tower (SPEC 2). The defaults are the official class's, which describe SigLIP-Large/16."""

    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4
    source: dict[str, Any] = _source()

    @property
    def grid(self) -> int:
        """Patches along one side of a tile; the pixels that do not fill a patch are never seen."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ProjectorConfig(_HfDataclass):
    """From vision features to rows of the language model's embedding (SPEC 3.1)."""

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False
    source: dict[str, Any] = _source()


@dataclass(frozen=True)
class RopeScaling:
    """Scaled rotary embeddings (SPEC 5.4): `type` is linear, dynamic or yarn; the rest is for yarn."""

    type: str
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1
    mscale_all_dim: float = 0


@dataclass(frozen=True)
class LanguageConfig(_HfDataclass):
    """The MoE decoder (SPEC 5)."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 100000
    eos_token_id: int = 100001
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    use_mla: bool = True
    source: dict[str, Any] = _source()

    @property
    def head_dim(self) -> int:
        """Width of one query head: all of it is rotated in MHA, the last `qk_rope_head_dim` of it in MLA."""
        if self.use_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.use_mla else self.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers the cache holds for one token in one layer."""
        if self.use_mla:
            assert self.kv_lora_rank is not None
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )


@dataclass(frozen=True)
class ProcessorConfig(_HfDataclass):
    """How pictures are cut into tiles and prompts are written (SPEC 4), `processor_config.json`."""

    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)  # (width, height); the first is the tile
    patch_size: int = 14
    downsample_ratio: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    normalize: bool = True
    image_token: str = "<image>"
    pad_token: str = "<｜▁pad▁｜>"
    sft_format: str = "deepseek"
    mask_prompt: bool = True
    ignore_id: int = -100
    source: dict[str, Any] = _source()

    def __post_init__(self) -> None:
        width, height = self.candidate_resolutions[0]
        if width != height or any(w % width or h % height for w, h in self.candidate_resolutions):
            raise ConfigError(
                f"candidate_resolutions must start with the square tile and hold multiples of it, got "
                f"{self.candidate_resolutions}; the released list starts with (384, 384)."
            )
        if self.sft_format != "deepseek":
            raise ConfigError(f"sft_format {self.sft_format!r} is not supported; released models use 'deepseek'.")

    @property
    def tile_size(self) -> int:
        return self.candidate_resolutions[0][0]

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of a tile, `ceil(patches / downsample_ratio)`: 14 in released models."""
        return -(-(self.tile_size // self.patch_size) // self.downsample_ratio)


@dataclass(frozen=True)
class VL2Config(_HfDataclass):
    """The whole model, `config.json`."""

    vision_config: VisionConfig = VisionConfig()
    projector_config: ProjectorConfig = ProjectorConfig()
    language_config: LanguageConfig = LanguageConfig()
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    torch_dtype: str = "bfloat16"
    source: dict[str, Any] = _source()

    def __post_init__(self) -> None:
        _validate(self)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Self:
        """From the contents of an official `config.json`.

        Raises:
          ConfigError: a value that the model cannot have, naming it and what is accepted.
        """
        sections = {"vision_config": VisionConfig, "projector_config": ProjectorConfig}
        for name in (*sections, "language_config"):
            if not isinstance(data.get(name), Mapping):
                raise ConfigError(
                    f"config.json has no {name!r} section, so it is not a DeepSeek-VL2 configuration "
                    f"(model_type {data.get('model_type')!r}); expected model_type 'deepseek_vl_v2'."
                )
        values: dict[str, Any] = {name: section.from_hf(data[name]) for name, section in sections.items()}
        values["language_config"] = _language_from_hf(data["language_config"])
        for name in ("candidate_resolutions", "tile_tag", "global_view_pos", "torch_dtype"):
            if name in data:
                values[name] = _freeze(data[name])
        # The sections keep their own source; here only their place among the keys is remembered.
        source = {key: None if key in values and key.endswith("_config") else value for key, value in data.items()}
        return cls(**values, source=copy.deepcopy(source))

    def to_hf(self) -> dict[str, Any]:
        data = super().to_hf()
        for name in ("vision_config", "projector_config", "language_config"):
            data[name] = getattr(self, name).to_hf()
        order = [*self.source, *(key for key in data if key not in self.source)]
        return {key: data[key] for key in order}

    @classmethod
    def preset(cls, name: str) -> Self:
        """A named size: vl2-tiny, vl2-small or vl2-base (`configs/models/`)."""
        return cls.from_hf(read_preset(name)["model"])

    @cached_property
    def tokens_per_tile(self) -> int:
        """Visual tokens the projector makes of one tile (SPEC 3.1)."""
        projector, grid = self.projector_config, self.vision_config.grid
        if projector.token_pooling:
            return (grid // 2) ** 2
        if projector.projector_type == "downsample_mlp_gelu":
            return (-(-grid // projector.downsample_ratio)) ** 2
        return grid**2


def read_config(directory: str | Path) -> VL2Config:
    return VL2Config.from_hf(read_json(path_of(directory) / CONFIG_FILE))


def read_processor_config(directory: str | Path) -> ProcessorConfig:
    return ProcessorConfig.from_hf(read_json(path_of(directory) / PROCESSOR_FILE))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConfigError: there is no such file, or it does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the directory of a downloaded or converted model.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download or convert the model again.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, expected an object.")
    return data


def preset_names() -> list[str]:
    return sorted(path.stem for path in (configs_directory() / "models").glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The tables `model`, `processor` and `tokens` of a preset; the string "null" stands for JSON's null."""
    path = configs_directory() / "models" / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"there is no model preset {name!r}; choose one of {', '.join(preset_names())}.")
    return _nulls(tomllib.loads(path.read_text(encoding="utf-8")))


def configs_directory() -> Path:
    installed = Path(__file__).parent / "_configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def _nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulls(item) for key, item in value.items()}
    return None if value == "null" else value


def _language_from_hf(data: Mapping[str, Any]) -> LanguageConfig:
    scaling = data.get("rope_scaling")
    config = LanguageConfig.from_hf({key: value for key, value in data.items() if key != "rope_scaling"})
    if scaling is None:
        return config.replace(source=copy.deepcopy(dict(data)))
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    if "type" not in scaling or set(scaling) - known:
        raise ConfigError(f"rope_scaling {scaling} is not understood; its keys are {', '.join(sorted(known))}.")
    return config.replace(rope_scaling=RopeScaling(**scaling), source=copy.deepcopy(dict(data)))


def _freeze(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, dict) and "type" in value:
        return RopeScaling(**value)
    return value


def _thaw(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return dataclasses.asdict(value) if isinstance(value, RopeScaling) else value


def _default(f: dataclasses.Field) -> Any:
    return f.default


def _validate(config: VL2Config) -> None:
    vision, projector, language = config.vision_config, config.projector_config, config.language_config

    def one_of(name: str, value: Any, choices: tuple) -> None:
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}.")

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(message)

    # "1D" exists in the official code but cannot run there (SPEC 3.4).
    one_of("tile_tag", config.tile_tag, ("2D",))
    one_of("projector_type", projector.projector_type, ("identity", "linear", "mlp_gelu", "downsample_mlp_gelu"))
    one_of("topk_method", language.topk_method, ("greedy", "group_limited_greedy", "noaux_tc"))
    one_of("scoring_func", language.scoring_func, ("softmax", "sigmoid"))
    one_of("hidden_act", language.hidden_act, ("silu",))
    one_of("torch_dtype", config.torch_dtype, ("bfloat16", "float32", "float16"))
    if language.rope_scaling is not None:
        one_of("rope_scaling type", language.rope_scaling.type, ("linear", "dynamic", "yarn"))
    require(not language.attention_bias, "attention_bias true is not supported; released models have none.")
    require(not language.tie_word_embeddings, "language tie_word_embeddings true is not supported.")
    require(
        vision.width % vision.heads == 0,
        f"vision width {vision.width} does not divide into {vision.heads} heads.",
    )
    require(
        not (projector.token_pooling and projector.projector_type == "downsample_mlp_gelu"),
        "token_pooling cannot be combined with projector_type 'downsample_mlp_gelu' (their widths differ).",
    )
    require(
        projector.input_dim == vision.width,
        f"projector input_dim {projector.input_dim} differs from the vision width {vision.width}.",
    )
    require(
        projector.n_embed == language.hidden_size or projector.projector_type == "identity",
        f"projector n_embed {projector.n_embed} differs from the language hidden_size {language.hidden_size}.",
    )
    require(language.rope_dim % 2 == 0, f"the rotated width {language.rope_dim} of a head must be even.")
    if not language.use_mla:
        require(
            language.num_key_value_heads == language.num_attention_heads,
            f"num_key_value_heads {language.num_key_value_heads} differs from num_attention_heads "
            f"{language.num_attention_heads}; grouped queries do not occur in DeepSeek-VL2.",
        )
    if language.n_routed_experts is not None:
        experts, groups = language.n_routed_experts, language.n_group or 1
        k = language.num_experts_per_tok
        require(k is not None and 0 < k <= experts, f"num_experts_per_tok {k} must be between 1 and {experts}.")
        require(experts % groups == 0, f"{experts} experts do not divide into n_group {groups}.")
        if language.topk_method == "noaux_tc":
            require(experts // groups >= 2, f"noaux_tc needs 2 experts a group, got {experts} in {groups} groups.")
        if language.topk_method != "greedy":
            require(language.topk_group is not None, f"topk_method {language.topk_method!r} needs topk_group.")
