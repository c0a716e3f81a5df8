"""How long a run is: so many updates, so many passes over its data, or whichever comes first.

How many updates a pass takes is known once it is read, since samples are packed. Until then the share of the data that
was read tells it, better with every update and exactly at the last one: a schedule that follows it comes down to its
end where the run ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vl2_jax.errors import ConfigError
from vl2_jax.training.recipe import Recipe


@dataclass(frozen=True)
class Length:
    """When a run ends; `None` is never.

    Attributes:
      steps: updates of the whole run (`loop.steps`).
      epochs: passes over its data (`data.epochs`).
    """

    steps: int | None
    epochs: int | None

    @classmethod
    def of(cls, recipe: Recipe) -> Length:
        """Raises ConfigError where nothing ends the run."""
        endless = all(source.path is None for source in recipe.data.sources)
        steps, epochs = recipe.loop.steps, None if endless else recipe.data.epochs
        if steps is None and epochs is None:
            why = " (scenes have no end, whatever data.epochs says)" if endless and recipe.data.sources else ""
            raise ConfigError(
                f"nothing says how long the run is{why}; set data.epochs, the passes over your files, or loop.steps."
            )
        return cls(steps, epochs)

    def total(self, step: int, read: float) -> float:
        """Updates of the whole run, as far as one knows once `step` of them have read this share of the data."""
        by_data = step / read if read and self.epochs else math.inf
        return min(by_data, self.steps or math.inf)

    def is_over(self, step: int) -> bool:
        """Whether its steps are done; its data ends by itself."""
        return self.steps is not None and step >= self.steps

    def shown(self, step: int, total: float) -> str:
        """A step among all, such as 3/8, or 3/~17 where the data decides."""
        return f"{step}/{total:.0f}" if total == self.steps else f"{step}/~{total:.0f}"

    def plan(self, records: int | None) -> str:
        """What ends the run, before it begins; `records` of all passes, `None` if they have no end."""
        ends = [] if self.steps is None else [f"{self.steps} steps (loop.steps)"]
        if self.epochs is not None and records is not None:
            ends.append(f"data.epochs = {self.epochs}, {records:,} conversations")
        return f"the run ends after {' or '.join(ends)}" + (", whichever comes first" if len(ends) > 1 else "")

    def end(self, step: int, read: float) -> str:
        """What ended the run."""
        if not self.is_over(step):
            rest = "" if self.steps is None else f"; loop.steps = {self.steps} was not reached"
            return f"the data ended after {step} steps (data.epochs = {self.epochs}){rest}"
        rest = ""
        if self.epochs is not None and read < 1:
            rest = f", with {100 * read:.0f} % of data.epochs = {self.epochs} read; --set loop.steps= goes to their end"
        return f"loop.steps = {self.steps} ended the run{rest}"
