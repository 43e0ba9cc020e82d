r"""Measures exact attention of long prompts beside torch's `scaled_dot_product_attention`.

  python -m experiments.benchmark_attention --output=out/attention.jsonl
  python -m experiments.benchmark_attention --lengths=4096,16384 --window=1024 --heads=8x4x64

For each number of heads, all lengths and implementations are timed in interleaved rounds: `auto`
(what `ops.attention.attention` picks, on a CPU the native kernel), `blocked` (the jnp form) and, if
torch is installed and there is no window, `torch`. `speedup` is torch's time over ours in the same
round, and `growth` our time per token over that of the shortest length. Queries, keys and values
are causal, of one row, in --dtype; torch has as many threads as there are cores.

Device: a CPU. Minutes: 4 on two cores. The goals are a speed-up of at least 1 at 2,048 and 8,192
tokens, and with a window of 1,024 a growth of at most 1.25 from 4,096 to 16,384 tokens.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os

import jax
import numpy as np
from absl import flags

from experiments import common
from model.eval import records, timing
from ops import attention, masks
from ops.patterns import Window

HEADS = flags.DEFINE_list(
  'heads', ['8x4x64', '8x8x128'], 'Query heads, key heads and width, as 8x4x64.'
)
LENGTHS = flags.DEFINE_list('lengths', ['2048', '8192'], 'Tokens.')
WINDOW = flags.DEFINE_integer('window', None, 'Keys that a query sees.', lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the arrays.')
BLOCKED = flags.DEFINE_bool('blocked', True, 'Time the jnp form in blocks too.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'Two short texts.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
  """The heads of a layer."""

  query_heads: int
  kv_heads: int
  head_width: int


def main() -> None:
  lengths = [64, 130] if SMOKE.value else _lengths()
  for heads in [Heads(query_heads=4, kv_heads=2, head_width=16)] if SMOKE.value else _heads():
    for record in _measure(heads, lengths):
      print(_words(record))
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def _lengths() -> list[int]:
  try:
    lengths = sorted(map(int, LENGTHS.value))
  except ValueError as error:
    raise ValueError(f'--lengths must be integers, not {LENGTHS.value}') from error
  common.check_positive(lengths=lengths[0])
  return lengths


def _heads() -> list[Heads]:
  try:
    numbers = [tuple(map(int, heads.split('x'))) for heads in HEADS.value]
    all_ = [Heads(query_heads=n, kv_heads=k, head_width=h) for n, k, h in numbers]
  except ValueError as error:
    raise ValueError(f'--heads must be like 8x4x64, not {HEADS.value}') from error
  for heads in all_:
    common.check_positive(**dataclasses.asdict(heads))
  return all_


def _measure(heads: Heads, lengths: list[int]) -> list[records.Record]:
  calls = {}
  for length in lengths:
    calls |= {f'{name} {length}': call for name, call in _calls(heads, length).items()}
  times = timing.time_interleaved(calls, rounds=ROUNDS.value)
  return [_record(heads, length, lengths[0], times) for length in lengths]


def _calls(heads: Heads, length: int) -> dict:
  keys = jax.random.split(jax.random.key(0), 3)
  counts = (heads.query_heads, heads.kv_heads, heads.kv_heads)
  arrays = [
    jax.random.normal(key, (1, length, count, heads.head_width), DTYPE.value)
    for key, count in zip(keys, counts)
  ]
  mask = masks.causal(1, length, pattern=WINDOW.value and Window(WINDOW.value))
  names = ('auto', 'blocked') if BLOCKED.value else ('auto',)
  calls = {name: functools.partial(_attend, *arrays, mask, impl=name) for name in names}
  if WINDOW.value is None and importlib.util.find_spec('torch') is not None:
    calls['torch'] = _torch(arrays)
  return calls


@functools.partial(jax.jit, static_argnames='impl')
def _attend(q_BTNH, k_BSKH, v_BSKH, mask, impl):
  scale = q_BTNH.shape[-1] ** -0.5
  return attention.attention(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, impl=impl)


def _torch(arrays):
  torch = importlib.import_module('torch')
  torch.set_num_threads(os.cpu_count())
  floats = (torch.tensor(np.asarray(a, np.float32)).transpose(1, 2) for a in arrays)
  q, k, v = (a.to(getattr(torch, DTYPE.value)) for a in floats)
  attend = torch.nn.functional.scaled_dot_product_attention
  return torch.no_grad()(
    functools.partial(attend, q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
  )


def _record(heads: Heads, length: int, shortest: int, times) -> records.Record:
  own = times[f'auto {length}'].samples_s
  metrics = {'auto time': timing.summarize(own, 's')}
  for name in ('blocked', 'torch'):
    if f'{name} {length}' in times:
      other = times[f'{name} {length}'].samples_s
      metrics[f'{name} time'] = timing.summarize(other, 's')
      metrics[f'speedup over {name}'] = timing.summarize(np.divide(other, own), '1')
  per_token = np.divide(own, times[f'auto {shortest}'].samples_s) * shortest / length
  metrics['growth'] = timing.summarize(per_token, '1')
  picked = _picked(heads, length)
  return records.Record(
    experiment='benchmark_attention',
    recipe=picked,
    command=common.command(),
    config={
      **dataclasses.asdict(heads),
      'length': length,
      'window': WINDOW.value,
      'dtype': DTYPE.value,
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
    without_kernel=int(picked in ('reference', 'blocked')),
  )


def _picked(heads: Heads, length: int) -> str:
  q, k = (
    jax.ShapeDtypeStruct((1, length, count, heads.head_width), DTYPE.value)
    for count in (heads.query_heads, heads.kv_heads)
  )
  mask = masks.causal(1, length, pattern=WINDOW.value and Window(WINDOW.value))
  return attention.pick(q, k, mask, platform=jax.default_backend())


def _words(record: records.Record) -> str:
  config, metrics = record.config, record.metrics
  heads = 'x'.join(str(config[name]) for name in ('query_heads', 'kv_heads', 'head_width'))
  window = f', window {config["window"]:,}' if config['window'] else ''
  parts = [f'{record.recipe} {record.value("auto time") * 1e3:,.1f} ms']
  for name in ('blocked', 'torch'):
    if f'{name} time' in metrics:
      speedup = metrics[f'speedup over {name}']
      parts.append(
        f'{name} {record.value(f"{name} time") * 1e3:,.1f} ms '
        f'({speedup.value:.2f} ± {(speedup.spread or 0) / 2:.2f})'
      )
  parts.append(f'growth {record.value("growth"):.2f}')
  return f'{heads}, {config["length"]:,} tokens{window}, {config["dtype"]}: ' + '; '.join(parts)


if __name__ == '__main__':
  common.run(main)
