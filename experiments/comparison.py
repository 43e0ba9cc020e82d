"""The run of the main job: every recipe compressed, measured, saved and reported in one folder.

The run works in a partial folder that is kept when it is killed. The same command finds it again by
a key of everything that the results depend on, and continues after the last recipe.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence

from experiments import search, study
from experiments.inputs import Inputs, write_held_out
from model import fingerprint, hf
from model.compress import pipeline
from model.compress.budget import Option
from model.compress.recipe import Recipe
from model.eval import layer_figures, records, report, select
from model.eval.records import Record

KIND = 'compress'  # of the output folder
RECORDS, MODELS, LAYERS = 'records.jsonl', 'models', 'layers.png'
TITLE = 'What each recipe costs and buys'
ROOT = pathlib.Path(__file__).parents[1]
CODE = ('ops', 'model', 'experiments')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """The recipes to compare, and on what."""

  inputs: Inputs
  work: study.Study
  recipes: tuple[Recipe, ...]
  found: Recipe | None = None  # the one among them that was found under a budget of bytes
  costs: tuple[Option, ...] = ()  # what was measured to find it

  def key(self, plugins: Sequence[str] = ()) -> str:
    """A short hash of everything that the results depend on."""
    source = [path for package in CODE for path in (ROOT / package).rglob('*.py')]
    plan = {
      'settings': self.work.settings,
      'weights': fingerprint.of_model(self.work.base),
      'tokens': fingerprint.of_arrays(
        [
          *((name, text.tokens_BT) for name, text in self.work.texts.items()),
          ('calibration rows', self.work.calibration_BT),
        ]
      ),
      'recipes': [one.to_dict() for one in self.recipes],
      'seed': self.work.seed,
      'rounds': self.work.rounds,
      'code': fingerprint.of_files([*source, *map(pathlib.Path, plugins)]),
    }
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]


def check_names(recipes: Sequence[Recipe]) -> None:
  """Raises ValueError if two recipes share a name, or one has the name of the base."""
  names = [one.name for one in recipes]
  twice = sorted({name for name in names if names.count(name) > 1 or name == records.BASE})
  if twice:
    raise ValueError(f'--recipes names {", ".join(twice)} twice, or the base itself')


def check(comparison: Comparison) -> None:
  """Raises ValueError if a recipe does not fit the model."""
  for one in comparison.recipes:
    work = comparison.work
    pipeline.check(work.base, one, work.calibration_BT, learns=work.school is not None)


def run(
  comparison: Comparison,
  folder: pathlib.Path,
  *,
  on_start: Callable[[int, Recipe], None],
  on_row: Callable[[Record], None],
) -> list[Record]:
  """Measures the base and every recipe that `folder` has no record of, and saves the models.

  `on_start` is called with the number of a recipe before its work, `on_row` with each record, those
  of an earlier run included. Returns the records in the order of the recipes.
  """
  _remove_half_written(folder / MODELS)
  path, work = folder / RECORDS, comparison.work
  rows = {row.recipe: row for row in (records.read(path) if path.is_file() else [])}
  base = study.baseline(work)
  if records.BASE not in rows:
    rows[records.BASE] = study.base_record(work, base)
    records.append(path, rows[records.BASE])
  on_row(rows[records.BASE])
  for i, one in enumerate(comparison.recipes):
    if one.name not in rows:
      on_start(i, one)
      rows[one.name] = _run_one(comparison, base, one, folder)
      records.append(path, rows[one.name])
    on_row(rows[one.name])
  return [rows[name] for name in (records.BASE, *(one.name for one in comparison.recipes))]


def write(
  comparison: Comparison,
  rows: Sequence[Record],
  choice: select.Choice,
  folder: pathlib.Path,
  *,
  out: pathlib.Path,
) -> None:
  """Writes the report, the pictures and the text; `out` is the name that the folder will have."""
  if comparison.found is not None:
    search.write(comparison.found, comparison.costs, folder)
  write_held_out(folder, comparison.inputs, comparison.work.texts)
  use = {
    one.name: f'python -m experiments.generate --model={out}/{MODELS}/{one.name} '
    '--prompt="import os"'
    for one in comparison.recipes
  }
  report.write(rows, folder, report.Page(title=TITLE, choice=choice, use=use))
  layer_figures.write_layers(rows, folder / LAYERS)


def _run_one(comparison, base, one, folder) -> Record:
  long = any(pipeline.calibrated(step) or step.row.scope == 'learn' for step in one.steps)
  resume = folder / f'.{one.name}.progress' if long else None
  model, row = study.run(comparison.work, base, one, resume)
  tokenizer = comparison.inputs.tokenizer
  hf.save_pretrained(model, tokenizer, folder / MODELS / one.name, recipe=one.to_dict())
  return row


def _remove_half_written(models: pathlib.Path) -> None:
  for path in models.glob('.*'):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
