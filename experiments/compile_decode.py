r"""Compiles decoding for a device that is not present, and checks that no weight is widened.

  python -m experiments.compile_decode --formats=int8,int4 --output=out/compiled.jsonl
  python -m experiments.compile_decode --preset=llama-2-7b --target=h200
  python -m experiments.compile_decode --target=v5e:2x2 --mesh_model=4 --capacity=8192

The greedy decoding loop of a preset is compiled by the target's own compiler, from shapes only; no
weights are allocated. For each format it reports the bytes of the arguments, the bytes needed
beside them, and every buffer that holds a weight in a wider type than the stored one, of which
there should be none. Nothing is run, so speed is not measured.

Targets: a TPU topology (pip install 'lissom[tpu]'), h200 (pip install 'lissom[cuda]'), or cpu.
Device: CPU. Minutes: 1 per format for an 8B model. Expected for llama-3.1-8b on a v5e with 16 GB:
int8, int4 and nf4 fit, and nothing is widened.
"""

import collections
import functools

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from experiments import common
from model import kv_cache, presets, sharding
from model.eval import buffers, records, targets
from model.infer import generate
from model.transformer import Transformer, abstract, linears, matrices
from ops import linear, quantized
from ops.kernels import fused

FORMATS = {
  'bf16': lambda w: w,
  'int8': lambda w: quantized.quantize(w, 'int8'),
  'int8_g128': lambda w: quantized.quantize(w, 'int8', group_size=128),
  'int4': lambda w: quantized.quantize(w, 'int4'),
  'int4_g32': lambda w: quantized.quantize(w, 'int4', group_size=32),
  'int4_asym': lambda w: quantized.quantize(w, 'int4', symmetric=False),
  'nf4': lambda w: quantized.quantize(w, 'nf4'),
  'fp8': lambda w: quantized.quantize(w, 'fp8_e4m3'),
}
CACHE_AXES = 'BSK_'

PRESET = flags.DEFINE_string('preset', 'llama-3.1-8b', 'A shape of model/presets.py.')
TARGET = flags.DEFINE_string('target', 'v5e:2x2', 'A TPU topology, h200 or cpu.')
NAMES = flags.DEFINE_list('formats', ['int8', 'int4'], f'Of {", ".join(FORMATS)}.')
BATCH = flags.DEFINE_integer('batch', 1, 'Rows that are decoded together.', lower_bound=1)
CAPACITY = flags.DEFINE_integer('capacity', 2048, 'Tokens that a row can hold.', lower_bound=1)
MESH = common.define_mesh()
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny preset and two formats, for the CPU.')


def main() -> None:
  names = ['int8', 'int4'] if SMOKE.value else NAMES.value
  for name in names:
    if name not in FORMATS:
      raise ValueError(f'--formats has {name!r}, which is not one of {", ".join(FORMATS)}')
  config = presets.preset('tiny-llama' if SMOKE.value else PRESET.value)
  platform, devices = _target('cpu' if SMOKE.value else TARGET.value)
  shape = {axis: holder.value for axis, holder in MESH.items()}
  mesh = sharding.make_mesh(**shape, devices=devices)
  for name in names:
    model = _model(config, name, platform, mesh)
    record = _record(name, model, _compile(model, mesh), mesh)
    print(_words(record))
    if OUTPUT.value:
      records.append(OUTPUT.value, record)


def _target(name: str) -> tuple[str, list[jax.Device]]:
  if name == 'cpu':
    return 'cpu', jax.devices('cpu')
  return ('gpu', targets.gpu()) if name == 'h200' else ('tpu', targets.tpu(name))


def _model(config, name: str, platform: str, mesh) -> Transformer:
  """Returns the shapes of a model whose matrices have a format, packed for the platform."""
  model = abstract(config, jnp.bfloat16)

  def compress(w_IO):
    w = FORMATS[name](w_IO)
    return w if platform == 'cpu' else fused.pack(w, platform, one_device=mesh.size == 1)

  for layer in linears(model).values():
    layer.weight.set_value(jax.eval_shape(compress, layer.weight.get_value()))
  for param, places in sharding.shardings_of(model, mesh):
    param.set_value(jax.tree.map(targets.placed, param.get_value(), places))
  return model


def _compile(model: Transformer, mesh) -> jax.stages.Compiled:
  everywhere = NamedSharding(mesh, PartitionSpec())
  put = functools.partial(targets.placed, where=everywhere)
  batch = BATCH.value
  tokens_B = put(jax.ShapeDtypeStruct((batch,), jnp.int32))
  cache = jax.eval_shape(lambda: kv_cache.init(model.config, batch, CAPACITY.value, model.dtype))
  split = lambda a: targets.placed(a, sharding.sharding(mesh, CACHE_AXES, a.shape))
  program = generate.Program.of(model)
  with targets.lowering(mesh.devices.flat[0]):
    lowered = generate.lower_decode(program, tokens_B, tokens_B, jax.tree.map(split, cache))
  return lowered.compile()


def _record(name, model, compiled, mesh) -> records.Record:
  weights = [_of_one_device(w) for w in matrices(model).values()]
  found = collections.Counter(
    f'{b.dtype}{list(b.shape)} by {b.op}' for b in buffers.widened(compiled.as_text(), weights)
  )
  memory = compiled.memory_analysis()
  beside = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  metrics = {
    'argument_bytes': records.Metric(memory.argument_size_in_bytes, 'byte'),
    'temporary_bytes': records.Metric(memory.temp_size_in_bytes, 'byte'),
    'needed_bytes': records.Metric(memory.argument_size_in_bytes + beside, 'byte'),
    'widened': records.Metric(sum(found.values()), '1'),
  }
  return records.Record(
    experiment='compile_decode',
    recipe=name,
    command=common.command(),
    config={
      'preset': 'tiny-llama' if SMOKE.value else PRESET.value,
      'target': 'cpu' if SMOKE.value else TARGET.value,
      'batch': BATCH.value,
      'capacity': CAPACITY.value,
      'mesh': dict(mesh.shape),
    },
    environment=records.environment(),
    seed=None,
    metrics=metrics,
    notes=tuple(f'widened {count} times: {what}' for what, count in found.items()),
  )


def _of_one_device(w: linear.Matrix) -> linear.Matrix:
  """Returns the shapes of the part of a weight that one device holds."""
  shard = lambda a: jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype)
  return jax.tree.map(shard, w)


def _words(record: records.Record) -> str:
  config, metrics = record.config, record.metrics
  sizes = ', '.join(
    f'{metrics[f"{what}_bytes"].value / 1e9:.3f} GB {words}'
    for what, words in (('needed', 'per device'), ('argument', 'of it arguments'))
  )
  temporary = metrics['temporary_bytes'].value / 1e6
  line = f'{config["preset"]}, {record.recipe}, {config["target"]}: {sizes}, {temporary:.1f} MB'
  return '\n  '.join([f'{line} temporary, {metrics["widened"].value:.0f} widened', *record.notes])


if __name__ == '__main__':
  common.run(main)
