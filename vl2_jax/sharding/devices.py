"""What a command runs on, as its flags say it; reading them needs no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Devices:
    """What a command runs on.

    Attributes:
      mesh: Spread the model over devices: auto, expert, or sizes such as expert=4,tensor=2. By default one device.
      dispatch: How tokens reach their experts on other devices: ring or ragged.
      coordinator: host:port of process 0. On Cloud TPU processes find each other, and these three are left out.
      processes: How many processes there are.
      process_id: Which one this is, from 0.
    """

    mesh: str | None = None
    dispatch: Literal["ring", "ragged"] = "ring"
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
