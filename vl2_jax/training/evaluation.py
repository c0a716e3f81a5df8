"""A look at a model in training: its loss on conversations that it does not learn from, and some answers in full.

OUT/evaluation.jsonl                 the loss, and so in TensorBoard
OUT/samples/00000500.jsonl           question, right answer, the model's answer
OUT/samples/00000500-0.png           the picture asked about, with the answer's boxes drawn on it
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl2_jax.api import VL2
from vl2_jax.errors import ConfigError
from vl2_jax.inference.prefill import matmul_precision
from vl2_jax.model.vl2 import VL2Model
from vl2_jax.processing.batch import IGNORED, Processor
from vl2_jax.processing.conversation import Conversation
from vl2_jax.processing.grounding import draw_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.progress import Report
from vl2_jax.sharding.processes import most_of_all
from vl2_jax.training.data import batches, first_questions
from vl2_jax.training.folder import rows_of, write
from vl2_jax.training.log import EVALUATED, EVALUATION_FILE, Log
from vl2_jax.training.objective import losses
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import Recipe
from vl2_jax.training.step import TrainState, model_params

SAMPLES = "samples"


def best_step(folder: Path, steps: Iterable[int]) -> tuple[float, int | None]:
    """The lowest loss that was found at one of these steps, and the step; (infinity, None) if there is none."""
    losses = {row.get("step"): row.get("loss") for row in rows_of(folder / EVALUATION_FILE)}
    return min(
        ((loss, step) for step in steps if (loss := losses.get(step)) is not None),
        default=(math.inf, None),
    )


class Evaluation:
    """Everything that is asked again and again; read once.

    Args:
      share: this process's of every batch, and of how many.
      place: lays a host's batch out on the devices.

    Raises:
      ConfigError: there are sources, and nothing in them can be used.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: VL2Model,
        processor: Processor,
        folder: Path,
        share: tuple[int, int],
        place: Callable[[PackedBatch], PackedBatch],
        log: Log,
    ):
        self._recipe, self._model, self._processor, self._folder, self._log = recipe, model, processor, folder, log
        self._batches: list[PackedBatch] = []
        self._questions: list[tuple[Conversation, str]] = []
        self._loss = jax.jit(self._sum_of_losses)
        self._done = {row.get("step") for row in rows_of(folder / EVALUATION_FILE)}
        if not recipe.evaluation.sources:
            return
        data = dataclasses.replace(recipe.data, sources=recipe.evaluation.sources, epochs=1, workers=0)
        stream = iter(batches(data, processor, *share))
        mine = list(itertools.islice(stream, recipe.evaluation.batches))
        stream.close()
        log.left_out(stream.reports)
        # A host whose share ends before another's goes on with nothing: all take part in every computation.
        number = most_of_all(len(mine))
        if not number:
            raise ConfigError("evaluation.sources hold no sample that can be used; mend them, or leave them out.")
        mine += [stream.empty()] * (number - len(mine))
        self._batches = [jax.tree.map(lambda a: a[0], place(jax.tree.map(lambda a: a[None], b))) for b in mine]
        self._questions = first_questions(data, processor, recipe.evaluation.samples)

    def is_due(self, step: int) -> bool:
        """Before the last step; after it, a run is evaluated anyway."""
        every = self._recipe.evaluation.every
        return bool(step and every and step % every == 0 and self.is_missing(step))

    def is_missing(self, step: int) -> bool:
        """Whether there is something to evaluate, and nobody has at this step."""
        return bool(self._batches) and step not in self._done

    def __call__(
        self, step: int, state: TrainState, tell: Callable[[str], None], check: Callable[[], None], report: Report
    ) -> float:
        """The loss. It is told, and recorded once the questions are answered too.

        Args:
          check: called again and again; what it raises ends the evaluation, of which nothing is left.
        """
        sums = []
        for number, batch in enumerate(self._batches):
            check()
            report("evaluating", number, len(self._batches))
            sums.append(jax.device_get(self._loss(state.trained, state.kept, batch)))
        loss = float(sum(s[0] for s in sums) / max(1, sum(s[1] for s in sums)))
        tell(f"step {step}  evaluation loss {loss:.4f}")
        if self._questions:
            report("answering questions of the evaluation", 0, 0)
            self._ask(step, state, tell, check)
        self._log.record(EVALUATION_FILE, {"step": step, "loss": loss}, EVALUATED)
        self._done.add(step)
        return loss

    def _sum_of_losses(self, trained: dict, kept: dict, batch: PackedBatch) -> tuple[Any, Any]:
        params = model_params(self._recipe, trained, kept)
        targets = (batch.labels[:, 1:] != IGNORED).sum()
        with matmul_precision(self._model.dtype):
            found = losses(
                self._model,
                params,
                batch,
                chunk=self._recipe.objective.loss_chunk,
                targets=jnp.float32(1.0),
            )
        return found.next_token, targets

    def _ask(self, step: int, state: TrainState, tell: Callable[[str], None], check: Callable[[], None]) -> None:
        params = model_params(self._recipe, state.trained, state.kept)
        vl2 = VL2(self._model.config, params, self._processor, self._model.dtype, layout=self._model.layout)
        turns = [messages for messages, _ in self._questions]
        check()
        answers = vl2.generate(
            turns, max_tokens=self._recipe.evaluation.max_tokens, on_text=lambda _row, _text: check()
        )
        if jax.process_index() != 0:
            return
        folder = self._folder / SAMPLES
        folder.mkdir(exist_ok=True)
        lines = []
        for number, ((messages, expected), answer) in enumerate(zip(self._questions, answers, strict=True)):
            question = messages[-1]["content"]
            lines.append({"question": question, "expected": expected, "answer": answer.text})
            tell(f"  {' '.join(question.split())}  ->  {answer.text}   (right: {expected})")
            pictures = [picture for message in messages for picture in message.get("images", ())]
            if pictures:
                drawn = draw_boxes(load_image(pictures[-1]), answer.boxes)
                drawn.save(folder / f"{step:08d}-{number}.png")
                if self._log.board is not None:
                    self._log.board.add_image(f"samples/{number}", np.asarray(drawn), step, dataformats="HWC")
        write(folder / f"{step:08d}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
