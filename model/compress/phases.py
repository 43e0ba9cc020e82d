"""Divides a recipe into phases, each of which goes over the whole model before the next begins.

Within a phase, steps that build a new model (of other sizes, or by training) come first, then those
that change the model as a whole, then those on its parts, which run block by block. A step that
trains after steps of the latter two kinds begins a new phase:

  prune_ffn, distill, gptq         one phase
  wanda | distill, gptq | lora     three

So the later steps see the trained model: their calibration runs through it.
"""

import dataclasses

from model.compress.recipe import Recipe, Step

REBUILDING = ('shape', 'learn')  # scopes of steps that build a new model
# Scopes of the whole model, and which of them come first in a phase; others come last.
WHOLE = {'shape': 0, 'learn': 0, 'model': 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """Some consecutive steps of a recipe.

  recipe: these steps as a recipe of their own.
  number: of the phase.
  first: the number of its first step in the whole recipe.
  is_last: whether no other phase follows.
  """

  recipe: Recipe
  number: int
  first: int
  is_last: bool

  @property
  def last(self) -> int:
    """The number of its last step in the whole recipe."""
    return self.first + len(self.recipe.steps) - 1

  @property
  def rebuilding(self) -> list[tuple[int, Step]]:
    """The steps that build a new model, with their numbers in the whole recipe."""
    steps = enumerate(self.recipe.steps, self.first)
    return [(i, step) for i, step in steps if step.row.scope in REBUILDING]


def phases(recipe: Recipe) -> list[Phase]:
  """The phases of a recipe, in order; their steps are those of the recipe."""
  starts = [0]
  for i, step in enumerate(recipe.steps):
    before = recipe.steps[starts[-1] : i]
    if step.row.scope == 'learn' and any(s.row.scope not in REBUILDING for s in before):
      starts.append(i)
  ends = [*starts[1:], len(recipe.steps)]
  return [
    Phase(
      recipe=dataclasses.replace(recipe, steps=recipe.steps[start:end]),
      number=number,
      first=start,
      is_last=end == len(recipe.steps),
    )
    for number, (start, end) in enumerate(zip(starts, ends, strict=True))
  ]


def check_order(recipe: Recipe, i: int) -> None:
  """Raises ValueError if step i cannot come after the steps before it, whatever the model is.

  Only a step that trains may follow all others.
  """
  step = recipe.steps[i]
  before = [s.technique for s in recipe.steps[:i] if _place(s) > _place(step)]
  if before and step.row.scope != 'learn':
    raise ValueError(
      f'recipe {recipe.name}: {step.technique} changes the whole model, so it has to come before '
      f'{before[0]}'
    )


def _place(step: Step) -> int:
  return WHOLE.get(step.row.scope, len(WHOLE))
