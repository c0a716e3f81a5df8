"""What a training run is: a TOML file read into frozen dataclasses, one a table (`configs/training/`).

recipe = read_recipe("configs/training/sft-nano.toml", ["optimizer.learning_rate=1e-4"])
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from vl2_jax.config import WEIGHT_KINDS, configs_directory
from vl2_jax.errors import ConfigError, shown
from vl2_jax.files import local_source
from vl2_jax.scenes import SceneSizes

_PLACE = Path("configs/training")  # of the recipes, in the project
_QUOTES = "'\""
_SEED = (0, 2**32)  # what the shuffling of data takes


def _check(table: str, values: Any, **ranges: float | tuple[float, float]) -> None:
    """Raises ConfigError for a number below the least that makes sense, or not below a bound, or that is none."""
    for name, allowed in ranges.items():
        value = getattr(values, name)
        lowest, bound = allowed if isinstance(allowed, tuple) else (allowed, math.inf)
        if value is not None and not lowest <= value < bound:
            below = "" if bound == math.inf else f" and below {bound:,}"
            raise ConfigError(f"{table}.{name} is {shown(value)}; expected at least {lowest}{below}.")


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Attributes:
      path: directory or hub id of a model to go on from; or
      preset: name of a size, whose weights are drawn at random.
      tokenizer: directory with the tokenizer and processor files of a preset.
      adapters: directory of adapters in PEFT's layout, made for the model of `path`, to go on from; where `lora.rank`
        is 0, they are merged first.
      dtype: of computation; param_dtype: of the weights that are trained.
      weights: "int8" or "int4" keeps the decoder's matrices in so many bits, beside adapters (`convert.quantise`);
        `None` is what the model of `path` holds.
      seed: of random weights.
      remat: compute layers again for gradients instead of keeping what is inside of them.
      scan: compile alike layers once, as a loop.
    """

    path: str | None = None
    preset: str | None = None
    tokenizer: str | None = None
    adapters: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    weights: str | None = None
    seed: int = 0
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        _check("model", self, seed=_SEED)
        if self.adapters is not None and self.path is None:
            raise ConfigError("model.adapters needs model.path, the model that they were made for.")
        if self.weights not in (None, *WEIGHT_KINDS):
            raise ConfigError(f"model.weights is {shown(self.weights)}; expected {' or '.join(WEIGHT_KINDS)}.")
        if self.weights is not None and self.path is None:
            raise ConfigError("model.weights needs model.path, a model that has learned something to round.")


@dataclass(frozen=True)
class SourceRecipe:
    """One set of conversations.

    Attributes:
      path: a file of records: JSON lines, a JSON list, Parquet, Arrow, CSV (see `training.sources`); or
      scenes: seed of drawn scenes (see `vl2_jax.scenes`).
      weight: how often it is drawn from, relative to the others.
      images: folder in which relative paths of pictures begin; `None` is that of the file.
      last_answer_only: of each conversation, only the last answer is learned.
      apart: every question is asked by itself about the pictures of its conversation, which are computed once: no
        answer can be copied from one before it.
      sizes: of scenes.
    """

    path: str | None = None
    scenes: int | None = None
    weight: float = 1.0
    images: str | None = None
    last_answer_only: bool = False
    apart: bool = False
    sizes: SceneSizes = SceneSizes()

    def __post_init__(self) -> None:
        _check("a data source", self, scenes=0)
        if self.path is not None:
            local_source(self.path, "training data")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight of a data source is {self.weight}; expected a number above 0.")
        if self.images is not None and self.path is None:
            raise ConfigError("images of a data source is the folder of a path's pictures; scenes are drawn.")


@dataclass(frozen=True)
class DataRecipe:
    """How conversations become batches.

    Attributes:
      sources: what is drawn from.
      sequence_length: positions of a packed row.
      rows: packed rows a step, over all devices.
      tiles: most tiles a step, over all devices.
      seed: of the order.
      epochs: passes over files after which a run ends; each holds every record once, whatever the weights. `None` goes
        on until `loop.steps`. Scenes have no end: beside them the first file to end, drawn by weight, ends the data.
      workers: processes that read and cut pictures.
      on_bad_sample: "skip" counts and reports it, "raise" ends the run.
      learn_prompts: questions are targets too, and not answers alone.
    """

    sources: tuple[SourceRecipe, ...] = ()
    sequence_length: int = 4096
    rows: int = 8
    tiles: int = 64
    seed: int = 0
    epochs: int | None = None
    workers: int = 1
    on_bad_sample: str = "skip"
    learn_prompts: bool = False

    def __post_init__(self) -> None:
        _check("data", self, sequence_length=2, rows=1, tiles=0, seed=_SEED, epochs=1, workers=0)


@dataclass(frozen=True)
class ObjectiveRecipe:
    """What is minimised.

    Attributes:
      balance_loss: weight of the routers' balance loss; `None` takes the model's `aux_loss_alpha`.
      bias_step: step of the correction bias of `noaux_tc` routers (SPEC 8.2), 0 leaves it; adapters leave it too.
      count_padding: let padding count in the balance loss, as the released code does.
      loss_chunk: positions of a device, over all of its rows, whose logits are held at a time.
    """

    balance_loss: float | None = None
    bias_step: float = 0.0
    count_padding: bool = False
    loss_chunk: int = 512

    def __post_init__(self) -> None:
        _check("objective", self, balance_loss=0, bias_step=0, loss_chunk=1)


@dataclass(frozen=True)
class OptimizerRecipe:
    """How parameters move, and when (SPEC 8.2).

    Attributes:
      kind: "adamw", or "muon" for matrices of hidden layers and AdamW for the rest.
      schedule: "cosine" to `final_share` of the rate, "step" (1/sqrt(10) at 50 % and again at 75 %), "constant", or
        "warmup_stable_decay" (constant, then linear to `final_share` over the last `decay_share` of the steps).
      warmup: steps of linear warm-up.
      vision_multiplier: of the learning rate in the vision tower.
      frozen: parts that stay as they are, and get no adapters: patterns of parameter paths, such as "language/*".
      state_dtype: of both moments.
      accumulate: batches whose gradients are summed for one update.
    """

    kind: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    final_share: float = 0.1
    decay_share: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    vision_multiplier: float = 1.0
    frozen: tuple[str, ...] = ()
    state_dtype: str = "float32"
    accumulate: int = 1

    def __post_init__(self) -> None:
        _check(
            "optimizer", self, learning_rate=0, warmup=0, final_share=0, decay_share=0, epsilon=0, weight_decay=0,
            clip=0, vision_multiplier=0, accumulate=1, beta1=(0, 1), beta2=(0, 1),
        )  # fmt: skip
        if not self.clip:
            raise ConfigError("optimizer.clip is 0, which leaves no gradient; a large number clips none.")
        if self.state_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"optimizer.state_dtype is {shown(self.state_dtype)}; expected float32 or bfloat16.")


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters instead of the parameters themselves (`training.lora`).

    Attributes:
      rank: 0 trains the parameters.
      alpha: updates are scaled by alpha / rank.
      targets: patterns of the parameters that get one: any linear layer, those of all experts included.
      whole: patterns of parameters that are trained themselves beside the adapters, such as "projector/*".
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("language/layers_*/self_attn/*_proj*",)
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("lora", self, rank=0, alpha=0)
        if self.rank and not self.targets:
            raise ConfigError("lora.targets is empty, which leaves nothing to train.")
        if self.whole and not self.rank:
            raise ConfigError("lora.whole is for training beside adapters; without lora.rank, use optimizer.frozen.")


@dataclass(frozen=True)
class LoopRecipe:
    """When things happen, in steps.

    Attributes:
      steps: after which a run ends; `None` leaves it to `data.epochs`. With both, what comes first ends it.
      log_every, checkpoint_every: 0 is never.
      keep: checkpoints that are kept, the newest.
      keep_best: keep the one with the lowest loss of `[evaluation]` too.
      profile_from, profile_steps: the steps that jax's profiler records, into OUT/profile; 0 steps are none.
    """

    steps: int | None = None
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3
    keep_best: bool = False
    profile_from: int = 10
    profile_steps: int = 0

    def __post_init__(self) -> None:
        _check("loop", self, steps=1, log_every=0, checkpoint_every=0, keep=1, profile_from=0, profile_steps=0)


@dataclass(frozen=True)
class EvaluationRecipe:
    """What a model in training is asked that it does not learn from.

    Attributes:
      sources: of conversations; none is no evaluation.
      every: steps; also after the last one.
      batches: packed batches, of the size that training has, whose loss is taken.
      samples: questions that are asked, the first of as many conversations; answers go to OUT/samples with pictures.
      max_tokens: of an answer.
    """

    sources: tuple[SourceRecipe, ...] = ()
    every: int = 500
    batches: int = 8
    samples: int = 0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        _check("evaluation", self, every=0, batches=1, samples=0, max_tokens=1)


@dataclass(frozen=True)
class Recipe:
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    lora: LoraRecipe = LoraRecipe()
    loop: LoopRecipe = LoopRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    def __post_init__(self) -> None:
        if self.loop.keep_best and not self.evaluation.sources:
            raise ConfigError("loop.keep_best needs evaluation.sources, by whose loss the best is known.")
        if self.model.weights is not None and not self.lora.rank:
            raise ConfigError(
                f"model.weights is {shown(self.model.weights)}, which gradients cannot change; train adapters "
                "(lora.rank), or all weights as floats, without model.weights."
            )

    @property
    def holds_states(self) -> bool:
        """Whether the parameters themselves have optimiser states, by which the default mesh is chosen."""
        return not self.lora.rank


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, with `table.key=value` changes laid over it; `table.key=` takes back what the file says.

    `extends = "other.toml"`, at its head, names a recipe beside it that it changes. Those of the project are found by
    name too, such as "lora-tiny", wherever one is.

    Raises:
      ConfigError: no such file, not TOML, an unknown key, or a value of another kind.
    """
    data = _read_tables(_find(Path(path)), [])
    for change in changes:
        _lay_over(data, change)
    return build_recipe(data)


def build_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe from its tables.

    Raises:
      ConfigError: see `read_recipe`.
    """
    return _build(Recipe, data, "")


def _find(path: Path, beside: Path = Path()) -> Path:
    """A file, or one of the project's by its name alone or its place in the project."""
    ours = configs_directory() / "training"
    by_name = (ours / path.name, ours / f"{path.name}.toml") if path.parent in (Path(), _PLACE) else ()
    return next((p for p in (beside / path, *by_name) if _is_file(p)), beside / path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_tables(path: Path, extended: list[Path]) -> dict[str, Any]:
    if not _is_file(path):
        known = ", ".join(sorted(file.stem for file in (configs_directory() / "training").glob("*.toml")))
        raise ConfigError(f"there is no recipe {shown(str(path), 150)}; give a TOML file or one of {known}.")
    if path.resolve() in extended:
        raise ConfigError(f"{path} extends itself.")
    try:
        data = _parsed(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not valid TOML: {shown(str(error))}.") from None
    base = data.pop("extends", None)
    if base is None:
        return data
    tables = _read_tables(_find(Path(str(base)), path.parent), [*extended, path.resolve()])
    for name, table in data.items():
        old = tables.get(name)
        tables[name] = old | table if isinstance(old, dict) and isinstance(table, dict) else table
    return tables


def _parsed(text: str) -> dict[str, Any]:
    """Raises ValueError for what is not TOML, or nested or long beyond what any recipe is."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _lay_over(data: dict[str, Any], change: str) -> None:
    path, separator, text = change.partition("=")
    if not separator or not path.strip():
        raise ConfigError(f"--set {shown(change)}: expected table.key=value, such as optimizer.learning_rate=1e-4.")
    try:
        value = _parsed(f"value = {text}")["value"] if text.strip() else None
    except ValueError:
        value = text  # a bare word is a string
    *tables, key = path.strip().split(".")
    node = data
    for table in tables:
        node = node.setdefault(table, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"--set {shown(change)}: {shown(table).strip(_QUOTES)} is no table; expected table.key=value."
            )
    node[key] = value


def _build(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in data.items():
        if key not in names:
            close = difflib.get_close_matches(str(key)[:80], names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}."
            raise ConfigError(f"unknown key {where}{shown(key).strip(_QUOTES)}; {hint}")
        if value is None:  # of a stored recipe, or taken back; TOML has no such value
            continue
        values[key] = _value(hints[key], value, f"{where}{key}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {shown(value)}.")
        return _build(hint, value, f"{where}.")
    text = str(hint)
    if text.startswith("tuple"):
        (inner, _) = hint.__args__
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {shown(value)}.")
        return tuple(_value(inner, item, where) for item in value)
    accepted = list(getattr(hint, "__args__", (hint,)))
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} is {shown(value)}; expected a number of at most 18 digits.")
    if float in accepted and type(value) is int:
        return float(value)
    if not any(type(value) is kind for kind in accepted):
        names = " or ".join(kind.__name__ for kind in accepted if kind is not type(None))
        raise ConfigError(f"{where} is {shown(value)}; expected {names}.")
    return value
