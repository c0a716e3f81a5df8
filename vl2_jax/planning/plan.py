"""A plan: does it fit, what crosses the network, and how fast can it be at best."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vl2_jax.config import VL2Config
from vl2_jax.errors import MeshError
from vl2_jax.planning.collectives import Collective, find_collectives
from vl2_jax.planning.programs import Program, Purpose, build
from vl2_jax.planning.slices import TOPOLOGIES, Slice, find_slice
from vl2_jax.sharding.layout import Dispatch, MeshLayout
from vl2_jax.sharding.mesh import AUTO, make_mesh, parse_mesh, undivided
from vl2_jax.sharding.rules import AXES, DATA, EXPERT, FSDP, TENSOR
from vl2_jax.training.recipe import Recipe

_MESHES_TRIED = 3  # of one slice, in a search


@dataclass(frozen=True)
class Plan:
    """What the compiler says of one program on one slice; times are estimates from public figures of the chip.

    Attributes:
      weights, cache: kinds of them, `None` is bfloat16 or the recipe's.
      fits: the program was compiled within the chip's memory.
      memory: bytes of one device by kind; without the program's own temporaries where it does not fit.
      limit: bytes of one device.
      over: bytes that are missing, 0 where it fits.
      collectives: what crosses the network; what a loop of unknown length does counts once.
      flops: operations of one device.
      model_flops: of training, those that the model needs (`training.flops`).
      peak: operations a second of one device.
      moved: HBM bytes of one device, at least.
      seconds: at best, by what takes them: "arithmetic", "memory", "network".
      compile_seconds: tracing and compiling, here.
    """

    model: str
    topology: str
    mesh: dict[str, int]
    purpose: Purpose
    batch: int
    context: int
    weights: str | None
    cache: str | None
    fits: bool
    memory: dict[str, int]
    limit: int
    over: int
    collectives: list[Collective]
    flops: float
    model_flops: float
    peak: float
    moved: float
    seconds: dict[str, float]
    compile_seconds: float

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda kind: self.seconds[kind])

    @property
    def best_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def best_mfu(self) -> float:
        """Share of the peak that training can reach at most; 0 of other programs."""
        return self.model_flops / (self.peak * self.best_seconds)

    def to_json(self) -> dict[str, Any]:
        collectives = [c._asdict() for c in self.collectives]
        return asdict(self) | {
            "collectives": collectives,
            "bound": self.bound,
            "best_seconds": self.best_seconds,
            "best_mfu": self.best_mfu,
        }


def make_plan(
    model: str,
    config: VL2Config,
    topology: str,
    purpose: Purpose,
    batch: int,
    context: int,
    mesh: str = AUTO,
    dispatch: Dispatch = "ring",
    recipe: Recipe | None = None,
    weights: str | None = None,
    cache: str | None = None,
) -> Plan:
    """Compiles the program for the slice.

    Args:
      weights: see `programs.build`.
      cache: see `programs.build`.

    Raises:
      MeshError: no such slice, no TPU compiler, or a mesh that does not fit; or see `programs.build`.
    """
    if batch < 1 or context < 1:
        raise MeshError(f"batch is {batch} and context {context}; expected at least 1.")
    place = find_slice(topology)
    layout = MeshLayout(make_mesh(mesh, config, place.devices, _holds_states(purpose, recipe)), dispatch)
    program = build(purpose, config, layout, batch, context, recipe, weights, cache)
    begun = time.perf_counter()
    with layout.on_devices():
        lowered = program.lower()
        try:
            compiled, over = lowered.compile(), 0
        except Exception as error:  # the compiler's own type; anything but a lack of memory is a defect
            compiled, over = None, _missing(str(error))
            if not over:
                raise
    seconds = time.perf_counter() - begun
    memory, collectives, flops = dict(program.kinds), [], program.flops
    if compiled is not None:
        analysis = compiled.memory_analysis()
        memory["temporaries"] = int(analysis.temp_size_in_bytes)
        memory["program"] = int(analysis.generated_code_size_in_bytes)
        collectives = find_collectives(compiled.as_text(), layout.mesh)
        if not program.model_flops:
            flops += max(0.0, float((compiled.cost_analysis() or {}).get("flops", 0.0)))
    return Plan(
        model=model,
        topology=topology,
        mesh=dict(layout.mesh.shape),
        purpose=purpose,
        batch=batch,
        context=context,
        weights=weights or (recipe.model.weights if purpose == "train" and recipe else None),
        cache=cache,
        fits=compiled is not None,
        memory={kind: size for kind, size in memory.items() if size},
        limit=int(place.chip.memory),
        over=over,
        collectives=collectives,
        flops=flops,
        model_flops=program.model_flops,
        peak=place.chip.flops,
        moved=program.moved,
        seconds=_seconds(place, program, flops, collectives),
        compile_seconds=seconds,
    )


def described(plan: Plan) -> str:
    """A plan as lines of text."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    narrow = [f", {kind} {what}" for what in ("weights", "cache") if (kind := getattr(plan, what))]
    lines = [
        f"{plan.model} on {plan.topology} ({mesh}): {plan.purpose}, {plan.batch} sequences of {plan.context} positions"
        + "".join(narrow),
        "",
        "memory of one device, from the compiler",
    ]
    lines += [f"  {kind:26} {size / 1e9:9.2f} GB" for kind, size in plan.memory.items()]
    total = sum(plan.memory.values())
    verdict = f"fits, {(plan.limit - total) / 1e9:.2f} GB to spare"
    if total > plan.limit:
        verdict = "fits, because the compiler lays some of these into the same place"
    if not plan.fits:
        verdict = f"DOES NOT FIT, {plan.over / 1e9:.2f} GB too much with its temporaries"
    lines += [f"  {'sum':26} {total / 1e9:9.2f} GB of {plan.limit / 1e9:.2f} GB: {verdict}", ""]
    if plan.collectives:
        lines.append("collectives of one device")
        lines += [
            f"  {c.number:4} x {c.kind:18} {c.size / 1e6:10.3f} MB  along {','.join(c.axes) or 'nothing':20} {c.what}"
            for c in plan.collectives
        ]
        lines.append("")
    lines.append("at best, estimated from public figures of the chip")
    what = {
        "arithmetic": f"{plan.flops / 1e9:.1f} GFLOP",
        "memory": f"{plan.moved / 1e9:.2f} GB of HBM",
        "network": f"{sum(c.wire_bytes for c in plan.collectives) / 1e6:.1f} MB over the network",
    }
    lines += [f"  {kind:26} {seconds * 1e3:9.3f} ms  {what[kind]}" for kind, seconds in plan.seconds.items()]
    if plan.model_flops:
        lines.append(
            f"  {'MFU':26} {100 * plan.best_mfu:9.1f} %   at most: {plan.model_flops / 1e9:.1f} GFLOP are the model's"
        )
    lines += [f"  bound by {plan.bound}", "", f"traced and compiled in {plan.compile_seconds:.0f} s"]
    return "\n".join(lines)


def search(
    model: str,
    config: VL2Config,
    kinds: Sequence[str],
    purpose: Purpose,
    batch: int,
    context: int,
    tell: Callable[[str], None],
    recipe: Recipe | None = None,
    weights: str | None = None,
    cache: str | None = None,
) -> Plan:
    """The smallest slice of these kinds that the program fits on, with the fastest of the meshes that were tried.

    Raises:
      MeshError: it fits on none.
    """
    named = [f"{kind}:{shape}" for kind in kinds for shape in TOPOLOGIES[kind]]
    for topology in sorted(named, key=lambda name: (_chips(name), name)):
        place = find_slice(topology)
        best: Plan | None = None
        for mesh in _meshes(config, place, purpose, batch, context, recipe, weights, cache):
            plan = make_plan(
                model, config, topology, purpose, batch, context, mesh, recipe=recipe, weights=weights, cache=cache
            )
            tell(f"{topology} {mesh}: {'fits' if plan.fits else f'{plan.over / 1e9:.1f} GB too much'}")
            if plan.fits and (best is None or plan.best_seconds < best.best_seconds):
                best = plan
        if best is not None:
            return best
        tell(f"{topology}: does not fit")
    raise MeshError(f"{model} for {purpose} (batch {batch}, context {context}) fits on no slice of {', '.join(kinds)}.")


def _meshes(
    config: VL2Config,
    place: Slice,
    purpose: Purpose,
    batch: int,
    context: int,
    recipe: Recipe | None,
    weights: str | None,
    cache: str | None,
) -> Iterator[str]:
    """A few meshes whose weights and caches alone fit, the default first, then those that hold least."""
    devices, training = len(place.devices), _holds_states(purpose, recipe)
    rest = FSDP if training else DATA
    first = parse_mesh(AUTO, devices, config, training)
    sized = []
    for tensor in (n for n in range(1, devices + 1) if devices % n == 0):
        for expert in (n for n in range(1, devices // tensor + 1) if devices // tensor % n == 0):
            sizes = dict.fromkeys(AXES, 1) | {EXPERT: expert, TENSOR: tensor}
            sizes[rest] = devices // tensor // expert
            if undivided(sizes, config):
                continue
            layout = MeshLayout(make_mesh(_written(sizes), config, place.devices, training))
            held = sum(build(purpose, config, layout, batch, context, recipe, weights, cache).kinds.values())
            if held < place.chip.memory:
                sized.append((sizes != first, held, _written(sizes)))
    return iter([mesh for _, _, mesh in sorted(sized)[:_MESHES_TRIED]])


def _holds_states(purpose: Purpose, recipe: Recipe | None) -> bool:
    return purpose == "train" and (recipe is None or recipe.holds_states)


def _written(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _chips(topology: str) -> int:
    return math.prod(int(n) for n in topology.split(":")[1].split("x"))


def _seconds(place: Slice, program: Program, flops: float, collectives: list[Collective]) -> dict[str, float]:
    return {
        "arithmetic": flops / place.chip.flops,
        "memory": program.moved / place.chip.bandwidth,
        "network": sum(c.wire_bytes for c in collectives) / place.chip.link,
    }


def _missing(message: str) -> int:
    """Bytes by which the compiler says that memory is exceeded; 0 for any other message."""
    size = r"([\d.]+)([KMGT]?)"

    def bytes_of(number: str, unit: str) -> float:
        return float(number) * 1024 ** " KMGT".index(unit or " ")

    if found := re.search(rf"[Ee]xceeded \w+ capacity by {size}", message):
        return int(bytes_of(*found.groups()))
    if found := re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", message):
        return int(bytes_of(*found.groups()[:2]) - bytes_of(*found.groups()[2:]))
    return 0
