r"""Measures products of groups of rows, each with its own expert, beside `jax.lax.ragged_dot`.

  python -m experiments.benchmark_grouped --output=out/grouped.jsonl
  python -m experiments.benchmark_grouped --shapes=64x2048x1024 --rows=8,64 --formats=bf16,int4

For each shape, number of rows, sizes of the groups and format, it times one product of each kind in
interleaved rounds: `ragged_dot` of the float32 experts, `dense` (all rows with one expert, as many
multiplications as are needed), `blocks` (ops/grouped.py: a loop over blocks of rows), on a GPU `at
once` (all blocks in a batch) and, where experts are packed for the CPU, `native`. Speed-ups are
those over `ragged_dot` in the same round; the bytes per second count the experts that have rows.
With --dtype=bfloat16 rows and the experts of `ragged_dot` and `dense` have that type. Among the
formats, the one of that type has its gradients timed too, beside those of `ragged_dot`.

The groups are `even`, `uniform` (each row chooses at random), `zipf` (expert e is chosen with a
probability proportional to 1 / e) or `one` (all rows choose the same).

Device: any. Minutes: 1 on two cores. The goal is 5 times ragged_dot at 2,048 rows, 16 experts,
256 inputs and 512 outputs, which is the default.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from model.eval import records, timing
from ops import grouped, linear, quantized
from ops.kernels.cpu import layout

BASE = 'ragged_dot'
FORMATS = {
  'float32': lambda w_IO: w_IO,
  'bf16': lambda w_IO: w_IO.astype(jnp.bfloat16),
  'int8': lambda w_IO: quantized.quantize(w_IO, 'int8'),
  'int4': lambda w_IO: quantized.quantize(w_IO, 'int4', group_size=128),
}
GROUPS = {
  'even': lambda rng, rows, experts: np.bincount(np.arange(rows) % experts, minlength=experts),
  'uniform': lambda rng, rows, experts: rng.multinomial(rows, np.full(experts, 1 / experts)),
  'zipf': lambda rng, rows, experts: rng.multinomial(rows, _zipf(experts)),
  'one': lambda rng, rows, experts: rows * np.eye(experts, dtype=int)[experts // 2],
}

SHAPES = flags.DEFINE_list('shapes', ['16x256x512'], 'Experts as COUNTxINPUTSxOUTPUTS.')
ROWS = flags.DEFINE_list('rows', ['2048'], 'Numbers of rows, all experts together.')
SIZES = flags.DEFINE_list('groups', ['even', 'zipf'], f'Of {", ".join(GROUPS)}.')
NAMES = flags.DEFINE_list('formats', ['float32', 'bf16', 'int4'], f'Of {", ".join(FORMATS)}.')
RAGGED = flags.DEFINE_bool('ragged', True, 'Time ragged_dot; it is slow with many experts.')
PLAIN = {'float32': 'float32', 'bfloat16': 'bf16'}  # dtype of the rows -> format of that dtype
DTYPE = flags.DEFINE_enum('dtype', 'float32', list(PLAIN), 'Type of the rows.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'Small experts and two formats.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One stack of experts, and how many rows choose how among them."""

  experts: int
  inputs: int
  outputs: int
  rows: int
  groups: str


def main() -> None:
  names = ['float32', 'int4'] if SMOKE.value else NAMES.value
  for flag, given, known in (('formats', names, FORMATS), ('groups', SIZES.value, GROUPS)):
    for name in given:
      if name not in known:
        raise ValueError(f'--{flag} has {name!r}, which is not one of {", ".join(known)}')
  smoke = Case(experts=4, inputs=128, outputs=64, rows=32, groups='uniform')
  for case in [smoke] if SMOKE.value else _cases():
    for record in _measure(case, names):
      print(_words(record))
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def _cases() -> list[Case]:
  try:
    shapes = [tuple(map(int, shape.split('x'))) for shape in SHAPES.value]
    cases = [
      Case(experts=experts, inputs=inputs, outputs=outputs, rows=int(rows), groups=groups)
      for (experts, inputs, outputs), rows, groups in itertools.product(
        shapes, ROWS.value, SIZES.value
      )
    ]
  except ValueError as error:
    raise ValueError(
      f'--shapes must be like 16x256x512 and --rows integers, not {SHAPES.value} and {ROWS.value}'
    ) from error
  for case in cases:
    common.check_positive(**{k: v for k, v in vars(case).items() if k != 'groups'})
  return cases


def _measure(case: Case, names) -> list[records.Record]:
  keys = jax.random.split(jax.random.key(0))
  w_EIO = jax.random.normal(keys[0], (case.experts, case.inputs, case.outputs))
  x_MI = jax.random.normal(keys[1], (case.rows, case.inputs), DTYPE.value)
  plain_EIO = w_EIO.astype(DTYPE.value)
  sizes_E = GROUPS[case.groups](np.random.default_rng(0), case.rows, case.experts)
  with_sizes = functools.partial(_call, x_MI, jnp.asarray(sizes_E, jnp.int32))
  calls = {'dense': functools.partial(_dense, x_MI, plain_EIO[0])}
  if RAGGED.value:
    calls[BASE] = with_sizes(_ragged, plain_EIO)
    if PLAIN[DTYPE.value] in names:
      calls[f'{BASE} gradients'] = with_sizes(_ragged_gradients, plain_EIO)
  weights = {name: jax.jit(jax.vmap(FORMATS[name]))(w_EIO) for name in names}
  forms = FORMS if jax.default_backend() == 'gpu' else {'blocks': FORMS['blocks']}
  for name, w in weights.items():
    calls |= {f'{name} {form}': with_sizes(fn, w) for form, fn in forms.items()}
    fast = layout.pack(w) if jax.default_backend() == 'cpu' else w
    if fast is not w:
      calls[f'{name} native'] = with_sizes(_grouped, fast)
  if PLAIN[DTYPE.value] in names:
    calls[f'{PLAIN[DTYPE.value]} gradients'] = with_sizes(_gradients, plain_EIO)
  base = BASE if RAGGED.value else 'dense'
  times = timing.time_interleaved(calls, base=base, rounds=ROUNDS.value)
  return [_record(case, name, weights[name], sizes_E, times) for name in names]


def _call(x_MI, sizes_E, fn, w):
  return functools.partial(fn, x_MI, w, sizes_E)


_dense = jax.jit(linear.matmul)
_grouped = jax.jit(linear.grouped_matmul)
FORMS = {
  'blocks': jax.jit(functools.partial(grouped.product, linear.matmul)),
  'at once': jax.jit(functools.partial(grouped.at_once, linear.matmul)),
}
_ragged = jax.jit(jax.lax.ragged_dot)


def _gradients_of(product):
  value = lambda x, w, sizes: jnp.sum(product(jnp.tanh(x), w, sizes) ** 2)
  return jax.jit(jax.grad(value, (0, 1)))


_gradients = _gradients_of(linear.grouped_matmul)
_ragged_gradients = _gradients_of(jax.lax.ragged_dot)


def _record(case: Case, name: str, w, sizes_E, times) -> records.Record:
  touched = w.nbytes * np.count_nonzero(sizes_E) // case.experts
  metrics = {
    'weight_bytes': records.Metric(w.nbytes, 'byte'),
    'touched_bytes': records.Metric(touched, 'byte'),
  }
  for form in (*FORMS, 'native'):
    if f'{name} {form}' in times:
      time = times[f'{name} {form}']
      metrics[f'{form} time'] = timing.summarize(time.samples_s, 's')
      metrics[f'{form} speedup'] = time.speedup
      metrics[f'{form} bandwidth'] = time.rate(touched, 'byte/s')
  for key in ('dense', BASE, f'{BASE} gradients'):
    if key in times:
      metrics[f'{key} time'] = timing.summarize(times[key].samples_s, 's')
  if f'{name} gradients' in times:
    own = times[f'{name} gradients'].samples_s
    metrics['gradients time'] = timing.summarize(own, 's')
    if RAGGED.value:
      ratios = np.divide(times[f'{BASE} gradients'].samples_s, own)
      metrics['gradients speedup'] = timing.summarize(ratios, '1')
  native = 'native time' in metrics
  return records.Record(
    experiment='benchmark_grouped',
    recipe=name,
    command=common.command(),
    config={
      **dataclasses.asdict(case),
      'format': name,
      'dtype': DTYPE.value,
      'base': BASE if RAGGED.value else 'dense',
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
    without_kernel=int(not native and name != 'float32'),
    notes=(f'the largest group has {sizes_E.max()} rows, {np.sum(sizes_E == 0)} have none',),
  )


def _words(record: records.Record) -> str:
  config, parts = record.config, []
  for form in (*FORMS, 'native', 'gradients'):
    if f'{form} time' in record.metrics:
      parts.append(f'{form} {record.value(f"{form} time") * 1e3:,.2f} ms')
    if f'{form} speedup' in record.metrics:
      speedup = record.metrics[f'{form} speedup']
      parts[-1] += f', {speedup.value:.2f} ± {(speedup.spread or 0) / 2:.2f} x {config["base"]}'
  shape = f'{config["experts"]} experts {config["inputs"]}x{config["outputs"]}'
  rows = f'{config["rows"]} rows, {config["groups"]}'
  dense = f'dense {record.value("dense time") * 1e3:,.2f} ms'
  return f'{shape}, {rows}, {record.recipe}: ' + '; '.join([dense, *parts])


def _zipf(experts: int) -> np.ndarray:
  weights = 1 / np.arange(1, experts + 1)
  return weights / weights.sum()


if __name__ == '__main__':
  common.run(main)
