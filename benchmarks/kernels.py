"""What the TPU compiler makes of every kernel, on a machine without a TPU: a row a kernel, chip, size and tokens.

    make tpu                                                     # once: an environment with the compiler
    .venv-tpu/bin/python benchmarks/kernels.py [--targets v5e v6e] [--sizes small] [--tokens 64 4096]
    .venv-tpu/bin/python benchmarks/kernels.py --kernels latent_attention multi_head_attention --tokens 8 32
    .venv-tpu/bin/python benchmarks/kernels.py --weights int8 int4 --sizes small --tokens 8 4096     # of experts alone

    VMEM       vector memory the kernel asks for, by construction
    HBM        bytes it moves if every expert is hit and every cache of 4096 rows full, by construction; decode
               attention has as many sequences as tokens
    hot loop   instruction bundles of the loop with most matrix work, and the cycles its busiest MXU needs for that work
    spills     vector registers that this loop stores and loads for want of room
    compile    seconds for the whole program, dispatch included, and for writing the schedule out (most of them)

Bundles and spills are read from the compiler's final schedule. Nothing here was run on a chip.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

DUMP = tempfile.mkdtemp(prefix="bundles-")
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from tests.tpu.compiling import (
    LATENT_HEADS,
    SIZES,
    TARGETS,
    TOP_K,
    compile_for,
    expert_shapes,
    latent_shapes,
    multi_head_shapes,
    one_chip,
)
from vl2_jax.ops.chips import CHIPS, Chip
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.backward import backward
from vl2_jax.ops.expert_ffn.backward_rows import BackwardScratch
from vl2_jax.ops.expert_ffn.stored import stored_as
from vl2_jax.ops.expert_ffn.tiling import Scratch, choose_tiling
from vl2_jax.ops.grouped_matmul import pallas_tpu as grouped
from vl2_jax.ops.grouped_matmul.api import grouped_matmul, grouped_transposed_matmul
from vl2_jax.ops.latent_attention import pallas_tpu as latent
from vl2_jax.ops.latent_attention.api import latent_attention
from vl2_jax.ops.multi_head_attention import pallas_tpu as heads
from vl2_jax.ops.multi_head_attention.api import multi_head_attention

CONTEXT = 4096  # rows of a cache
CYCLES_A_VMATMUL = {"v5e": 16, "v5p": 16, "v6e": 8, "tpu7x": 8}  # of one MXU, for 16 packed rows of bfloat16
_REGION = re.compile(r"\b(LB|LH|PB|PF|LE|CT):")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s.*:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256, 512, 4096])
    parser.add_argument("--kernels", nargs="+", help="only those whose names begin so", default=[""])
    parser.add_argument("--weights", nargs="+", choices=("int8", "int4"), help="experts whose weights are quantised")
    options = parser.parse_args()
    columns = "tokens  calls  VMEM MB   HBM MB  hot loop  MXU needs  spills  compile s"
    print(f"{'kernel':25} {'chip':6} {'size':6} {columns}")
    for target in options.targets:
        for size in options.sizes:
            for tokens in options.tokens:
                narrow = [experts(target, size, tokens, kind) for kind in options.weights or ()]
                for name, function, shapes, facts in narrow or cases(target, size, tokens):
                    if not name.startswith(tuple(options.kernels)):
                        continue
                    begun = time.perf_counter()
                    compile_for(target, function, *shapes)
                    seconds = time.perf_counter() - begun
                    bundles, ideal, spills = hot_loop(CYCLES_A_VMATMUL[target])
                    calls, vmem, hbm = facts
                    print(
                        f"{name:25} {target:6} {size:6} {tokens:6} {calls:6} {vmem / 1e6:8.1f} {hbm / 1e6:8.1f}"
                        f" {bundles:9} {ideal:10} {spills:7} {seconds:10.1f}",
                        flush=True,
                    )


def cases(target: str, size: str, tokens: int):
    """(name, function, argument shapes, (calls, VMEM bytes, HBM bytes))."""
    yield experts(target, size, tokens)
    (width, hidden, count), chip = SIZES[size], chip_of(target)
    weights = 3 * count * width * hidden * 2
    if tokens <= 64:
        yield decode_attention(chip, size, tokens)
    if tokens < 256:
        return  # gradients are of many tokens
    tiling = choose_tiling(chip, tokens, width, hidden, count, TOP_K, BackwardScratch)
    assert tiling is not None
    calls, rows = -(-tokens // tiling.chunk), tokens * TOP_K
    moved = weights * (calls + 1) + 2 * rows * 2 * (2 * width + 3 * hidden) + 3 * tokens * width * 2
    shapes = expert_shapes(size, tokens)
    facts = (calls + 1, BackwardScratch(tiling, width, hidden).bytes, moved)
    yield "backward", backward, [*shapes, shapes[0]], facts
    shape = jax.ShapeDtypeStruct
    sizes, lhs = shape((count,), jnp.int32), shape((rows, width), jnp.bfloat16)
    plan = grouped.blocks_of_product(rows, count, width, hidden)
    moved = 2 * (hidden // plan.columns * rows * width + count * width * hidden + rows * hidden)
    rhs = shape((count, width, hidden), jnp.bfloat16)
    yield "grouped_matmul", grouped_matmul, [lhs, rhs, sizes], (1, plan.vmem, moved)
    plan = grouped.blocks_of_transposed(rows, count, width, hidden)
    moved = 2 * (hidden // plan.columns * rows * width + width // plan.depth * rows * hidden + count * width * hidden)
    other = shape((rows, hidden), jnp.bfloat16)
    yield "grouped_transposed_matmul", grouped_transposed_matmul, [lhs, other, sizes], (1, plan.vmem, moved)


def experts(target: str, size: str, tokens: int, kind: str | None = None):
    """A case of one layer's experts, quantised ones if `kind` is one."""
    (width, hidden, count), shapes = SIZES[size], expert_shapes(size, tokens, kind)
    stored = stored_as(shapes[1:4])
    assert stored is not None
    scratch = partial(Scratch, stored=stored)
    tiling = choose_tiling(chip_of(target), tokens, width, hidden, count, TOP_K, scratch)
    assert tiling is not None
    calls = -(-tokens // tiling.chunk)
    weights = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(shapes[1:4]))
    moved = weights // count * min(count, tokens * TOP_K) * calls + 2 * tokens * width * 2 + 8 * tokens * TOP_K
    name = f"expert_ffn {kind}" if kind else "expert_ffn"
    return name, expert_ffn, shapes, (calls, scratch(tiling, width, hidden).bytes, moved)


def chip_of(target: str) -> Chip:
    return CHIPS[one_chip(target).devices.flat[0].device_kind]


def decode_attention(chip: Chip, size: str, batch: int):
    """A case of one layer's attention to full caches."""
    if size in LATENT_HEADS:
        name, function, shapes = "latent_attention", latent_attention, latent_shapes(size, batch, CONTEXT)
        vmem = latent.vector_memory(shapes[0].shape, shapes[4], latent.choose_plan(chip))
    else:
        name, function, shapes = "multi_head_attention", multi_head_attention, multi_head_shapes(batch, CONTEXT)
        vmem = heads.vector_memory(shapes[0].shape, shapes[3], heads.choose_plan(chip, shapes[0].shape[2]))
    moved = 2 * (shapes[0].size + sum(array.size for array in jax.tree.leaves(shapes[:-2])))  # results are as queries
    return name, partial(function, scale=0.1), shapes, (1, vmem, moved)


def hot_loop(cycles_a_vmatmul: int) -> tuple[int, int, int]:
    """(bundles, cycles of the busiest MXU, vector spills) of the loop with most matrix work; empties the dump."""
    best = (0, 0, 0)
    for path in Path(DUMP).glob("*"):
        if path.name.endswith("-final_bundles.txt"):
            for region in _REGION.split(path.read_text(errors="replace")):
                work = [region.count(f"mxu{number}") for number in range(4)]
                vmatmuls = [len(re.findall(rf"= vmatmul[\w.]*mxu{number}", region)) for number in range(4)]
                ideal = max(vmatmuls) * cycles_a_vmatmul
                if sum(work) and ideal > best[1]:
                    bundles = sum(bool(_BUNDLE.match(line)) for line in region.splitlines()[1:]) + 1
                    best = (bundles, ideal, len(re.findall(r"(?:vld|vst) \[vmem:\[#\w+_spill", region)))
        path.unlink(missing_ok=True)
    return best


if __name__ == "__main__":
    main()
