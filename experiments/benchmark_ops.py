r"""Measures how close the products with compressed matrices come to the memory's bandwidth.

  python -m experiments.benchmark_ops --output=out/ops.jsonl
  python -m experiments.benchmark_ops --shapes=4096x22016 --rows=1,8,512 --formats=int4_g128,bf16

For each shape, number of rows and format, it times one product through XLA's jnp form and one
through the platform's kernel (`native` on a CPU, else `kernel`). The rounds are interleaved with
the product of the uncompressed matrix and with two measurements of the memory bandwidth at that
moment: `copy` adds 1 to a long array and counts the bytes read and written; `read` sums such an
array and counts the bytes read. The weight bytes per second are reported as fractions of both, each
the median over the rounds. A matrix must exceed the last-level cache for this to measure memory;
the default shape does in every format on a CPU. A GPU multiplies by such a matrix in the time that
it takes to start a program: with --copies, a program has as many products, each by a matrix of its
own, and the time of one is reported.

  python -m experiments.benchmark_ops --dtype=bfloat16 --copies=16 --formats=int8,int4_g128,nf4

Device: any. Minutes: 3 on two cores, 1 with --noxla. The goal is 80 % of the copy bandwidth for
matrix-vector products with int8, int4 and bf16 matrices. Found on two AVX-512 cores of a shared
machine: 57, 59 and 60 %, which is 103, 99 and 105 % of the read bandwidth there; the medians of
nine more runs are 65, 61 and 67 % of the copy bandwidth. 2:4 matrices take 0.66 (bf16), 0.70 (int8)
and 0.80 (int4) of the time of dense ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from model.eval import records, timing
from ops import linear, quantized, sparse
from ops.kernels import cpu, fused
from ops.kernels.cpu import layout


def _two_of_four(w):
  return sparse.compress(w, sparse.n_of_m_mask(sparse.magnitude_score(w), 2, 4), 2, 4)


FORMATS = {
  'bf16': lambda w: w.astype(jnp.bfloat16),
  'f16': lambda w: w.astype(jnp.float16),
  'int8': lambda w: quantized.quantize(w, 'int8'),
  'int8_g128': lambda w: quantized.quantize(w, 'int8', group_size=128),
  'int4_g128': lambda w: quantized.quantize(w, 'int4', group_size=128),
  'int4_g32': lambda w: quantized.quantize(w, 'int4', group_size=32),
  'int4_asym': lambda w: quantized.quantize(w, 'int4', group_size=128, symmetric=False),
  'nf4': lambda w: quantized.quantize(w, 'nf4'),
  'fp8': lambda w: quantized.quantize(w, 'fp8_e4m3'),
  'mxfp4': lambda w: quantized.quantize(w, 'mxfp4'),
  'mxfp8': lambda w: quantized.quantize(w, 'mxfp8'),
  'nvfp4': lambda w: quantized.quantize(w, 'nvfp4'),
  '2of4_bf16': lambda w: _two_of_four(w.astype(jnp.bfloat16)),
  '2of4_int8': lambda w: _two_of_four(w).map_values(FORMATS['int8']),
  '2of4_int4_g128': lambda w: _two_of_four(w).map_values(FORMATS['int4_g128']),
}
READ_BYTES = 2**28

SHAPES = flags.DEFINE_list('shapes', ['4096x22016'], 'Matrices as INPUTSxOUTPUTS.')
ROWS = flags.DEFINE_list('rows', ['1'], 'Numbers of rows that are multiplied by a matrix.')
NAMES = flags.DEFINE_list('formats', list(FORMATS), f'Of {", ".join(FORMATS)}.')
DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Type of activations and of the base matrix.'
)
COPIES = flags.DEFINE_integer('copies', 1, 'Products in one program.', lower_bound=1)
XLA = flags.DEFINE_bool('xla', True, "Time XLA's jnp form of each format too; it can be slow.")
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Interleaved rounds.', lower_bound=timing.MIN_ROUNDS)
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'One small matrix and two formats.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One matrix shape with one number of rows."""

  inputs: int
  outputs: int
  rows: int


def main() -> None:
  names = ['int8', 'int4_g128'] if SMOKE.value else NAMES.value
  for name in names:
    if name not in FORMATS:
      raise ValueError(f'--formats has {name!r}, which is not one of {", ".join(FORMATS)}')
  if jax.default_backend() == 'cpu' and not cpu.available():
    print(f'no native kernels: {cpu.why_not()}')
  for case in [Case(inputs=256, outputs=512, rows=1)] if SMOKE.value else _cases():
    for record in _measure(case, names):
      print(_words(record))
      if OUTPUT.value:
        records.append(OUTPUT.value, record)


def _cases() -> list[Case]:
  try:
    shapes = [tuple(map(int, shape.split('x'))) for shape in SHAPES.value]
    cases = [
      Case(inputs=inputs, outputs=outputs, rows=int(rows))
      for inputs, outputs in shapes
      for rows in ROWS.value
    ]
  except ValueError as error:
    raise ValueError(
      f'--shapes must be like 4096x11008 and --rows integers, not {SHAPES.value} and {ROWS.value}'
    ) from error
  for case in cases:
    common.check_positive(**dataclasses.asdict(case))
  return cases


def _measure(case: Case, names) -> list[records.Record]:
  key, *keys = jax.random.split(jax.random.key(0), 1 + COPIES.value)
  normal = lambda key, *shape: jax.random.normal(key, shape).astype(DTYPE.value)
  matrices = [normal(own, case.inputs, case.outputs) for own in keys]
  x = normal(key, case.rows, case.inputs)
  long = jnp.ones(2**20 if SMOKE.value else READ_BYTES // 4, jnp.float32)
  copy = timing.Copy(buffer_bytes=long.nbytes if SMOKE.value else None)
  multiply = lambda weights: functools.partial(_products, x, weights)
  calls = {
    DTYPE.value: multiply(matrices),
    'copy': copy,
    'read': functools.partial(_sum, long),
  }
  packed, limits = {}, {'copy': copy.nbytes, 'read': long.nbytes}
  for name in names:
    weights = [jax.jit(FORMATS[name])(w_IO) for w_IO in matrices]
    packed[name], forms = _forms(weights)
    calls |= {f'{name} {form}': multiply(own) for form, own in forms.items()}
  times = timing.time_interleaved(calls, rounds=ROUNDS.value)
  return [_record(case, name, packed[name], times, limits) for name in names]


def _forms(weights: list) -> tuple[linear.Matrix, dict[str, list]]:
  """The first of the weights as it is packed, and the weights in each form that is timed."""
  forms = {'xla': weights} if XLA.value else {}
  platform = jax.default_backend()
  if platform != 'cpu':
    fast = [fused.pack(w, platform) for w in weights]
    return fast[0], forms | ({'kernel': fast} if fast[0] is not weights[0] else {})
  fast = [layout.pack(w) for w in weights]
  if fast[0] is not weights[0]:
    forms['native'] = fast
    exact = [layout.pack(w, 'float') for w in weights]
    if exact[0].activations != fast[0].activations:
      forms['native, float activations'] = exact
  return fast[0], forms


@jax.jit
def _products(x, weights):
  return [linear.matmul(x, w) for w in weights]


_sum = jax.jit(jnp.sum)


def _record(case: Case, name: str, w, times, limits) -> records.Record:
  metrics = {
    f'{limit}_bandwidth': times[limit].rate(nbytes, 'byte/s') for limit, nbytes in limits.items()
  }
  metrics['weight_bytes'] = records.Metric(w.nbytes, 'byte')
  each = lambda time: np.divide(time.samples_s, COPIES.value)
  metrics[f'{DTYPE.value} time'] = timing.summarize(each(times[DTYPE.value]), 's')
  for key, time in times.items():
    format, _, form = key.partition(' ')
    if format != name:
      continue
    metrics[f'{form} time'] = timing.summarize(each(time), 's')
    metrics[f'{form} bandwidth'] = time.rate(COPIES.value * w.nbytes, 'byte/s')
    metrics[f'{form} speedup'] = time.speedup
    for limit, nbytes in limits.items():
      shares = np.divide(times[limit].samples_s, each(time)) * w.nbytes / nbytes
      metrics[f'{form} of {limit}'] = timing.summarize(shares, '1')
  platform = jax.default_backend()
  kernel = linear.kernel(w, platform)
  return records.Record(
    experiment='benchmark_ops',
    recipe=name,
    command=common.command(),
    config={
      **dataclasses.asdict(case),
      'format': name,
      'activations': DTYPE.value,
      'copies': COPIES.value,
    },
    environment=records.environment(),
    seed=0,
    metrics=metrics,
    without_kernel=int(kernel is None),
    notes=(kernel or f'no kernel: {_why_not(platform)}',),
  )


def _why_not(platform: str) -> str:
  return (cpu.why_not() if platform == 'cpu' else None) or 'this format has none'


def _words(record: records.Record) -> str:
  config, parts = record.config, []
  for form in ('xla', 'native', 'native, float activations', 'kernel'):
    if f'{form} time' in record.metrics:
      parts.append(
        f'{form} {record.value(f"{form} time") * 1e6:,.0f} us, '
        f'{record.value(f"{form} bandwidth") / 1e9:.1f} GB/s '
        f'({record.value(f"{form} of copy"):.0%} of copy, '
        f'{record.value(f"{form} of read"):.0%} of read), '
        f'{record.value(f"{form} speedup"):.2f} x {config["activations"]}'
      )
  shape = f'{config["inputs"]}x{config["outputs"]}, {config["rows"]} rows'
  return f'{shape}, {record.recipe}: ' + '; '.join(parts)


if __name__ == '__main__':
  common.run(main)
