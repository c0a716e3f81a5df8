"""Configuration: what a DeepSeek-VL2 model is, read from and written to the official JSON files.

Field names and defaults are those of the official configuration classes (SPEC 1.1), so that a key which a released
`config.json` leaves out means here what it means there.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from vl2_jax import spellings
from vl2_jax.errors import ConfigError, RequestError, shown
from vl2_jax.fields import ReleasedFields, require_positive, source_field
from vl2_jax.files import is_file_on, path_of, why_not_whole

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"  # what newer tools write in its place
WeightKind = Literal["int8", "int4"]  # of quantised matrices, see `convert.quantise`
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)


@dataclass(frozen=True)
class VisionConfig(ReleasedFields):
    """The SigLIP tower (SPEC 2). The defaults are the official class's, which describe SigLIP-Large/16."""

    model_name: str = "siglip_large_patch16_384"
    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4
    source: dict[str, Any] = source_field()

    def __post_init__(self) -> None:
        require_positive("vision", self, "image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")

    @classmethod
    def as_released(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return spellings.vision(data)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile; the pixels that do not fill a patch are never seen."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ProjectorConfig(ReleasedFields):
    """From vision features to rows of the language model's embedding (SPEC 3.1)."""

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False
    source: dict[str, Any] = source_field()

    def __post_init__(self) -> None:
        require_positive("projector", self, "input_dim", "n_embed", "depth", "mlp_ratio", "downsample_ratio")


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

    def __post_init__(self) -> None:
        require_positive("rope_scaling", self, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


@dataclass(frozen=True)
class LanguageConfig(ReleasedFields):
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
    source: dict[str, Any] = source_field()
    ALSO: ClassVar[Mapping[str, str]] = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}

    def __post_init__(self) -> None:
        latent = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim") if self.use_mla else ()
        low_rank = ("q_lora_rank",) if self.use_mla and self.q_lora_rank is not None else ()
        experts = ("n_routed_experts", "num_experts_per_tok") if self.n_routed_experts is not None else ()
        groups = [name for name in ("n_group", "topk_group") if getattr(self, name) is not None]
        require_positive(
            "language", self, "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "moe_layer_freq",
            "max_position_embeddings", "rms_norm_eps", "rope_theta", *latent, *low_rank, *experts, *groups,
        )  # fmt: skip

    @classmethod
    def as_released(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return spellings.language(data)

    @property
    def head_dim(self) -> int:
        """Width of one query head: all of it is rotated in MHA, the last `qk_rope_head_dim` of it in MLA."""
        if self.use_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.use_mla else self.head_dim

    def checked_context(self, wanted: int | None) -> int:
        """Positions of a prompt and its answer: as many as are wanted, or all that the model has.

        Raises:
          RequestError: the model has fewer.
        """
        most = self.max_position_embeddings
        if wanted is not None and wanted > most:
            raise RequestError(f"--max-model-len is {wanted}; the model's context holds {most}.")
        return wanted or most

    def is_moe_layer(self, layer: int) -> bool:
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )


@dataclass(frozen=True)
class ProcessorConfig(ReleasedFields):
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
    source: dict[str, Any] = source_field()

    def __post_init__(self) -> None:
        sizes = self.candidate_resolutions
        is_list = bool(sizes) and sizes[0][0] == sizes[0][1] and min(map(min, sizes)) > 0
        if not is_list or any(size % sizes[0][0] for pair in sizes for size in pair):
            raise ConfigError(
                f"candidate_resolutions must start with the square tile and hold multiples of it, got "
                f"{shown(sizes)}; the released list starts with (384, 384)."
            )
        if self.sft_format != "deepseek":
            raise ConfigError(f"sft_format {shown(self.sft_format)} is not supported; released models use 'deepseek'.")
        require_positive("processor", self, "patch_size", "downsample_ratio")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ConfigError(
                f"image_mean is {shown(self.image_mean)} and image_std {shown(self.image_std)}; expected three numbers "
                "each, of red, green and blue, and deviations above 0."
            )

    @classmethod
    def as_released(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        return spellings.processor(data)

    @property
    def tile_size(self) -> int:
        return self.candidate_resolutions[0][0]

    @property
    def rasters(self) -> tuple[tuple[int, int], ...]:
        """Tiles (across, down) of each candidate resolution."""
        size = self.tile_size
        return tuple((width // size, height // size) for width, height in self.candidate_resolutions)

    @property
    def token_grid(self) -> int:
        """Visual tokens along one side of a tile, `ceil(patches / downsample_ratio)`: 14 in released models."""
        return -(-(self.tile_size // self.patch_size) // self.downsample_ratio)


@dataclass(frozen=True)
class VL2Config(ReleasedFields):
    """The whole model, `config.json`."""

    vision_config: VisionConfig = VisionConfig()
    projector_config: ProjectorConfig = ProjectorConfig()
    language_config: LanguageConfig = LanguageConfig()
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    torch_dtype: str = "bfloat16"
    source: dict[str, Any] = source_field()
    ALSO: ClassVar[Mapping[str, str]] = {"torch_dtype": "dtype"}

    def __post_init__(self) -> None:
        _validate(self)

    @classmethod
    def as_released(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in ("vision_config", "projector_config", "language_config"):
            if not isinstance(data.get(name), Mapping):
                raise ConfigError(
                    f"config.json has no {name!r} section, so it is not a DeepSeek-VL2 configuration "
                    f"(model_type {shown(data.get('model_type'))}); expected model_type 'deepseek_vl_v2'."
                )
        return spellings.model(data)

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
    """From `processor_config.json`, or from a `preprocessor_config.json` that says as much.

    What the model's own configuration says too is taken from there where the file leaves it out.

    Raises:
      ConfigError: there is neither, or something is missing (named) or cannot be.
    """
    directory = path_of(directory)
    files = [directory / name for name in (PROCESSOR_FILE, PREPROCESSOR_FILE)]
    file = next((path for path in files if is_file_on(path)), None)
    if file is None:
        raise ConfigError(
            why_not_whole(files[0])
            or f"{files[0]} does not exist; it says how pictures are cut into tiles. Copy it from the released model."
        )
    data = spellings.processor(read_json(file))
    required = ["candidate_resolutions", "patch_size", "downsample_ratio"]
    if file.name == PREPROCESSOR_FILE:
        required += ["image_mean", "image_std"]
    if missing := [name for name in required if data.get(name) is None]:
        known = _known_of_model(directory)
        data = {**data, **{name: known[name] for name in missing if known.get(name) is not None}}
    if missing := [name for name in required if data.get(name) is None]:
        raise ConfigError(f"{file} does not say {', '.join(missing)}; copy {PROCESSOR_FILE} from the released model.")
    return ProcessorConfig.from_hf(data)


def _known_of_model(directory: Path) -> dict[str, Any]:
    """What `config.json` says about pictures."""
    if not is_file_on(directory / CONFIG_FILE):
        return {}
    data = read_json(directory / CONFIG_FILE)
    vision, projector = (data.get(name) or {} for name in ("vision_config", "projector_config"))
    if not (isinstance(vision, dict) and isinstance(projector, dict)):
        return {}
    ratio = projector.get("downsample_ratio", ProjectorConfig.downsample_ratio)
    sizes = {"patch_size": vision.get("patch_size"), "downsample_ratio": ratio}
    return sizes | {"candidate_resolutions": data.get("candidate_resolutions")}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConfigError: there is no such file, or it does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            why_not_whole(path) or f"{path} does not exist; give the directory of a downloaded or converted model."
        ) from None
    except NotADirectoryError:
        raise ConfigError(f"{path.parent} is a file; give the directory of a model that holds it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            why_not_whole(path) or f"{path} is not valid JSON ({error}); download or convert the model again."
        ) from None
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


def _validate(config: VL2Config) -> None:
    vision, projector, language = config.vision_config, config.projector_config, config.language_config

    def one_of(name: str, value: Any, choices: tuple) -> None:
        if value not in choices:
            raise ConfigError(f"{name} is {shown(value)}; expected one of {', '.join(map(repr, choices))}.")

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
    require(vision.grid > 0, f"vision patch_size {vision.patch_size} is larger than image_size {vision.image_size}.")
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
            language.hidden_size % language.num_attention_heads == 0,
            f"language hidden_size {language.hidden_size} does not divide into {language.num_attention_heads} heads.",
        )
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
            chosen = language.topk_group
            require(chosen is not None, f"topk_method {language.topk_method!r} needs topk_group.")
            require(chosen is None or chosen <= groups, f"topk_group {chosen} is more than n_group {groups}.")
