"""What a training run is: a TOML file read into frozen dataclasses, one a table (`configs/training/`).

recipe = read_recipe("configs/training/sft-nano.toml", ["optimizer.learning_rate=1e-4"])
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from vl2_jax.errors import ConfigError
from vl2_jax.scenes import SceneSizes


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained.

    Attributes:
      path: directory or hub id of a model to go on from; or
      preset: name of a size, whose weights are drawn at random.
      tokenizer: directory with the tokenizer and processor files of a preset.
      dtype: of computation; param_dtype: of the weights that are trained.
      seed: of random weights.
    """

    path: str | None = None
    preset: str | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class SourceRecipe:
    """One set of conversations.

    Attributes:
      path: a JSONL file, or a JSON file that holds a list (see `training.formats`); or
      scenes: seed of drawn scenes (see `vl2_jax.scenes`).
      weight: how often it is drawn from, relative to the others.
      sizes: of scenes.
    """

    path: str | None = None
    scenes: int | None = None
    weight: float = 1.0
    sizes: SceneSizes = SceneSizes()


@dataclass(frozen=True)
class DataRecipe:
    """How conversations become batches.

    Attributes:
      sources: what is drawn from.
      sequence_length: positions of a packed row.
      rows: packed rows a step, over all devices.
      tiles: most tiles a step, over all devices.
      seed: of the order.
      epochs: passes over finite sources; `None` goes on.
      workers: processes that read and cut pictures.
      on_bad_sample: "skip" counts and reports it, "raise" ends the run.
    """

    sources: tuple[SourceRecipe, ...] = ()
    sequence_length: int = 4096
    rows: int = 8
    tiles: int = 64
    seed: int = 0
    epochs: int | None = None
    workers: int = 1
    on_bad_sample: str = "skip"


@dataclass(frozen=True)
class ObjectiveRecipe:
    """What is minimised.

    Attributes:
      balance_loss: weight of the routers' balance loss; `None` takes the model's `aux_loss_alpha`.
      bias_step: step of the correction bias of `noaux_tc` routers (SPEC 8.2), 0 leaves it.
      count_padding: let padding count in the balance loss, as the released code does.
      loss_chunk: positions whose logits are held at a time.
    """

    balance_loss: float | None = None
    bias_step: float = 0.0
    count_padding: bool = False
    loss_chunk: int = 512


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW and its schedule (SPEC 8.2).

    Attributes:
      schedule: "cosine" to `final_share` of the rate, "step" (1/sqrt(10) at 50 % and again at 75 %), "constant", or
        "warmup_stable_decay" (constant, then linear to `final_share` over the last `decay_share` of the steps).
      warmup: steps of linear warm-up.
      vision_multiplier: of the learning rate in the vision tower.
      frozen: parts that stay as they are: patterns of parameter paths, such as "language/*".
      state_dtype: of both moments.
      accumulate: batches whose gradients are summed for one update.
    """

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


@dataclass(frozen=True)
class LoopRecipe:
    """When things happen, in steps.

    Attributes:
      steps: of the whole run.
      log_every, checkpoint_every: 0 is never.
      keep: checkpoints that are kept.
    """

    steps: int = 1000
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 3


@dataclass(frozen=True)
class Recipe:
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    loop: LoopRecipe = LoopRecipe()


def read_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, with `table.key=value` changes laid over it.

    Raises:
      ConfigError: no such file, not TOML, an unknown key, or a value of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no recipe {str(path)!r}; configs/training/ holds some.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    for change in changes:
        _lay_over(data, change)
    return build_recipe(data)


def build_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe from its tables.

    Raises:
      ConfigError: see `read_recipe`.
    """
    return _build(Recipe, data, "")


def _lay_over(data: dict[str, Any], change: str) -> None:
    path, separator, text = change.partition("=")
    if not separator:
        raise ConfigError(f"--set {change!r}: expected table.key=value, such as optimizer.learning_rate=1e-4.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *tables, key = path.strip().split(".")
    node = data
    for table in tables:
        node = node.setdefault(table, {})
    node[key] = value


def _build(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    values = {}
    for key, value in data.items():
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(names)}."
            raise ConfigError(f"unknown key {where}{key!s}; {hint}")
        if value is None:  # from a stored recipe; TOML has no such value
            continue
        values[key] = _value(hints[key], value, f"{where}{key}")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}.")
        return _build(hint, value, f"{where}.")
    text = str(hint)
    if text.startswith("tuple"):
        (inner, _) = hint.__args__
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        return tuple(_value(inner, item, where) for item in value)
    accepted = list(getattr(hint, "__args__", (hint,)))
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not any(type(value) is kind for kind in accepted):
        names = " or ".join(kind.__name__ for kind in accepted if kind is not type(None))
        raise ConfigError(f"{where} is {value!r}; expected {names}.")
    return value
