r"""Shows what each compression recipe does to a model's quality, bytes and speed.

With no flags it needs no network: it trains a small base model on the source of Python's standard
library (and keeps it for the next run), applies the recipes, prints a table, and writes a picture
and a page.

  python -m experiments.compress

On a checkpoint of yours (a Hugging Face folder or a GGUF file) and a text of yours:

  python -m experiments.compress --model=DIR --text=FILE --recipes=int8,nf4,wanda50 --out=DIR

With a budget, it searches a treatment for each layer so that all parameters fit into it:

  python -m experiments.compress --model=DIR --text=FILE --recipes=int4 --budget_megabytes=70

With --tasks, it also measures accuracies on small tasks that need no download, with standard
errors:

  python -m experiments.compress --tasks=python_words,python_summaries,python_lines

Every compressed model is saved as OUT/models/NAME, which `experiments.evaluate` and
`experiments.generate` load. Recipes are the files of experiments/recipes, YAML files of your own,
or the names of techniques; --list prints them. A killed run resumes when it is started again.

Device: any. Minutes: 5 on two CPU cores, 2 when the base model is kept. Expect int8 within 1 % of
the base's perplexity, and Wanda below magnitude pruning at the same sparsity.
"""

import pathlib

from absl import flags

from experiments import carbon, common, comparison, costs, exams, search, study, terminal
from experiments import inputs as inputs_lib
from experiments.comparison import Comparison
from model import files
from model.compress import recipe
from model.compress.recipe import Recipe
from model.eval import library_tasks, select, tasks
from model.layers.routed import RoutedConfig

DEFAULT_RECIPES = (
  'bf16',
  'int8',
  'fp8',
  'int4',
  'nf4',
  'gptq_int4',
  'gptq_int3',
  'magnitude50',
  'wanda50',
  'sparsegpt50',
  'magnitude_2of4',
  'wanda_2of4',
  'sparsegpt_2of4',
  'wanda_2of4_int8',
)
DEFAULT_CHOICES = ('int8', 'gptq_int4', 'gptq_int3', 'sparsegpt_2of4_int4')
SMOKE_RECIPES = ('int8', 'wanda_2of4_int8')
DEFAULT_PPL_RATIO = 1.05

MODEL = flags.DEFINE_string(
  'model',
  None,
  'Folder, hub id or .gguf file to compress. Default: train a small base model.',
)
TEXT = flags.DEFINE_list(
  'text',
  [],
  'Text file or folder to calibrate and measure on, or python-source or python-docs, which every '
  'Python installation has. It is split by content; OUT/held_out.txt has the measured part. Of '
  'several, separated by commas, all are calibrated on together, and each is measured by itself. '
  'Default: python-source.',
)
RECIPE_NAMES = flags.DEFINE_list(
  'recipes', None, f'Recipes to apply, separated by commas. Default: {",".join(DEFAULT_RECIPES)}.'
)
OUT = common.define_out(
  'out/compress', 'Folder for models, records and the report. An earlier one is replaced.'
)
SEQ_LEN = flags.DEFINE_integer(
  'seq_len',
  None,
  'Tokens per window of evaluation and calibration. Default: 512, or as the base was trained.',
  lower_bound=2,
)
CALIBRATION_ROWS = flags.DEFINE_integer(
  'calibration_rows',
  None,
  f'Windows of calibration text. Default: {inputs_lib.CALIBRATION_TOKENS:,} tokens in all.',
  lower_bound=1,
)
MAX_WINDOWS = flags.DEFINE_integer(
  'max_windows', 0, 'Windows of held-out text to measure on. 0 takes all.', lower_bound=0
)
TASKS = flags.DEFINE_list(
  'tasks', [], f'Tasks to measure every model by: some of {", ".join(library_tasks.TASKS)}.'
)
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Timed rounds per recipe.', lower_bound=5)
PROMPT_LENGTH = flags.DEFINE_integer(
  'prompt_length', 128, 'Tokens of the timed prefill, at batch 1.', lower_bound=1
)
MAX_MEGABYTES = flags.DEFINE_float(
  'max_megabytes',
  None,
  'Recommend the best recipe whose parameters fit into so many MB (10^6 bytes).',
)
MAX_PPL_RATIO = flags.DEFINE_float(
  'max_ppl_ratio',
  None,
  "Recommend the smallest recipe with at most so many times the base's perplexity. "
  f'Default: {DEFAULT_PPL_RATIO}, unless --max_megabytes is given.',
)
BUDGET_MEGABYTES = flags.DEFINE_float(
  'budget_megabytes',
  None,
  'Search among --budget_choices for a treatment of each layer, so that all parameters fit into so '
  'many MB (10^6 bytes). The recipe found is applied like the others, and kept as OUT/budget.yaml.',
)
BUDGET_CHOICES = flags.DEFINE_list(
  'budget_choices', list(DEFAULT_CHOICES), 'Recipes from which a layer may get its treatment.'
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of training and of the timed prompts.')
LIST = flags.DEFINE_bool('list', False, 'Print the recipes and techniques, and stop.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny base model and two recipes, in under a minute.')
PLUGINS = common.define_plugins()
COSTS, CARBON = costs.define(), carbon.define()


def main() -> None:
  common.load_plugins(PLUGINS.value)
  if LIST.value:
    print(terminal.listing())
    return
  exams.check_names(TASKS.value)
  budget, recipes, choices = _budget(), _recipes(), _resolve(BUDGET_CHOICES.value)
  out = common.out(OUT.value)
  with carbon.tracked(CARBON) as totals, files.claim(out, kind=comparison.KIND) as output:
    work = _comparison(recipes, choices)
    with output.writing(work.key(PLUGINS.value)) as folder:
      rows, choice = _run(work, budget, folder, out)
      totals.write(folder)
  print(terminal.results(rows, choice, out, str(totals)))


def _run(work: Comparison, budget: select.Budget, folder: pathlib.Path, out: pathlib.Path):
  experts = any(isinstance(layer.ffn, RoutedConfig) for layer in work.work.base.config.layers)
  measured = [study.EXPERTS_CHANGED] if experts else []
  measured += work.work.costs.metrics
  measured += [f'{tasks.ACCURACY}:{one.task.name}' for one in work.work.exams]
  table = terminal.Table([one.name for one in work.recipes], measured)
  table.header()
  rows = comparison.run(work, folder, on_start=table.start, on_row=table.row)
  choice = select.choose(rows, budget)
  comparison.write(work, rows, choice, folder, out=out)
  return rows, choice


def _comparison(recipes: list[Recipe], choices: list[Recipe]) -> Comparison:
  """Loads the model and the text, checks that the recipes fit, and searches for the budget's."""
  protocol = _protocol()
  inputs = inputs_lib.load(MODEL.value, TEXT.value, seed=SEED.value, smoke=SMOKE.value)
  work = inputs_lib.make_study(inputs, protocol)
  plain = Comparison(inputs=inputs, work=work, recipes=tuple(recipes))
  comparison.check(plain)
  if BUDGET_MEGABYTES.value is None:
    return plain
  found, costs = search.find(work, choices, BUDGET_MEGABYTES.value)
  recipes = (*plain.recipes, found)
  return Comparison(inputs=inputs, work=work, recipes=recipes, found=found, costs=tuple(costs))


def _protocol() -> inputs_lib.Protocol:
  smoke = SMOKE.value
  return inputs_lib.Protocol(
    seq_len=SEQ_LEN.value,
    calibration_rows=inputs_lib.SMOKE_ROWS if smoke else CALIBRATION_ROWS.value,
    max_windows=inputs_lib.SMOKE_WINDOWS if smoke else MAX_WINDOWS.value or None,
    prompt_length=PROMPT_LENGTH.value,
    rounds=ROUNDS.value,
    seed=SEED.value,
    costs=costs.of(COSTS),
    tasks=tuple(TASKS.value),
    task_documents=inputs_lib.SMOKE_DOCUMENTS if smoke else None,
  )


def _recipes() -> list[Recipe]:
  names = RECIPE_NAMES.value
  if names is None:
    names = SMOKE_RECIPES if SMOKE.value else DEFAULT_RECIPES
  if not names:
    raise ValueError('--recipes is empty; name recipes, or leave the flag out. --list prints them')
  recipes = _resolve(names)
  comparison.check_names(recipes)
  return recipes


def _resolve(names) -> list[Recipe]:
  return [recipe.resolve(name, common.RECIPES) for name in names]


def _budget() -> select.Budget:
  common.check_positive(max_megabytes=MAX_MEGABYTES.value, max_ppl_ratio=MAX_PPL_RATIO.value)
  common.check_positive(budget_megabytes=BUDGET_MEGABYTES.value)
  if MAX_MEGABYTES.value is not None and MAX_PPL_RATIO.value is not None:
    raise ValueError('give --max_megabytes or --max_ppl_ratio, not both')
  if MAX_MEGABYTES.value is not None:
    return select.Budget(max_megabytes=MAX_MEGABYTES.value)
  if BUDGET_MEGABYTES.value is not None and MAX_PPL_RATIO.value is None:
    return select.Budget(max_megabytes=BUDGET_MEGABYTES.value)
  return select.Budget(max_ppl_ratio=MAX_PPL_RATIO.value or DEFAULT_PPL_RATIO)


if __name__ == '__main__':
  common.run(main)
