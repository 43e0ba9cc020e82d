r"""Shows what each compression recipe does to a model's quality, bytes and speed.

With no flags, on any machine and without a network: trains a small base model on the source of
Python's standard library (kept for the next run), applies the recipes, and writes a table, a
picture and a page.

  python -m experiments.compress

On a checkpoint of yours (a Hugging Face folder) and a text of yours:

  python -m experiments.compress --model=DIR --text=FILE --recipes=int8,nf4,wanda50 --out=DIR

Or let it find out what each layer bears, so that all fits into some megabytes:

  python -m experiments.compress --model=DIR --text=FILE --recipes=int4 --budget_megabytes=70

Every compressed model is saved under OUT/models/NAME, where `experiments.evaluate` and
`experiments.generate` load it. Recipes are the files of experiments/recipes, YAML files of your
own, or the names of techniques; --list prints them.

Device: any. Minutes: 7 on two CPU cores, 3 once the base model is kept. Expect int8 within 1 % of
the base's perplexity, and Wanda below magnitude pruning at the same sparsity.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys

import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import common, search, study
from model import corpus, hf
from model.compress import pipeline, recipe, registry
from model.eval import layer_figures, perplexity, records, report, select
from model.eval.records import Record

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
RECORDS, HELD_OUT = 'records.jsonl', 'held_out.txt'
OUTPUTS = {
  RECORDS,
  HELD_OUT,
  search.RECIPE,
  search.PICTURE,
  'models',
  'report.html',
  'pareto.png',
  'layers.png',
}
DEFAULT_PPL_RATIO = 1.05
DEFAULT_SEQ_LEN = 512
CALIBRATION_TOKENS = 32_768

MODEL = flags.DEFINE_string(
  'model', None, 'Folder, hub id or .gguf file to compress. Default: train a small base model.'
)
TEXT = flags.DEFINE_string(
  'text',
  None,
  'Text file or folder to calibrate and measure on; it is split by content, and the held-out part '
  "is kept in OUT/held_out.txt. Default: the source of Python's standard library.",
)
RECIPE_NAMES = flags.DEFINE_list(
  'recipes', None, f'Recipes to apply, separated by commas. Default: {",".join(DEFAULT_RECIPES)}.'
)
OUT = flags.DEFINE_string(
  'out', 'out/compress', 'Folder for models, records and the report; an earlier one is replaced.'
)
SEQ_LEN = flags.DEFINE_integer(
  'seq_len',
  None,
  'Tokens a window of evaluation and calibration. Default: 512, or what the base was trained on.',
  lower_bound=2,
)
CALIBRATION_ROWS = flags.DEFINE_integer(
  'calibration_rows',
  None,
  f'Windows of calibration text. Default: as many as hold {CALIBRATION_TOKENS:,} tokens.',
  lower_bound=1,
)
MAX_WINDOWS = flags.DEFINE_integer(
  'max_windows', 0, 'Windows of held-out text to measure on; 0 takes all.', lower_bound=0
)
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Timed rounds a recipe.', lower_bound=5)
PROMPT_LENGTH = flags.DEFINE_integer(
  'prompt_length', 128, 'Tokens of the timed prefill, at batch 1.', lower_bound=1
)
MAX_MEGABYTES = flags.DEFINE_float(
  'max_megabytes', None, 'Name the best recipe whose parameters fit in so many MB (10^6 bytes).'
)
MAX_PPL_RATIO = flags.DEFINE_float(
  'max_ppl_ratio',
  None,
  "Name the smallest recipe within so many times the base's perplexity. "
  f'Default: {DEFAULT_PPL_RATIO}, if there is no --max_megabytes.',
)
BUDGET_MEGABYTES = flags.DEFINE_float(
  'budget_megabytes',
  None,
  'Search what to do to each layer so that all parameters fit in so many MB (10^6 bytes), among '
  '--budget_choices; the recipe found is applied like the others, and kept as OUT/budget.yaml.',
)
BUDGET_CHOICES = flags.DEFINE_list(
  'budget_choices', list(DEFAULT_CHOICES), 'Recipes whose treatment a layer may get.'
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of training and of the timed prompts.')
LIST = flags.DEFINE_bool('list', False, 'Print the recipes and techniques, and stop.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny base model and two recipes, in under a minute.')
PLUGINS = common.define_plugins()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """What is compressed, and the texts for it."""

  model: object
  tokenizer: object
  texts: corpus.Corpus
  name: str
  trained: dict
  seq_len: int  # where none is asked for


def main() -> None:
  common.load_plugins(PLUGINS.value)
  if LIST.value:
    print(listing())
    return
  budget = _budget()
  names = RECIPE_NAMES.value or (SMOKE_RECIPES if SMOKE.value else DEFAULT_RECIPES)
  recipes = [recipe.resolve(name, common.RECIPES) for name in names]
  choices = [recipe.resolve(name, common.RECIPES) for name in BUDGET_CHOICES.value]
  _check_unique(recipes)
  out = pathlib.Path(OUT.value)
  _check_out(out)
  inputs = _inputs()
  work = _study(inputs)
  for one in recipes:
    pipeline.check(work.base, one, work.calibration_BT)
  costs = []
  if BUDGET_MEGABYTES.value is not None:
    found, costs = search.find(work, choices, BUDGET_MEGABYTES.value)
    recipes.append(found)
  partial = _partial_folder(out, work, recipes)
  if costs:
    search.write(found, costs, partial)
  rows = _run_all(work, recipes, inputs.tokenizer, partial)
  _write_held_out(partial, inputs, work)
  choice = select.choose(rows, budget)
  report.write(rows, partial, _page(choice, recipes, out))
  layer_figures.write_layers(rows, partial / 'layers.png')
  _replace(partial, out)
  _say(rows, choice, out)


def listing() -> str:
  """Recipes and techniques, a line each."""
  lines = ['recipes:']
  for name in recipe.names(common.RECIPES):
    one = recipe.load(common.RECIPES / f'{name}.yaml')
    lines.append(f'  {name:18} {one.description}')
  lines.append('techniques (each is a recipe of one step, too):')
  for row in registry.TECHNIQUES.values():
    options = ', '.join(f.name for f in dataclasses.fields(row.spec))
    lines.append(f'  {row.name:18} {row.summary} Options: {options}. {row.paper}')
  return '\n'.join(lines)


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


def _check_unique(recipes):
  names = [one.name for one in recipes]
  twice = sorted({name for name in names if names.count(name) > 1 or name == records.BASE})
  if twice:
    raise ValueError(f'--recipes names {", ".join(twice)} twice, or the base itself')


def _inputs() -> Inputs:
  if MODEL.value is None:
    if TEXT.value is not None:
      raise ValueError('--text needs a --model; without one the base model brings its own corpus')
    trained = embedded.load_or_train(common.cache_folder(), seed=SEED.value, smoke=SMOKE.value)
    return Inputs(
      model=trained.model,
      tokenizer=trained.tokenizer,
      texts=trained.texts,
      name='embedded default',
      trained=trained.about,
      seq_len=trained.about['plan']['seq_len'],
    )
  model, tokenizer = hf.load_pretrained(MODEL.value)
  if tokenizer is None:
    raise ValueError(f'{MODEL.value} has no tokenizer; put its tokenizer.json into the folder')
  texts = corpus.load(TEXT.value)
  return Inputs(
    model=model,
    tokenizer=tokenizer,
    texts=texts,
    name=MODEL.value,
    trained={},
    seq_len=min(DEFAULT_SEQ_LEN, model.config.max_positions),
  )


def _study(inputs: Inputs) -> study.Study:
  seq_len = SEQ_LEN.value or inputs.seq_len
  rows = 8 if SMOKE.value else CALIBRATION_ROWS.value or -(-CALIBRATION_TOKENS // seq_len)
  held_out = ''.join(inputs.texts.held_out)
  tokens_T, ends_T = inputs.tokenizer.encode_with_bytes(held_out)
  limit = 16 if SMOKE.value else MAX_WINDOWS.value or None
  text = perplexity.windows(tokens_T, ends_T, seq_len, limit)
  perplexity.check(inputs.model, text)
  prompt_length = min(PROMPT_LENGTH.value, inputs.model.config.max_positions // 2)
  calibration_BT = common.calibration_rows(inputs.tokenizer, inputs.texts, seq_len, rows)
  settings = {
    'model': inputs.name,
    **inputs.trained,
    'corpus': inputs.texts.source,
    'corpus_fingerprint': inputs.texts.fingerprint,
    'seq_len': seq_len,
    'windows': len(text.tokens_BT),
    'calibration_rows': len(calibration_BT),
    'activations': str(inputs.model.dtype),
    'batch': study.BATCH,
    'prompt_length': prompt_length,
    'decode_steps': study.DECODE_STEPS,
  }
  return study.Study(
    base=inputs.model,
    calibration_BT=calibration_BT,
    text=text,
    settings=settings,
    environment=records.environment(),
    seed=SEED.value,
    rounds=ROUNDS.value,
    prompt_length=prompt_length,
  )


def _run_all(work, recipes, tokenizer, folder) -> list[Record]:
  path = folder / RECORDS
  rows = records.read(path) if path.is_file() else []
  done = {row.recipe for row in rows}
  base = study.baseline(work)
  if records.BASE not in done:
    rows.append(study.base_record(work, base))
    records.append(path, rows[-1])
  todo = [one for one in recipes if one.name not in done]
  for i, one in enumerate(todo):
    print(f'[{i + 1}/{len(todo)}] {one.name}: {one.description}', file=sys.stderr, flush=True)
    calibrated = any(pipeline.calibrated(step) for step in one.steps)
    resume = folder / f'.{one.name}.progress' if calibrated else None
    model, row = study.run(work, base, one, resume)
    hf.save_pretrained(model, tokenizer, folder / 'models' / one.name, recipe=one.to_dict())
    rows.append(row)
    records.append(path, row)
  order = [records.BASE, *(one.name for one in recipes)]
  return sorted(rows, key=lambda row: order.index(row.recipe))


def _write_held_out(folder, inputs, work):
  """Writes the text that was measured, so that `evaluate` gives the same numbers.

  Cut inside a word, a text can end in other tokens than it had there, so the cut is moved on until
  the same windows come out, and no other.
  """
  held_out = ''.join(inputs.texts.held_out)
  tokens_T, ends_T = inputs.tokenizer.encode_with_bytes(held_out)
  size, seq_len = work.text.tokens_BT.size, work.text.seq_len
  for end in ends_T[size - 1 : size - 1 + seq_len]:
    text = held_out.encode()[:end].decode(errors='ignore')
    again_T = inputs.tokenizer.encode(text)
    if len(again_T) < size + seq_len and np.array_equal(again_T[:size], tokens_T[:size]):
      break
  else:
    text = held_out
  (folder / HELD_OUT).write_bytes(text.encode())


def _page(choice, recipes, out) -> report.Page:
  prompt = '--prompt="import os"'
  use = {
    one.name: f'python -m experiments.generate --model={out}/models/{one.name} {prompt}'
    for one in recipes
  }
  return report.Page(title='What each recipe costs and buys', choice=choice, use=use)


def _say(rows, choice, out):
  print(report.table(rows))
  print(choice.reason)
  best = choice.record or choice.nearest or rows[-1]
  print(f'\npage:    {out}/report.html\npicture: {out}/pareto.png\nrecords: {out}/{RECORDS}')
  print(f'layers:  {out}/layers.png')
  print(
    f'models:  {out}/models/NAME; for instance\n'
    f'  python -m experiments.evaluate --model={out}/models/{best.recipe} '
    f'--text={out}/{HELD_OUT} --seq_len={best.config["seq_len"]} --json'
  )


def _partial_folder(out, work, recipes) -> pathlib.Path:
  """The folder to work in, until it takes the name of `out`; a killed run's is gone on with."""
  plan = {
    'settings': work.settings,
    'recipes': [one.to_dict() for one in recipes],
    'seed': work.seed,
    'revision': work.environment['git_revision'],
  }
  digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
  folder = out.with_name(f'.{out.name}.{digest}.partial')
  folder.mkdir(parents=True, exist_ok=True)
  for half_written in (folder / 'models').glob('.*'):
    shutil.rmtree(half_written)
  return folder


def _check_out(out):
  if not out.name or (out.exists() and not out.is_dir()):
    raise ValueError(f'the output {out} cannot be replaced; name a folder')
  found = {path.name for path in out.iterdir()} if out.exists() else set()
  if found and (RECORDS not in found or found - OUTPUTS):
    raise ValueError(
      f'the output folder {out} holds something else '
      f'({", ".join(sorted(found - OUTPUTS)[:5]) or f"no {RECORDS}"}); name a new folder'
    )


def _replace(partial, out):
  old = out.with_name(f'.{out.name}.old')
  shutil.rmtree(old, ignore_errors=True)
  if out.exists():
    os.rename(out, old)
  os.rename(partial, out)
  shutil.rmtree(old, ignore_errors=True)


if __name__ == '__main__':
  common.run(main)
