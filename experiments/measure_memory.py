r"""Measures the memory that compression needs beyond the model itself, in units of one block.

  python -m experiments.measure_memory
  python -m experiments.measure_memory --shapes=1024x4,1024x8,2048x3 --recipes=gptq_int4

The models have random float32 weights and Llama's proportions; WIDTHxBLOCKS gives their size. Each
is compressed in place, in a process of its own. Two blocks of the same shape are compressed first,
so that everything is compiled. Then the increase of the process's resident memory, from the loaded
model to the peak, is divided by the bytes of one block. It includes the hidden states of the
calibration rows, which are also reported separately; there are few rows to keep them small.

glibc does not return freed buffers of up to 32 MB to the system, which can add up to several
blocks. This script sets MALLOC_MMAP_THRESHOLD_ for its processes, so that they are returned; set it
too when memory is scarce.

Device: a CPU under Linux. Minutes: 5. Expected: GPTQ 2.5 blocks, however deep the model is.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments import common, resident
from model import presets
from model.compress import pipeline
from model.compress import recipe as recipe_module
from model.config import ModelConfig
from model.eval import records
from model.eval.records import Metric, Record
from model.transformer import Transformer, parameters

HEAD_WIDTH = 64
FFN_RATIO = 2.75
VOCAB_SIZE = 256

SHAPES = flags.DEFINE_list('shapes', ['1024x4', '1024x8', '1536x4'], 'WIDTHxBLOCKS of each model.')
RECIPES = flags.DEFINE_list('recipes', ['gptq_int4', 'wanda_2of4', 'int4'], 'Recipes to apply.')
ROWS = flags.DEFINE_integer('calibration_rows', 16, 'Rows of calibration text.', lower_bound=1)
SEQ_LEN = flags.DEFINE_integer('seq_len', 128, 'Tokens per row.', lower_bound=2)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'One small shape and recipe.')
CHILD = flags.DEFINE_string('child', None, 'Internal: the SHAPE:RECIPE to measure here.')


def main() -> None:
  if CHILD.value:
    shape, recipe = CHILD.value.split(':')
    print(json.dumps(_measure(shape, recipe)))
    return
  if not resident.is_known():
    raise ValueError('the peak of resident memory is read from /proc, which only Linux has')
  shapes = ['128x3'] if SMOKE.value else SHAPES.value
  for shape in shapes:
    _config(shape)
  names = ['int4'] if SMOKE.value else RECIPES.value
  for name in names:
    recipe_module.resolve(name, common.RECIPES)
  for name in names:
    for shape in shapes:
      record = _record(shape, name, _child(shape, name))
      print(_words(record), flush=True)
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def _config(shape: str) -> ModelConfig:
  """Builds the config of WIDTHxBLOCKS. Raises ValueError if it is malformed."""
  try:
    width, blocks = map(int, shape.split('x'))
  except ValueError:
    raise ValueError(f'--shapes has {shape!r}; a shape is WIDTHxBLOCKS, such as 1024x4') from None
  if width < 1 or width % HEAD_WIDTH or blocks < 1:
    raise ValueError(f'--shapes has {shape!r}; a width is a multiple of {HEAD_WIDTH}')
  base = presets.preset('tiny-llama')
  heads = width // HEAD_WIDTH
  layer = base.layers[0].with_ffn(width=int(FFN_RATIO * width))
  layer = layer.with_mixer(query_heads=heads, kv_heads=heads, head_width=HEAD_WIDTH)
  return base.replace(width=width, layers=(layer,) * blocks, vocab_size=VOCAB_SIZE)


def _child(shape: str, recipe: str) -> dict:
  command = [
    *(sys.executable, '-m', 'experiments.measure_memory', f'--child={shape}:{recipe}'),
    *(f'--calibration_rows={ROWS.value}', f'--seq_len={SEQ_LEN.value}'),
  ]
  environment = os.environ | resident.ENVIRONMENT
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  if done.returncode:
    raise ValueError(f'{shape} with {recipe} failed: {done.stderr.strip()[-500:]}')
  return json.loads(done.stdout.splitlines()[-1])


def _measure(shape: str, name: str) -> dict:
  """Compresses two blocks, then the model, and returns the process's peak and sizes in bytes."""
  config, recipe = _config(shape), recipe_module.resolve(name, common.RECIPES)
  tokens_BT = np.random.default_rng(0).integers(0, VOCAB_SIZE, (ROWS.value, SEQ_LEN.value))
  _compress(config.replace(layers=config.layers[:2]), recipe, tokens_BT)
  model = Transformer(config, rngs=nnx.Rngs(0))
  jax.block_until_ready(nnx.state(model))
  found = {
    'model_bytes': _bytes(model),
    'block_bytes': _bytes(model.layers[0]),
    'hidden_bytes': tokens_BT.size * config.width * 4,
  }
  resident.reset_peak()
  held = resident.peak_bytes()  # the same counter as below, which only rises from here on
  pipeline.compress(model, recipe, tokens_BT, in_place=True)
  return found | {'extra_bytes': resident.peak_bytes() - held}


def _bytes(module: nnx.Module) -> int:
  return sum(param.get_value().nbytes for param in parameters(module).values())


def _compress(config, recipe, tokens_BT):
  pipeline.compress(Transformer(config, rngs=nnx.Rngs(0)), recipe, tokens_BT, in_place=True)


def _record(shape: str, name: str, found: dict) -> Record:
  metrics = {key: Metric(value, 'byte', 1) for key, value in found.items()}
  metrics['extra_blocks'] = Metric(found['extra_bytes'] / found['block_bytes'], '1', 1)
  return Record(
    experiment='measure_memory',
    recipe=name,
    command=common.command(),
    config={'shape': shape, 'calibration_rows': ROWS.value, 'seq_len': SEQ_LEN.value},
    environment=records.environment(),
    seed=0,
    metrics=metrics,
  )


def _words(record: Record) -> str:
  megabytes = {key: metric.value / 2**20 for key, metric in record.metrics.items()}
  return (
    f'{record.recipe}, {record.config["shape"]}: {megabytes["extra_bytes"]:.0f} MB beyond '
    f'the model, {record.value("extra_blocks"):.2f} blocks of {megabytes["block_bytes"]:.0f} MB '
    f'(hidden states {megabytes["hidden_bytes"]:.0f} MB of it)'
  )


if __name__ == '__main__':
  common.run(main)
