r"""Reproduces the tables of the compression papers, with the published numbers for their models.

  python -m experiments.reproduce_tables
  python -m experiments.reproduce_tables --model=DIR --text=WIKITEXT --seq_len=2048 \
      --paper_model=llama-2-7b --calibration_rows=128 --output=out/tables.jsonl

Without a checkpoint it uses the embedded default. The papers have no rows for it, but the order of
the methods can be compared. Each recipe is calibrated on `--seeds` different draws of the
calibration text, and perplexities are means over the draws; recipes without calibration run once.
The published numbers are on WikiText-2 (raw, test part) with windows of 2048 tokens, or of 4096
where marked. The papers' calibration texts differ (C4, the Pile).
As in the papers, perplexities are those of the weights widened to floating point;
`experiments.compress` has those of the fast products.

Device: any. Minutes: 25 on two cores for a model of 4 M parameters. `ORDERS` lists which method the
papers found better than which; each pair is printed with both perplexities and whether the order
holds.
"""

import dataclasses
import time

import jax
import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import common
from model import corpus
from model.compress import pipeline
from model.compress import recipe as recipe_module
from model.eval import perplexity, records
from model.eval.records import Metric, Record
from model.tokenizer import window_bos
from model.transformer import parameters

# Recipes by table. `--recipes` takes any others.
TABLES = {
  'weights': (
    'bf16 int4 int4_clip int4_asym gptq_int4 gptq_int4_asym awq_int4 hqq_int4 nf4 '
    'int3 int3_clip int3_asym gptq_int3 gptq_int3_asym gptq_int3_clip gptq_int3_once '
    'gptq_int3_blocks awq_int3 hqq_int3 int4_column gptq_int4_column autoround_int4 autoround_int3 '
    'int2 autoround_int2'
  ),
  'pruning': (
    'magnitude50 wanda50 sparsegpt50 magnitude_4of8 wanda_4of8 sparsegpt_4of8 '
    'magnitude_2of4 wanda_2of4 sparsegpt_2of4 wanda70 owl70 sparsegpt70 '
    'owl_sparsegpt70'
  ),
  'order of operations': (
    'sparsegpt_2of4_int4 sparsegpt_2of4_then_int4 gptq_int4_then_2of4 wanda_2of4_int4'
  ),
  'activations': 'w8a8 smoothquant_w8a8 w4a4 rotate_w4a4_nearest rotate_w4a4 rotate_w4a8',
}
# (better, worse, whether strictly): the orders that the papers found, and that we expect.
ORDERS = (
  ('gptq_int3', 'int3', True),
  ('awq_int3', 'int3_asym', True),
  ('gptq_int4', 'int4', False),
  ('awq_int4', 'int4_asym', False),
  ('int4_clip', 'int4', False),
  ('int3_clip', 'int3', False),
  ('gptq_int3_clip', 'gptq_int3', False),
  ('gptq_int3', 'gptq_int3_once', False),
  ('hqq_int3', 'int3', True),
  ('autoround_int4', 'int4', False),
  ('autoround_int3', 'int3', True),
  ('autoround_int2', 'int2', True),
  ('sparsegpt50', 'wanda50', False),
  ('wanda50', 'magnitude50', True),
  ('sparsegpt_2of4', 'wanda_2of4', False),
  ('wanda_2of4', 'magnitude_2of4', True),
  ('magnitude50', 'magnitude_4of8', True),
  ('magnitude_4of8', 'magnitude_2of4', True),
  ('wanda50', 'wanda_4of8', True),
  ('wanda_4of8', 'wanda_2of4', True),
  ('sparsegpt50', 'sparsegpt_4of8', True),
  ('sparsegpt_4of8', 'sparsegpt_2of4', True),
  ('sparsegpt_2of4_int4', 'sparsegpt_2of4_then_int4', False),
  ('owl70', 'wanda70', True),
  ('rotate_w4a4_nearest', 'w4a4', True),
)
# Lin et al. 2023 (AWQ), table 4; Sun et al. 2023 (Wanda; windows of 4096); Xiao et al. 2022
# (SmoothQuant), README of the code.
PUBLISHED = {
  'llama-2-7b': {
    'base': 5.47,
    'int3_asym': 6.66,
    'gptq_int3_asym': 6.42,
    'awq_int3': 6.24,
    'int4_asym': 5.73,
    'gptq_int4_asym': 5.63,
    'awq_int4': 5.60,
    'smoothquant_w8a8': 5.515,
    'magnitude50 (4096)': 14.89,
    'sparsegpt50 (4096)': 6.51,
    'wanda50 (4096)': 6.42,
    'magnitude_2of4 (4096)': 54.59,
    'sparsegpt_2of4 (4096)': 10.17,
    'wanda_2of4 (4096)': 11.02,
  },
  'llama-2-13b': {
    'base': 4.88,
    'int3_asym': 5.52,
    'gptq_int3_asym': 5.41,
    'awq_int3': 5.32,
    'int4_asym': 4.98,
    'gptq_int4_asym': 4.99,
    'awq_int4': 4.97,
    'smoothquant_w8a8': 4.929,
    'magnitude50 (4096)': 6.37,
    'sparsegpt50 (4096)': 5.63,
    'wanda50 (4096)': 5.56,
    'magnitude_2of4 (4096)': 8.33,
    'sparsegpt_2of4 (4096)': 8.32,
    'wanda_2of4 (4096)': 8.27,
  },
  'llama-7b': {
    'base': 5.68,
    'int3_asym': 7.01,
    'gptq_int3_asym': 6.53,
    'awq_int3': 6.35,
    'int4_asym': 5.96,
    'gptq_int4_asym': 5.83,
    'awq_int4': 5.78,
    'magnitude50': 17.29,
    'sparsegpt50': 7.22,
    'wanda50': 7.26,
  },
}

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file. Default: embedded.')
TEXT = flags.DEFINE_string('text', None, 'Text for calibration and evaluation.')
PAPER_MODEL = flags.DEFINE_enum(
  'paper_model', None, list(PUBLISHED), 'The model of the papers to print the numbers of.'
)
RECIPES = flags.DEFINE_list('recipes', None, f'Default: those of {", ".join(TABLES)}.')
SEEDS = flags.DEFINE_integer('seeds', 3, 'Draws of calibration text.', lower_bound=1)
ROWS = flags.DEFINE_integer('calibration_rows', 128, 'Rows per draw.', lower_bound=1)
SEQ_LEN = flags.DEFINE_integer('seq_len', 128, 'Tokens per row and per window.', lower_bound=2)
WINDOWS = flags.DEFINE_integer('max_windows', 1024, 'Held-out windows; 0: all.', lower_bound=0)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'The smallest base model and two recipes.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The model, the windows that it is evaluated on, and the draws of calibration rows."""

  model: object
  name: str
  windows: perplexity.Windows
  draws: list[np.ndarray]  # of calibration text, each [rows, length]
  base_ppl: float


def main() -> None:
  names = RECIPES.value or [name for table in TABLES.values() for name in table.split()]
  names = ['int3', 'gptq_int3'] if SMOKE.value else names
  recipes = [recipe_module.resolve(name, common.RECIPES) for name in names]
  setting = _setting()
  for one in recipes:
    pipeline.check(setting.model, one, setting.draws[0])
  published = PUBLISHED.get(PAPER_MODEL.value, {})
  print(f'{setting.name}: perplexity {setting.base_ppl:.4f}{_theirs("base", published)}')
  found = {}
  for one in recipes:
    record = _run(setting, one)
    found[one.name] = record
    print(f'{_words(record)}{_theirs(one.name, published)}', flush=True)
    if OUTPUT.value:
      records.append(OUTPUT.value, record)
  _print_orders(found)


def _setting() -> Setting:
  if MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), seed=0, smoke=SMOKE.value)
    model, tokenizer, texts = trained.model, trained.tokenizer, trained.texts
    length = min(SEQ_LEN.value, trained.about['plan']['seq_len'])
  else:
    model, tokenizer = common.load_model(MODEL.value)
    texts, length = corpus.load(TEXT.value), SEQ_LEN.value
  rows = 8 if SMOKE.value else ROWS.value
  bos_id = window_bos(tokenizer, model.config, 'auto')
  draws = [
    common.calibration_rows(tokenizer, texts, length, rows, seed, bos_id)
    for seed in range(SEEDS.value)
  ]
  limit = 8 if SMOKE.value else WINDOWS.value or None
  held_out = ''.join(texts.held_out)
  if limit:
    held_out = held_out[: 16 * limit * length]  # few tokens are longer than 16 characters
  windows = perplexity.windows(*tokenizer.encode_with_bytes(held_out), length, limit, bos_id)
  perplexity.check(model, windows)
  base = perplexity.evaluate(model, windows, progress=common.labelled('base: evaluate'))
  return Setting(
    model=model,
    name=MODEL.value or 'embedded default',
    windows=windows,
    draws=draws,
    base_ppl=base.ppl,
  )


def _run(setting: Setting, one) -> Record:
  calibrated = any(pipeline.calibrated(step) for step in one.steps)
  draws = setting.draws if calibrated else [None]
  ppls, seconds, events = [], [], []
  for seed, rows_BT in enumerate(draws):
    start = time.perf_counter()
    progress = common.labelled(f'{one.name}, draw {seed}')
    model, ledger = pipeline.compress(setting.model, one, rows_BT, progress=progress)
    jax.block_until_ready([p.get_value() for p in parameters(model).values()])
    seconds.append(time.perf_counter() - start)
    ppls.append(perplexity.evaluate(model, setting.windows, progress=progress).ppl)
    events += ledger.events
  spread = float(np.ptp(ppls))
  matrices = [row for row in ledger.layers if row.layer.startswith('layers.')]
  bits = 8 * sum(row.stored_bytes for row in matrices) / sum(np.prod(r.shape) for r in matrices)
  return Record(
    experiment='reproduce_tables',
    recipe=one.name,
    command=common.command(),
    config={
      'model': setting.name,
      'recipe': one.to_dict(),
      'seq_len': setting.windows.seq_len,
      'bos': setting.windows.bos,
      'windows': len(setting.windows.tokens_BT),
      'calibration_rows': 0 if draws[0] is None else len(draws[0]),
      'draws_ppl': ppls,
      'products': 'widened',
    },
    environment=records.environment(),
    seed=0,
    metrics={
      'ppl': Metric(np.mean(ppls), '1', len(ppls), spread),
      'ppl_ratio': Metric(np.mean(ppls) / setting.base_ppl, '1', len(ppls)),
      'bits_per_weight': Metric(bits, 'bit'),
      'compress_s': Metric(np.median(seconds), 's', len(seconds)),
    },
    ledger=tuple(
      {'layer': e.layer, 'event': f'{e.technique}: {e.event}', 'detail': e.detail} for e in events
    ),
    notes=('the spread of the perplexity is the range over the draws of calibration text',),
  )


def _words(record: Record) -> str:
  ppl = record.metrics['ppl']
  return (
    f'{record.recipe:26} {record.value("bits_per_weight"):6.3f} bits  perplexity {ppl.value:9.4f} '
    f'± {(ppl.spread or 0) / 2:.4f}  x {record.value("ppl_ratio"):.4f}  '
    f'{record.value("compress_s"):6.1f} s'
  )


def _theirs(name: str, published) -> str:
  found = [
    f'{key.removeprefix(name).strip()} {value}'
    for key, value in published.items()
    if key == name or key.startswith(f'{name} (')
  ]
  return f'  published:{" ".join([" " + text.strip() for text in found])}' if found else ''


def _print_orders(found) -> None:
  rows = [order for order in ORDERS if order[0] in found and order[1] in found]
  if rows:
    print('\norders:')
  for better, worse, strictly in rows:
    a, b = (found[name].value('ppl') for name in (better, worse))
    holds = a < b if strictly else a <= b
    sign = '<' if strictly else '<='
    print(
      f'  {better} {sign} {worse}: {a:.4f} and {b:.4f}: {"holds" if holds else "DOES NOT HOLD"}'
    )


if __name__ == '__main__':
  common.run(main)
