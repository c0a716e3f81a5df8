"""Pictures that this project draws itself, and questions about them: what `vl2-nano` is trained and measured on.

`scene_conversation(seed)` is a pure function: the same number gives the same picture and the same questions anywhere.
"""

from vl2_jax.scenes.conversations import SceneSizes, SceneSource, scene_conversation

__all__ = ["SceneSizes", "SceneSource", "scene_conversation"]
