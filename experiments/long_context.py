r"""Measures what a long text costs: prefill, decoding and memory, by context, mixer and cache.

  python -m experiments.long_context
  python -m experiments.long_context --contexts=1024,4096,16384,65536 --mixers=window1024 \
    --kv_caches=float,int8 --output=out/long.jsonl --figure=out/long.png

The model is a preset with random weights; only time and memory are measured. The mixers:

  dense             every query sees all tokens before it
  window1024        every query of every layer sees so many tokens, itself included, and the cache
                    holds no more; so for all sparse patterns, joined by + (ops/patterns.py)

Rounds are interleaved among the mixers and caches of a context. `prefill` reads a prompt that is as
long as the context, `decode` writes --tokens tokens after it. Memory is the compiled programs' own
account, with the weights.

Device: any. Minutes: 6 on two CPU cores.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import common, shapes
from model import cache_spec, presets, rounds
from model.config import ModelConfig
from model.eval import records, timing
from model.eval.records import Metric, Record
from model.infer import bench
from model.infer.bench import Bench
from model.transformer import Transformer
from ops import patterns
from ops.patterns import Pattern

SHAPE = shapes.define()
CONTEXTS = flags.DEFINE_list('contexts', ['1024', '4096', '16384'], 'Tokens of the prompts.')
MIXERS = flags.DEFINE_list('mixers', ['dense', 'window1024'], 'dense, or sparse patterns.')
CACHES = flags.DEFINE_list('kv_caches', ['float', 'int8'], f'Of {cache_spec.FORMS}.')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of the model.')
TOKENS = flags.DEFINE_integer('tokens', 32, 'Tokens to decode per round.', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
FIGURE = flags.DEFINE_string('figure', None, 'A PNG to draw the costs over the context into.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny model and short texts.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model whose layers have one mixer, with one format of its cache."""

  mixer: str
  kv_cache: str
  context: int

  @property
  def pattern(self) -> Pattern | None:
    return None if self.mixer == 'dense' else patterns.parse(self.mixer)


def main() -> None:
  shape = presets.preset('tiny-llama') if SMOKE.value else shapes.config(SHAPE)
  cases = _cases()
  found = []
  for _, of_one in itertools.groupby(cases, lambda case: case.context):
    found += _measure(shape, list(of_one))
  if FIGURE.value:
    _draw(found, FIGURE.value)


def _cases() -> list[Case]:
  contexts = ['32', '64'] if SMOKE.value else CONTEXTS.value
  mixers = ['dense', 'window8'] if SMOKE.value else MIXERS.value
  try:
    lengths = sorted(map(int, contexts))
  except ValueError:
    raise ValueError(f'--contexts must be integers, not {",".join(contexts)}') from None
  for length in lengths:
    common.check_positive(contexts=length)
  for name in mixers:
    if name != 'dense':
      _parsed(name)
  for name in CACHES.value:
    cache_spec.of(name)
  product = itertools.product(lengths, mixers, CACHES.value)
  return [Case(context=n, mixer=mixer, kv_cache=name) for n, mixer, name in product]


def _parsed(name: str) -> Pattern:
  try:
    return patterns.parse(name)
  except ValueError as error:
    raise ValueError(f'--mixers: {error}; or dense') from None


def _measure(shape: ModelConfig, cases: list[Case]) -> list[Record]:
  """Times all cases of one context in turn."""
  benches = {case: _bench(shape, case) for case in cases}
  calls = {
    (case, phase): getattr(one, phase)
    for case, one in benches.items()
    for phase in ('prefill', 'decode')
  }
  for call in calls.values():
    for _ in range(rounds.MIN_WARMUP if cases[0].context < 4096 else 1):
      jax.block_until_ready(call())
  samples = {key: [] for key in calls}
  for _ in common.progress(range(ROUNDS.value), f'{cases[0].context} tokens'):
    for key, call in calls.items():
      samples[key].append(rounds.seconds(call))
  found = [_record(shape, case, benches[case], samples, cases[0]) for case in cases]
  for record in found:
    print(_words(record), flush=True)
    if OUTPUT.value:
      records.append(OUTPUT.value, record)
  return found


def _bench(shape: ModelConfig, case: Case) -> Bench:
  layers = tuple(layer.with_mixer(window=None, sparse=case.pattern) for layer in shape.layers)
  needed = case.context + TOKENS.value
  config = shape.replace(layers=layers, max_positions=max(shape.max_positions, needed))
  return bench.prepare(
    Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(DTYPE.value)),
    prompt_length=case.context,
    steps=4 if SMOKE.value else TOKENS.value,
    cache_format=case.kv_cache,
  )


def _record(shape, case: Case, own: Bench, samples, base: Case) -> Record:
  prefill_s, decode_s = (np.array(samples[case, phase]) for phase in ('prefill', 'decode'))
  metrics = {
    'prefill_s': timing.summarize(prefill_s, 's'),
    'prefill_tokens_per_s': timing.summarize(case.context / prefill_s, 'token/s'),
    'decode_tokens_per_s': timing.summarize(own.steps / decode_s, 'token/s'),
    'cache_bytes': Metric(own.cache_bytes, 'byte'),
    'prefill_peak_bytes': Metric(own.prefill_peak_bytes, 'byte'),
    'decode_peak_bytes': Metric(own.decode_peak_bytes, 'byte'),
  }
  for phase, seconds in (('prefill', prefill_s), ('decode', decode_s)):
    speedup = np.divide(samples[base, phase], seconds)
    metrics[f'{phase}_speedup'] = timing.summarize(speedup, '1')
  return Record(
    experiment='long_context',
    recipe=f'{case.mixer}, {case.kv_cache}',
    command=common.command(),
    config={
      **dataclasses.asdict(case),
      'model': 'tiny-llama' if SMOKE.value else SHAPE['preset'].value,
      'layers': len(shape.layers),
      'dtype': DTYPE.value,
      'tokens': own.steps,
      'base': f'{base.mixer}, {base.kv_cache}',
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
  )


def _words(record: Record) -> str:
  value = record.value
  return (
    f'{record.config["context"]:>6} tokens, {record.recipe:<18} prefill {value("prefill_s"):8.3f} s'
    f' ({value("prefill_speedup"):.2f} x), decode {value("decode_tokens_per_s"):7.1f} tokens/s'
    f' ({value("decode_speedup"):.2f} x), cache {value("cache_bytes") / 1e6:8.1f} MB, '
    f'prefill holds {value("prefill_peak_bytes") / 1e6:8.1f} MB'
  )


def _draw(found: list[Record], path: str) -> None:
  panels = {
    'prefill, s': lambda r: r.value('prefill_s'),
    'decode, tokens/s': lambda r: r.value('decode_tokens_per_s'),
    'cache, MB': lambda r: r.value('cache_bytes') / 1e6,
  }
  figure = Figure(figsize=(10, 3.2), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (title, of) in zip(figure.subplots(1, len(panels)), panels.items()):
    for name in dict.fromkeys(record.recipe for record in found):
      rows = [record for record in found if record.recipe == name]
      axes.plot([r.config['context'] for r in rows], [of(r) for r in rows], marker='o', label=name)
    axes.set(title=title, xlabel='context, tokens', xscale='log', yscale='log')
    contexts = sorted({record.config['context'] for record in found})
    axes.set_xticks(contexts, [f'{context:,}' for context in contexts])
    axes.minorticks_off()
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  common.run(main)
