"""DeepSeek-VL2 in JAX: `load` a model, ask it about pictures.

    vl2 = vl2_jax.load("path/to/model")
    (answer,) = vl2.generate([{"role": "user", "content": "<image>\\nWhat is this?", "images": ["photo.jpg"]}])
    print(answer.text, answer.boxes)
"""

from vl2_jax.api import VL2, load
from vl2_jax.config import VL2Config
from vl2_jax.processing.batch import Processor

__all__ = ["VL2", "Processor", "VL2Config", "load"]
__version__ = "0.1.0"
