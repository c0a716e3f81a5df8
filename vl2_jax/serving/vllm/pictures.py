"""Pictures to tiles and to their places in a prompt, as vLLM's multimodal processors do it.

ids with one <image> a picture, pictures  -->  ids with every position, tiles uint8, rasters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from vl2_jax.processing.batch import MAX_TILED_IMAGES, Processor
from vl2_jax.processing.images import load_image
from vl2_jax.processing.tiling import largest_raster, visual_token_count
from vl2_jax.serving.vllm.theirs import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    BatchFeature,
    MultiModalFieldConfig,
    PromptReplacement,
    from_numpy,
)

_TILED = "is_tiled"  # whether pictures are cut: it is part of what a picture's tokens are kept by


class PictureInfo(BaseProcessingInfo):
    """What a prompt may hold."""

    @cached_property
    def processor(self) -> Processor:
        return Processor.from_directory(self.ctx.model_config.model)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": visual_token_count(self._largest_raster, self.processor.config.token_grid)}

    def largest(self) -> tuple[int, int]:
        """Width and height of the pictures that take the most positions."""
        across, down = self._largest_raster
        return across * self.processor.config.tile_size, down * self.processor.config.tile_size

    @cached_property
    def _largest_raster(self) -> tuple[int, int]:
        config = self.processor.config
        return largest_raster(config.rasters, config.token_grid)


class LargestPictures(BaseDummyInputsBuilder):
    """What vLLM measures with: see `BaseDummyInputsBuilder`."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""  # text never stands for a picture: `Pictures.get_dummy_inputs` puts their ids there

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        return {"image": [Image.new("RGB", self.info.largest())] * mm_counts.get("image", 0)}


class Pictures(BaseMultiModalProcessor):
    """Tiles as `Processor.cut` makes them, bit for bit; they travel as bytes."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        inputs.prompt = [self.info.processor.tokenizer.image_id] * mm_counts.get("image", 0)
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Says how pictures are cut before anything is looked up: the same picture has other tokens beside others."""
        count = inputs.mm_data_items.get_all_counts().get("image", 0)
        inputs.hf_processor_mm_kwargs = {_TILED: count <= MAX_TILED_IMAGES}
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        cut = [self.info.processor.cut(load_image(image), bool(hf_kwargs[_TILED])) for image in hf_data["images"]]
        fields = {
            "tiles": np.concatenate([tiles for _, tiles in cut]),
            "crops": np.asarray([crop for crop, _ in cut]),
            "counts": np.asarray([len(tiles) for _, tiles in cut]),
        }
        return BatchFeature({name: from_numpy(values) for name, values in fields.items()})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        counts = hf_inputs.get("counts", from_numpy(np.zeros(0, int)))
        return {
            "tiles": MultiModalFieldConfig.flat_from_sizes("image", counts),
            "crops": MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        image_id, grid = self.info.processor.tokenizer.image_id, self.info.processor.config.token_grid

        def places(number: int) -> list[int]:
            across, down = out_mm_kwargs["image"][number]["crops"].data.tolist()
            return [image_id] * visual_token_count((across, down), grid)

        return [PromptReplacement(modality="image", target=[image_id], replacement=places)]
