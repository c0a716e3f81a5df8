"""The `vl2` command. Text goes to standard output, progress and errors to standard error."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json as json_module
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from vl2_jax.config import preset_names, read_config
from vl2_jax.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    MeshError,
    RequestError,
    VerificationError,
    VL2Error,
)
from vl2_jax.processing.conversation import with_image_tags
from vl2_jax.processing.grounding import draw_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.progress import Display
from vl2_jax.scenes import SceneSizes
from vl2_jax.sharding.devices import Devices

app = tyro.extras.SubcommandApp()
_messages = Console(stderr=True, highlight=False)
_ONE_DEVICE = Devices()
_DevicesFlags = tyro.conf.OmitArgPrefixes[Devices]
_PACKAGES = (  # what `vl2 doctor` looks for: its extra, and what it is for
    ("jax", "", ""), ("jaxlib", "", ""), ("flax", "", ""), ("orbax-checkpoint", "", ""),
    ("libtpu", "tpu", "on a TPU machine, or to plan for one"), ("grain", "train", "to train"),
    ("tensorboardX", "train", "to see training in TensorBoard"), ("matplotlib", "plan", "to draw a plan"),
    ("gcsfs", "gcs", "to read from a bucket"),
)  # fmt: skip


def _in_all_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Runs a command that takes `devices` in every process of a slice; only process 0 writes."""

    @functools.wraps(command)
    def run(*arguments: Any, devices: Devices = _ONE_DEVICE, **options: Any) -> None:
        from vl2_jax.sharding.processes import running_together

        with running_together(devices) as process:
            _messages.quiet = process > 0
            command(*arguments, devices=devices, **options)

    return run


@app.command
@_in_all_processes
def generate(
    model: str,
    prompt: str,
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float | None = None,
    seed: int = 0,
    dtype: str | None = None,
    chunk_size: int = 512,
    save_boxes: Path | None = None,
    json: bool = False,
    ignore_eos: bool = False,
    verify: bool = True,
    adapters: Path | None = None,
    devices: _DevicesFlags = _ONE_DEVICE,
) -> None:
    """Answer one question about pictures.

    Args:
        model: Directory of a released or converted model, or a hub id.
        prompt: The question. `<image>` marks where a picture belongs; by default pictures come first.
        image: A picture; may be given several times.
        max_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: When sampling, the probability that is sampled from.
        top_k: When sampling, the number of tokens that are sampled from; 0 is no limit.
        repetition_penalty: By default 1.1 when sampling, none otherwise.
        seed: Of the sampling.
        dtype: bfloat16 or float32; by default float32 on a CPU that can hold it, else the checkpoint's.
        chunk_size: Prompt positions computed at a time.
        save_boxes: Write the last picture with the answer's boxes drawn on it.
        json: Print one object instead of streaming text: text, token_ids, boxes, timings.
        ignore_eos: Go on to max_tokens.
        verify: Check the weights against their manifest while loading.
        adapters: Directory of low-rank adapters in PEFT's layout, to be merged into the weights.
    """
    # Pictures that cannot be read are reported before minutes are spent on loading weights.
    pictures = [load_image(path) for path in image]
    if save_boxes is not None:
        check_picture_file(save_boxes, pictures)
    vl2, seconds = _load(model, devices, dtype=dtype, chunk_size=chunk_size, verify=verify, adapters=adapters)
    turn = {"role": "user", "content": with_image_tags(prompt, len(image)), "images": list(image)}
    with Display(_messages) as display:
        vl2.generator.report = display
        (answer,) = vl2.generate(
            [turn],
            on_text=None if json else _streaming(display),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            seed=seed,
            ignore_eos=ignore_eos,
        )
    if json:
        timings = dataclasses.asdict(vl2.generator.timings) | {"load_seconds": seconds}
        boxes = [dataclasses.asdict(box) for box in answer.boxes]
        _print_json({"text": answer.text, "token_ids": answer.token_ids, "boxes": boxes, "timings": timings})
    else:
        print()
    if save_boxes is not None and not _messages.quiet:
        draw_boxes(pictures[-1], answer.boxes).save(save_boxes)
        _messages.print(f"{len(answer.boxes)} box(es) drawn on {save_boxes}")


@app.command
def chat(
    model: str,
    dtype: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    adapters: Path | None = None,
    mesh: str | None = None,
) -> None:
    """Talk in the terminal: `/image PATH` adds a picture to the next message, `/new` starts again, `/quit` ends.

    Args:
        model: Directory of a released or converted model, or a hub id.
        dtype: bfloat16 or float32; by default float32 on a CPU that can hold it, else the checkpoint's.
        max_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        seed: Of the sampling.
        adapters: Directory of low-rank adapters in PEFT's layout, to be merged into the weights.
        mesh: Spread the model over this machine's devices: auto, expert, or sizes such as expert=4,tensor=2.
    """
    vl2, _ = _load(model, Devices(mesh), dtype=dtype, adapters=adapters)
    conversation = vl2.chat()
    pictures: list[str] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        try:
            if line == "/quit":
                return
            if line == "/new":
                conversation, pictures = vl2.chat(), []
            elif line.startswith("/image"):
                path = line.removeprefix("/image").strip()
                load_image(path)
                pictures.append(path)
            elif line:
                text = with_image_tags(line, len(pictures))
                options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
                with Display(_messages) as display:
                    vl2.generator.report = display
                    conversation.ask(text, pictures, on_text=_streaming(display), **options)
                pictures = []
                print()
        except VL2Error as error:
            _messages.print(f"[red]{error}[/red]")


@app.command
def convert(
    source: tyro.conf.Positional[str], destination: tyro.conf.Positional[Path], dtype: str | None = None
) -> None:
    """Released Hugging Face directory (or hub id) to a converted checkpoint.

    Args:
        source: Directory with config.json and *.safetensors, or a hub id.
        destination: A directory that does not exist yet.
        dtype: bfloat16 or float32; by default the checkpoint's.
    """
    from convert.from_torch import convert as run
    from vl2_jax.api import find_model

    with Display(_messages) as report:
        run(find_model(source), destination, dtype, report)
    _messages.print(f"converted {source} to {destination}")


@app.command
def export(
    source: tyro.conf.Positional[Path],
    destination: tyro.conf.Positional[Path],
    dtype: str | None = None,
    adapters: bool = False,
) -> None:
    """Converted checkpoint, or a training run, to the released Hugging Face layout.

    Args:
        source: A converted checkpoint, or the folder of a training run, whose newest checkpoint is taken.
        destination: A directory that does not exist yet.
        dtype: Of a training run's weights: bfloat16 or float32; by default that of its configuration.
        adapters: Of a training run with [lora]: the adapters alone, in PEFT's layout.
    """
    if (source / "checkpoints").is_dir():
        step = _training("export").export_run(source, destination, _tell, dtype, adapters)
        _messages.print(f"exported step {step} of {source} to {destination}")
        return
    if dtype is not None or adapters:
        raise CheckpointError("--dtype and --adapters are for training runs; a converted checkpoint stays as it is.")
    from convert.to_torch import export as run

    with Display(_messages) as report:
        run(source, destination, report)
    _messages.print(f"exported {source} to {destination}")


@app.command
@_in_all_processes
def train(
    recipe: tyro.conf.Positional[Path],
    out: Path,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    devices: _DevicesFlags = _ONE_DEVICE,
) -> None:
    """Train a model; run the same command again to go on after an interruption.

    Args:
        recipe: A TOML file, or the name of one of configs/training/, such as lora-tiny.
        out: Folder of the run: checkpoints, logs (TensorBoard too), and the trained model in OUT/model at the end.
        set: Change a value of the recipe: --set optimizer.learning_rate=1e-4.
    """
    import jax

    from vl2_jax.training.recipe import read_recipe

    loop = _training("loop")
    model = out / "model"
    if model.exists() and not (out / loop.RECIPE_FILE).exists():
        raise ConfigError(f"{model} exists and is not of a run in {out}, which writes there; choose another --out.")
    run = loop.train(read_recipe(recipe, set), out, _tell, mesh=devices.mesh)
    if jax.process_count() > 1:
        if run.is_complete:
            _tell(f"vl2 export {out} DIRECTORY makes a model of it")
        return
    if not run.is_complete:
        sys.exit(128 + run.stopped_by)  # as a shell tells of a signal: `vl2 train ... && ...` does not go on
    new = out / "model.new"
    shutil.rmtree(new, ignore_errors=True)
    _training("export").export_run(out, new, _tell)
    shutil.rmtree(model, ignore_errors=True)
    new.rename(model)
    _tell(f"the trained model is in {model}: vl2 generate --model {model} ...")


@app.command(name="eval")
@_in_all_processes
def evaluate(
    model: str,
    count: int = 100,
    seed: int = 1_000_000,
    longest_side: int = SceneSizes.longest_side,
    json: bool = False,
    adapters: Path | None = None,
    devices: _DevicesFlags = _ONE_DEVICE,
) -> None:
    """Ask a model about drawn scenes it has not seen, and print how often it is right.

    Args:
        model: Directory of a model, or a hub id.
        count: Conversations to draw; each holds about six questions, asked one by one.
        seed: Of the scenes.
        longest_side: Of the pictures, in pixels.
        json: Print one object.
        adapters: Directory of low-rank adapters in PEFT's layout, to be merged into the weights.
    """
    from vl2_jax.scenes.evaluation import ask_all, table

    if count < 1:
        raise RequestError(f"--count is {count}; expected at least 1.")
    sizes = SceneSizes(longest_side=longest_side)
    vl2, _ = _load(model, devices, dtype="float32", adapters=adapters)
    with Display(_messages) as report:
        rows = table(ask_all(vl2, count, seed, sizes, report))
    if json:
        _print_json({row.skill: {"questions": row.questions, "score": row.score} for row in rows})
        return
    for row in rows:
        print(f"{row.skill:22} {row.questions:6} questions {100 * row.score:6.1f} %")


@app.command
@_in_all_processes
def verify(
    model: tyro.conf.Positional[str],
    goldens: tyro.conf.Positional[Path],
    json: bool = False,
    devices: _DevicesFlags = _ONE_DEVICE,
) -> None:
    """Compare a model with numbers recorded from the official release; exit 1 past a tolerance.

    Args:
        model: Directory of a released or converted model.
        goldens: A directory with recorded cases in cases/.
        json: Print one object.
    """
    from vl2_jax.verification import verify as run

    vl2, _ = _load(model, devices, dtype="float32")
    largest: dict[str, Any] = {}
    with Display(_messages) as report:
        for check in run(vl2, goldens, report):
            held = largest.get(check.quantity)
            if held is None or not check.error <= held.error:
                largest[check.quantity] = check
    failed = [check for check in largest.values() if not check.passed]
    if json:
        quantities = {name: dataclasses.asdict(c) | {"passed": c.passed} for name, c in largest.items()}
        _print_json({"passed": not failed, "quantities": quantities})
    else:
        for name, check in largest.items():
            mark = "ok    " if check.passed else "FAILED"
            print(f"{mark} {name:60} {check.error:9.2e} of {check.tolerance:.0e}  ({check.case})")
    if failed:
        names = ", ".join(check.quantity for check in failed)
        raise VerificationError(f"{len(failed)} quantities differ from the recorded ones: {names}")


@app.command
def info(model: tyro.conf.Positional[str], json: bool = False) -> None:
    """What a model is: parameters, memory, cache.

    Args:
        model: A model's directory, a hub id, or the name of a size: vl2-tiny, vl2-small, vl2-base.
        json: Print one object.
    """
    from vl2_jax.api import find_model
    from vl2_jax.config import VL2Config

    config = VL2Config.preset(model) if model in preset_names() else read_config(find_model(model))
    facts = describe(config)
    if json:
        _print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):32} {value:,}" if isinstance(value, int) else f"{name:32} {value}")


@app.command
def plan(
    model: str,
    topology: str = "",
    purpose: Annotated[Literal["decode", "prefill", "train"], tyro.conf.arg(name="for")] = "decode",
    batch: int = 32,
    context: int = 4096,
    mesh: str = "auto",
    dispatch: Literal["ring", "ragged"] = "ring",
    recipe: Path | None = None,
    search: bool = False,
    json: bool = False,
    save: Path | None = None,
) -> None:
    """Ask the TPU compiler whether a model fits on a slice, and how fast it can be; no TPU is needed.

    Args:
        model: The name of a size (vl2-tiny, vl2-small, vl2-base), a model's directory or a hub id.
        topology: A slice such as v5e:2x4; with --search kinds such as v5e or v5e,v6e, by default all.
        purpose: One decode step, one prefill chunk of 512 positions, or one training step.
        batch: Sequences, over all devices.
        context: Positions of each: cache slots, or the packed row of a training step.
        mesh: auto, one axis, or sizes such as expert=4,tensor=2.
        dispatch: How tokens reach their experts on other devices: ring or ragged.
        recipe: Of a training step; by default a full fine-tune with AdamW, layers computed again for gradients.
        search: Find the smallest slice that it fits on, and the best mesh there.
        json: Print one object.
        save: Draw memory and time to a picture.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler is wanted, not the chip
    from vl2_jax.api import find_model
    from vl2_jax.config import VL2Config
    from vl2_jax.planning import plan as planning
    from vl2_jax.planning.slices import TOPOLOGIES
    from vl2_jax.training.recipe import read_recipe

    config = VL2Config.preset(model) if model in preset_names() else read_config(find_model(model))
    training = None if recipe is None else read_recipe(recipe)
    if search:
        kinds = [kind.strip() for kind in topology.split(",")] if topology else list(TOPOLOGIES)
        unknown = [kind for kind in kinds if kind not in TOPOLOGIES]
        if unknown:
            raise MeshError(f"there is no kind of TPU {unknown[0]!r}; choose from {', '.join(TOPOLOGIES)}.")
        found = planning.search(model, config, kinds, purpose, batch, context, _tell, training)
    else:
        found = planning.make_plan(model, config, topology, purpose, batch, context, mesh, dispatch, training)
    if save is not None:
        from vl2_jax.planning.picture import draw

        draw(found, save)
    if json:
        _print_json(found.to_json())
    else:
        print(planning.described(found))


@app.command
def doctor() -> None:
    """What this machine has, what is missing, and the line that adds it."""
    import jax

    print(f"{'python':16} {sys.version.split()[0]}")
    for package, extra, purpose in _PACKAGES:
        try:
            print(f"{package:16} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:16} missing; {purpose}: pip install 'vl2-jax[{extra}]'")
    for device in jax.devices():
        print(f"{'device':16} {device.device_kind} ({device.platform}:{device.id})")


def describe(config: Any) -> dict[str, Any]:
    """Counts and sizes of a configuration, from shapes alone."""
    from convert.weight_map import plan

    language = config.language_config
    leaves = plan(config)
    count = {leaf.path: int(np.prod(leaf.shape)) for leaf in leaves}
    total = sum(count.values())
    pooling = sum(n for path, n in count.items() if path.startswith("vision/attn_pool/"))
    idle = 0
    if language.n_routed_experts:
        routed = sum(n for path, n in count.items() if "/experts_" in path)
        idle = routed * (language.n_routed_experts - language.num_experts_per_tok) // language.n_routed_experts
    cache = language.cache_width * language.num_hidden_layers
    return {
        "parameters": total,
        "parameters_without_unused_pooling": total - pooling,
        "parameters_active_per_token": total - pooling - idle - count["language/embed_tokens"],
        "memory_bytes_bfloat16": 2 * total,
        "memory_bytes_float32": 4 * total,
        "cache_bytes_per_token_bfloat16": 2 * cache,
        "context_tokens": language.max_position_embeddings,
        "visual_tokens_per_tile": config.tokens_per_tile,
        "attention": "latent (MLA)" if language.use_mla else "multi-head",
        "router": f"{language.scoring_func}, {language.topk_method}",
    }


def _tell(line: str) -> None:
    _messages.print(line, soft_wrap=True, markup=False)


def _training(part: str) -> Any:
    """A module of the part of the project that needs more packages."""
    try:
        return importlib.import_module(f"vl2_jax.training.{part}")
    except ModuleNotFoundError as error:
        raise VL2Error(f"training needs {error.name!r}: pip install 'vl2-jax[train]'") from None


def _load(model: str, devices: Devices, **options: Any) -> tuple[Any, float]:
    from vl2_jax.api import load

    begun = time.perf_counter()
    with Display(_messages) as report:
        vl2 = load(model, report=report, mesh=devices.mesh, dispatch=devices.dispatch, **options)
    return vl2, time.perf_counter() - begun


def check_picture_file(path: Path, pictures: list[Any]) -> None:
    """Whether boxes can be drawn and written, asked before the work rather than after it.

    Raises:
      ImageError: there is no picture to draw on, no such folder, or no format of that name.
    """
    from PIL import Image

    if not pictures:
        raise ImageError("--save-boxes needs a picture to draw on; give --image.")
    if not path.absolute().parent.is_dir():
        raise ImageError(f"--save-boxes {path}: there is no folder {path.absolute().parent}; create it first.")
    if path.suffix.lower() not in Image.registered_extensions():
        raise ImageError(f"--save-boxes {path}: {path.suffix!r} is not a picture format; use .png or .jpg.")


def _streaming(display: Display) -> Callable[[int, str], None]:
    def show(_: int, text: str) -> None:
        display.close()
        print(text, end="", flush=True)

    return show


def _print_json(value: Any) -> None:
    print(json_module.dumps(value, ensure_ascii=False))


def main(arguments: Annotated[list[str] | None, tyro.conf.Suppress] = None) -> None:
    try:
        app.cli(prog="vl2", description=__doc__, args=arguments)
    except VL2Error as error:
        print(f"vl2: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `vl2 info M | head`: whoever read us has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
