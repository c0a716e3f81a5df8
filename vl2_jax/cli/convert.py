"""`vl2 convert`: a released checkpoint to ours."""

from __future__ import annotations

from typing import Annotated

import tyro

from vl2_jax.cli.flags import Destination
from vl2_jax.cli.terminal import messages, tell
from vl2_jax.progress import Display


def convert(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    destination: Destination,
    dtype: str | None = None,
    weights: str | None = None,
) -> None:
    """Released Hugging Face directory (or hub id) to a converted checkpoint.

    Example: vl2 convert deepseek-ai/deepseek-vl2-tiny tiny --dtype bfloat16

    Args:
        source: Directory with config.json and *.safetensors, or a hub id.
        destination: A directory that does not exist yet.
        dtype: bfloat16 or float32; by default the checkpoint's.
        weights: int8 or int4: the decoder's matrices in so many bits; SOURCE may then be a converted checkpoint.
    """
    from convert.from_torch import convert as run
    from vl2_jax.api import find_model

    with Display(messages) as report:
        run(find_model(source), destination, dtype, weights, report)
    tell(f"converted {source} to {destination}")
