"""DeepSeek-VL2 in JAX: `load` a model, ask it about pictures.

vl2 = vl2_jax.load("path/to/model")
(answer,) = vl2.generate([{"role": "user", "content": "<image>\\nWhat is this?", "images": ["photo.jpg"]}])
print(answer.text, answer.boxes)
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["VL2", "Processor", "VL2Config", "load"]

_HOMES = {
    "VL2": "vl2_jax.api",
    "load": "vl2_jax.api",
    "VL2Config": "vl2_jax.config",
    "Processor": "vl2_jax.processing.batch",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used, so that reading a configuration does not wait for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vl2_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
