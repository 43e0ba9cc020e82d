r"""Measures the prefill and decode speed of a model in each format, beside the memory's bandwidth.

  python -m experiments.benchmark_decode
  python -m experiments.benchmark_decode --batches=1,2,4,8,16,32 --recipes=int8 --figure=batches.png
  python -m experiments.benchmark_decode --peer='python -m experiments.peers.transformers_speed'
  python -m experiments.benchmark_decode --peer='python -m experiments.peers.llama_cpp_speed'
  python -m experiments.benchmark_decode --preset=olmoe-1b-7b --layers=4 --dtype=bfloat16 \
    --recipes=int8,int4 --peer='python -m experiments.peers.llama_cpp_speed \
    --preset=olmoe-1b-7b --layers=4'

The model is a preset with random weights (`--preset`, `--scale`, `--layers`, `--untie`) or a
checkpoint (`--model`, which both peers take, too). Each round times every recipe and then runs
every peer in a process of its own, so that both sides run under the same load; ratios are medians
of the rounds' ratios. A peer is a command that prints one JSON line per configuration with the keys
peer, weights, prefill_tokens_per_s and decode_tokens_per_s. It is timed at batch 1.

`prefill` computes the logits of the last token, as generation needs them; `forward` those of all
tokens. `decode` runs without interruption; in `stream`, as in `generate`, Python reads the tokens
of each call before the next call. The time spent in Python and in dispatching is reported as an
upper bound: the `stream` time of a model with equally many layers and almost no arithmetic.

The bytes of a decode step are those that it must read: of experts, those of the tokens at hand
(`model.eval.cost.touched`). Records have the bytes of all weights beside them.

Device: any. Minutes: 4 on two cores. Found there, with an AVX-512 processor: bf16 decodes 2.4, int8
3.4, int4 6.1 and 2:4 in bf16 3.2 times as fast as float32.
"""

import collections
import dataclasses
import pathlib
import shlex

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import common, peer_command, shapes, study
from model import hf, presets, rounds
from model.compress import pipeline
from model.compress import recipe as recipe_module
from model.compress.recipe import Recipe
from model.config import ModelConfig
from model.eval import cost, records, timing
from model.eval.records import BASE, Metric, Record
from model.infer import bench
from model.infer.prepare import prepare
from model.transformer import Transformer, parameters

PHASES = {'prefill': 'prompt', 'forward': 'prompt', 'decode': 'tokens', 'stream': 'tokens'}

SHAPE = shapes.define()
MODEL = flags.DEFINE_string('model', None, 'A folder, hub id or .gguf file, instead of a preset.')
RECIPES = flags.DEFINE_list(
  'recipes', ['bf16', 'int8', 'int4'], 'Recipes to time beside the base, on the head too.'
)
PEERS = flags.DEFINE_multi_string('peer', [], 'A command to time in every round; may be repeated.')
PROMPT = flags.DEFINE_integer('prompt', 512, 'Tokens of the prompt.', lower_bound=1)
TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens to decode per round.', lower_bound=1)
BATCHES = flags.DEFINE_list('batches', ['1'], 'Batch sizes.')
KV_CACHE = common.define_kv_cache('bf16', 'The key/value cache.')
DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Type of the base model and of all activations.'
)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
FIGURE = flags.DEFINE_string('figure', None, 'A PNG to draw tokens/s over the batch size into.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny model, one recipe, few tokens.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """The base model, the recipes, and the lengths and batch sizes that are timed."""

  base: Transformer
  recipes: tuple[Recipe, ...]
  prompt: int
  tokens: int
  batches: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """One model in one format at one batch size, compiled."""

  recipe: str
  batch: int
  bench: bench.Bench
  bytes_per_step: float
  stored_bytes: int
  missing: study.MissingKernels


def main() -> None:
  setting = _setting()
  subjects = [
    _subject(name, model, setting, batch)
    for name, model in _models(setting)
    for batch in setting.batches
  ]
  bandwidth = timing.copy_bandwidth(buffer_bytes=2**20 if SMOKE.value else None)
  outside_s = _outside_s(setting.base.config)
  samples = _rounds(subjects, setting)
  results = [_record(s, samples, setting, bandwidth, outside_s) for s in subjects]
  results += _peer_records(samples, setting)
  for record in results:
    print(_words(record))
    if OUTPUT.value:
      records.append(OUTPUT.value, record)
  if FIGURE.value:
    _draw([r for r in results if r.experiment == 'benchmark_decode'], FIGURE.value)


def _setting() -> Setting:
  names = ['int4'] if SMOKE.value else [name for name in RECIPES.value if name]
  recipes = [recipe_module.resolve(name, common.RECIPES) for name in names]
  for recipe in recipes:
    if any(step.row.statistics for step in recipe.steps):
      raise ValueError(
        f'{recipe.name} needs calibration, and there is no text here; the speed depends only on '
        'the format, so time the recipe that rounds to nearest'
      )
  for command in PEERS.value:
    if not shlex.split(command):
      raise ValueError('--peer must be a command, not an empty string')
  try:
    batches = tuple(map(int, BATCHES.value))
  except ValueError:
    raise ValueError(f'--batches must be integers, not {",".join(BATCHES.value)}') from None
  for batch in batches:
    common.check_positive(batches=batch)
  return Setting(
    base=_base(),
    recipes=tuple(dataclasses.replace(recipe, head=True) for recipe in recipes),
    prompt=16 if SMOKE.value else PROMPT.value,
    tokens=4 if SMOKE.value else TOKENS.value,
    batches=batches,
  )


def _base() -> Transformer:
  if MODEL.value:
    return hf.load_pretrained(MODEL.value, dtype=jnp.dtype(DTYPE.value))[0]
  config = presets.preset('tiny-llama') if SMOKE.value else shapes.config(SHAPE)
  return Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(DTYPE.value))


def _models(setting: Setting):
  yield BASE, setting.base
  for recipe in setting.recipes:
    progress = common.labelled(f'{recipe.name}: compress')
    yield recipe.name, pipeline.compress(setting.base, recipe, progress=progress)[0]


def _subject(name, model, setting, batch) -> Subject:
  ready = prepare(model)
  stored = {path: param.get_value() for path, param in parameters(ready).items()}
  context = setting.prompt + setting.tokens // 2
  held = (context, model.dtype, KV_CACHE.value)
  own = bench.prepare(
    ready,
    batch=batch,
    prompt_length=setting.prompt,
    steps=setting.tokens,
    cache_format=KV_CACHE.value,
  )
  return Subject(
    recipe=name,
    batch=batch,
    bench=own,
    bytes_per_step=cost.decode_bytes_per_step(model.config, stored, *held, batch=batch),
    stored_bytes=sum(w.nbytes for w in stored.values()),
    missing=study.missing_kernels(model, ready),
  )


def _outside_s(config: ModelConfig) -> float:
  """Returns the seconds per token of decoding with as many parameters and almost no arithmetic."""
  small = tuple(
    layer.with_mixer(query_heads=1, kv_heads=1, head_width=8).with_ffn(width=8)
    for layer in config.layers
  )
  shape = config.replace(width=8, vocab_size=8, layers=small)
  twin = Transformer(shape, rngs=nnx.Rngs(0), dtype=jnp.dtype(DTYPE.value))
  own = bench.prepare(twin, prompt_length=8, steps=64)
  return timing.time_interleaved({'stream': own.stream})['stream'].median_s / own.steps


def _rounds(subjects, setting) -> dict[tuple[str, int, str], list[float]]:
  """Measures tokens/s: (recipe or peer, batch, phase) -> one number per round."""
  samples = collections.defaultdict(list)
  for subject in subjects:
    for phase in PHASES:
      for _ in range(rounds.MIN_WARMUP):
        jax.block_until_ready(getattr(subject.bench, phase)())
  for turn in common.progress(range(ROUNDS.value), 'rounds'):
    for subject in [*subjects[turn:], *subjects[:turn]]:
      for phase, amount in PHASES.items():
        seconds = rounds.seconds(getattr(subject.bench, phase))
        rate = subject.batch * getattr(setting, amount) / seconds
        samples[subject.recipe, subject.batch, phase].append(rate)
    for command in PEERS.value:
      for line in peer_command.run(command):
        name = f'{line["peer"]} {line["weights"]}'
        samples[name, 1, 'prefill'].append(line['prefill_tokens_per_s'])
        samples[name, 1, 'decode'].append(line['decode_tokens_per_s'])
  return samples


def _record(subject: Subject, samples, setting, bandwidth: Metric, outside_s) -> Record:
  metrics = {}
  for phase in PHASES:
    rates = samples[subject.recipe, subject.batch, phase]
    base = samples[BASE, subject.batch, phase]
    metrics[f'{phase}_tokens_per_s'] = timing.summarize(rates, 'token/s')
    metrics[f'{phase}_speedup'] = timing.summarize(np.divide(rates, base), '1')
    for name, batch, peer_phase in list(samples):
      if peer_phase == phase and name not in _own_names(setting) and subject.batch == batch:
        ratios = np.divide(rates, samples[name, batch, phase])
        metrics[f'{phase} / {name}'] = timing.summarize(ratios, '1')
  steps = metrics['decode_tokens_per_s']
  moved = subject.bytes_per_step / subject.batch
  metrics['stored_bytes'] = Metric(subject.stored_bytes, 'byte')
  metrics['decode_bytes_per_step'] = Metric(subject.bytes_per_step, 'byte')
  metrics['decode_bytes_per_s'] = Metric(moved * steps.value, 'byte/s', steps.n)
  metrics['copy_bandwidth_bytes_per_s'] = bandwidth
  metrics['decode_of_copy'] = Metric(moved * steps.value / bandwidth.value, '1', steps.n)
  metrics['outside_program_s_per_token'] = Metric(outside_s, 's')
  return Record(
    experiment='benchmark_decode',
    recipe=subject.recipe,
    command=common.command(),
    config=_config(setting) | {'batch': subject.batch},
    environment=records.environment(),
    seed=0,
    metrics=metrics,
    without_kernel=subject.missing.count,
    notes=subject.missing.notes,
  )


def _own_names(setting) -> set[str]:
  return {BASE, *(recipe.name for recipe in setting.recipes)}


def _peer_records(samples, setting) -> list[Record]:
  found = collections.defaultdict(dict)
  for (name, _, phase), rates in samples.items():
    if name not in _own_names(setting):
      found[name][f'{phase}_tokens_per_s'] = timing.summarize(rates, 'token/s')
  return [
    Record(
      experiment='benchmark_decode peer',
      recipe=name,
      command=common.command(),
      config={'peers': list(PEERS.value), 'batch': 1},
      environment=records.environment(),
      seed=None,
      metrics=metrics,
    )
    for name, metrics in found.items()
  ]


def _config(setting) -> dict:
  model = pathlib.Path(MODEL.value).name if MODEL.value else SHAPE['preset'].value
  count = cost.parameters(setting.base.config)
  return {
    'model': 'tiny-llama' if SMOKE.value else model,
    'scale': SHAPE['scale'].value,
    'layers': len(setting.base.config.layers),
    'parameters': count.total,
    'active_parameters': count.active,
    'tied': setting.base.config.tied,
    'prompt': setting.prompt,
    'tokens': setting.tokens,
    'kv_cache': KV_CACHE.value,
    'dtype': DTYPE.value,
  }


def _words(record: Record) -> str:
  speed = {
    phase: record.metrics[f'{phase}_tokens_per_s']
    for phase in PHASES
    if f'{phase}_tokens_per_s' in record.metrics
  }
  parts = [f'{phase} {m.value:.1f} ± {(m.spread or 0) / 2:.1f}' for phase, m in speed.items()]
  line = f'{record.recipe}, batch {record.config["batch"]}, tokens/s: {", ".join(parts)}'
  if 'decode_of_copy' not in record.metrics:
    return line
  against = [f'{key} {m.value:.2f}' for key, m in record.metrics.items() if ' / ' in key]
  outside_ms = 1e3 * record.value('outside_program_s_per_token')
  return '\n  '.join(
    [
      line,
      f'decode {record.value("decode_speedup"):.2f} x {BASE}, '
      f'{record.value("decode_bytes_per_step") / 1e6:,.0f} of '
      f'{record.value("stored_bytes") / 1e6:,.0f} MB per step, '
      f'{record.value("decode_bytes_per_s") / 1e9:.1f} GB/s '
      f'({record.value("decode_of_copy"):.0%} of copy); outside the program at most '
      f'{outside_ms:.2f} ms per token',
      *against,
      *record.notes,
    ]
  )


def _draw(results: list[Record], path: str) -> None:
  """Draws tokens/s over the batch size, one line per recipe."""
  lines = collections.defaultdict(list)
  for record in results:
    speed = record.metrics['decode_tokens_per_s']
    lines[record.recipe].append((record.config['batch'], speed.value, (speed.spread or 0) / 2))
  figure = Figure(figsize=(6, 4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for name, rows in lines.items():
    batches, values, spreads = zip(*sorted(rows))
    axes.errorbar(batches, values, spreads, marker='o', capsize=2, label=name)
  axes.set(xscale='log', yscale='log', xlabel='batch size', ylabel='tokens/s')
  axes.set_xticks(batches, [str(batch) for batch in batches])
  axes.minorticks_off()
  axes.legend()
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  common.run(main)
