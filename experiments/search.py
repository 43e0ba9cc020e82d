"""The main job's search for a recipe that fits into a budget of bytes."""

import pathlib
import sys
from collections.abc import Sequence

import yaml

from experiments import common
from experiments.study import Study
from model.compress import budget, recipe
from model.compress.budget import Option
from model.compress.recipe import Recipe
from model.eval import layer_figures
from model.eval.select import MEGABYTE

RECIPE, PICTURE = 'budget.yaml', 'sensitivity.png'
FIRST = 'bf16'  # its steps precede the treatment of every layer


def find(work: Study, choices: Sequence[Recipe], megabytes: float) -> tuple[Recipe, list[Option]]:
  """The best recipe that fits, and the cost of each treatment of each layer.

  Raises ValueError if none fits.
  """
  found, options = budget.search(
    work.base,
    budget.treatments(choices),
    work.calibration_BT,
    round(megabytes * MEGABYTE),
    first=recipe.load(common.RECIPES / f'{FIRST}.yaml').steps,
    progress=common.labelled('budget: sensitivity'),
  )
  print(
    f'budget: {found.nbytes / MEGABYTE:.3f} MB of {megabytes:g}, KL {found.kl:.4g} nats per token '
    f'on the calibration text ({found.predicted:.4g} as a sum over layers), before the weights are '
    f'prepared for this device; '
    f'{found.recipe.description}',
    file=sys.stderr,
  )
  return found.recipe, options


def write(found: Recipe, costs: Sequence[Option], folder: pathlib.Path) -> None:
  """Writes the recipe as a file that `--recipes` takes, and a picture of the costs."""
  (folder / RECIPE).write_text(yaml.safe_dump(found.to_dict(), sort_keys=False))
  rows = [(option.layer, option.treatment, option.kl) for option in costs]
  layer_figures.write_sensitivity(rows, folder / PICTURE)
