"""What users never see unless it fails: killed runs and damaged files, by the hundred. `make test-slow` runs it."""

import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest

import vl2_jax
from convert.checkpoint import MANIFEST_FILE, is_converted, read_pieces
from convert.from_torch import checked_entries, convert
from convert.from_torch import read_pieces as read_released
from convert.to_torch import export
from convert.weight_map import plan
from tests.conftest import GOLDENS
from vl2_jax.config import read_config
from vl2_jax.errors import VL2Error

pytestmark = pytest.mark.slow

SOURCE = GOLDENS / "nano-base"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts")
    convert(SOURCE, directory / "converted")
    export(directory / "converted", directory / "exported")
    return {"converted": directory / "converted", "exported": directory / "exported"}


def read_everything(directory: Path) -> None:
    """Every byte of a model, verified; what `vl2_jax.load` does before it puts arrays on a device."""
    leaves = plan(read_config(directory))
    if is_converted(directory):
        pieces = read_pieces(directory, leaves, True, lambda *_: None)
    else:
        pieces = read_released(directory, leaves, checked_entries(directory, leaves), None, True, lambda *_: None)
    for _ in pieces:
        pass


@pytest.mark.parametrize("step", ["convert", "export"])
def test_fifty_kills_leave_nothing_that_loads_wrongly(layouts, tmp_path, step):
    """A child is killed after a random part of the time that a whole run takes; what it leaves is absent or whole."""
    run, source = {"convert": (convert, SOURCE), "export": (export, layouts["converted"])}[step]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["orbax.checkpoint.v1", "convert.from_torch", "convert.to_torch", __name__])
    rng = random.Random(step)

    def start(destination):
        child = context.Process(target=run, args=(source, destination), daemon=True)
        child.start()
        return child

    begun = time.perf_counter()
    start(tmp_path / "first").join()
    begun = time.perf_counter()
    start(tmp_path / "timed").join()
    whole = time.perf_counter() - begun
    read_everything(tmp_path / "timed")

    cut_short = 0
    for number in range(50):
        destination = tmp_path / f"{number}"
        child = start(destination)
        time.sleep(rng.uniform(0, 1.1) * whole)
        child.kill()
        child.join()
        if destination.exists():
            read_everything(destination)
        else:
            cut_short += 1
            if number % 10 == 0:
                run(source, destination)  # over whatever the killed run left
                read_everything(destination)
    assert cut_short > 10


@pytest.mark.parametrize("kind", ["bit flip", "zeroed block", "truncation", "deletion"])
@pytest.mark.parametrize("layout", ["converted", "exported"])
def test_sixty_three_corruptions_are_noticed_and_named(layouts, tmp_path, layout, kind):
    """504 in all. Big files are hit as often as small ones, so that weights are met as well as text."""
    victim = tmp_path / "victim"
    shutil.copytree(layouts[layout], victim)
    rng = random.Random(f"{layout} {kind}")
    files = sorted(path for path in victim.rglob("*") if path.is_file() and path.stat().st_size)
    if (layout, kind) == ("exported", "deletion"):  # without a manifest it is a released directory like any other
        files.remove(victim / MANIFEST_FILE)
    for _ in range(63):
        path = rng.choice(files)
        saved = path.read_bytes()
        damaged = corrupted(saved, kind, rng)
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(VL2Error) as caught:
            read_everything(victim)
        message = str(caught.value)
        parameter = path.parent.name.replace(".", "/")
        is_weights = path.suffix == ".safetensors" and ("vision." in message or "language." in message)
        assert path.name in message or parameter in message or path.name == MANIFEST_FILE or is_weights, (path, message)
        path.write_bytes(saved)
    read_everything(victim)
    vl2_jax.load(victim)


def corrupted(data: bytes, kind: str, rng: random.Random) -> bytes | None:
    """`data` with one damage; never equal to it. None is a file that is gone."""
    place = rng.randrange(len(data))
    if kind == "deletion":
        return None
    if kind == "truncation":
        return data[:place]
    changed = bytearray(data)
    if kind == "bit flip":
        changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed)
    block = changed[place : place + 64]
    changed[place : place + len(block)] = bytes(0 if byte else 255 for byte in block)
    return bytes(changed)
