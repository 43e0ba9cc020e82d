"""Layers as compressed-tensors' own compressors store them: read, written again, and damaged."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from model.compressed_tensors import modules
from model.hf_names.family import TRANSPOSE, Entry, Heads
from model.hf_quantized import compressed_tensors
from ops.activations import ActivationQuantized
from ops.linear import dense
from ops.quantized import QuantizedTensor

SHAPE = 16, 64  # (O, I) of the matrix
# The format and the group of ours; None where no format of ours has the levels.
CASES = {
  'int4': ('int4', 32),
  'int4_asymmetric': ('int4', 32),
  'int4_channel': ('int4', 64),
  'int8': ('int8', 64),
  'int3': ('int3', 16),
  'int5': None,
  'w8a8': ('int8', 64),
  'w8a8_static': ('int8', 64),
  'w8_asymmetric': ('int8', 64),
  'fp8': ('fp8_e4m3', 64),
  'fp8_tensor': ('fp8_e4m3', 64),
  'fp8_block': ('fp8_e4m3', 32),
  'mxfp4': ('mxfp4', 32),
  'mxfp8': ('mxfp8', 32),
  'nvfp4': ('nvfp4', 16),
}
MASKS = ('sparse-24-bitmask', 'sparse-bitmask')
# What comes back as it was, byte for byte. Others have a scale for all outputs or a block, which
# becomes one for each; or fewer bits than 4, or inputs rounded to fp8.
SAME = ('int4', 'int4_asymmetric', 'int4_channel', 'int8', 'w8a8', 'fp8', 'mxfp4', 'mxfp8')


def _read(golden, as_tensors, case):
  (name, tensor), *others = compressed_tensors.read(
    golden.settings(case), as_tensors(golden.arrays(case))
  ).items()
  assert name == 'X.weight' and not others and tensor.shape == SHAPE
  return tensor


@pytest.mark.parametrize('case', CASES)
def test_the_numbers_are_theirs_bit_for_bit(golden, as_tensors, case):
  tensor, theirs = _read(golden, as_tensors, case), golden.dense(case)
  found = tensor.read()
  assert found.dtype == np.float32
  # They widen in the dtype of the scale, and fours in bfloat16.
  np.testing.assert_array_equal(found.astype(theirs.dtype), theirs)
  w = tensor.codes().weight(jnp.float32)
  if CASES[case] is None:
    assert w == 'no format has these levels'
    return
  assert isinstance(w, ActivationQuantized) == case.startswith('w8a8')
  core = w.values if isinstance(w, ActivationQuantized) else w
  assert isinstance(core, QuantizedTensor) and (core.format, core.group_size) == CASES[case]
  assert (core.zeros is not None) == ('asym' in case or case == 'int4_channel')
  np.testing.assert_array_equal(np.asarray(dense(core)).T, found)
  if case == 'w8a8_static':
    assert w.scale == golden.arrays(case)['X.input_scale'][0]


@pytest.mark.parametrize('case', SAME)
def test_what_was_read_is_written_as_it_was(golden, as_tensors, case):
  w = _read(golden, as_tensors, case).codes().weight(jnp.bfloat16)
  shapes = (SHAPE[::-1],)
  entry = Entry(
    theirs='X.weight', ours=('x',), codec=TRANSPOSE, heads=Heads(1, 1), shape=SHAPE, shapes=shapes
  )
  module = modules.module_of(entry, (w,))
  written = modules.tensors(module, np.dtype(jnp.bfloat16))
  expected = golden.arrays(case)
  assert set(written) == set(expected)
  for name, tensor in written.items():
    array = tensor.read()
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype), name
    assert array.dtype == expected[name].dtype, name
    assert array.tobytes() == expected[name].tobytes(), name
  group = golden.settings(case)['config_groups']['group_0']
  wanted = {k: v for k, v in group['weights'].items() if not k.endswith('_dtype')}
  described = module.scheme.to_json(['Linear'])
  assert wanted.items() <= described['weights'].items()
  if case != 'fp8':
    assert described['format'] == group['format']
  if case == 'w8a8':
    inputs = group['input_activations']
    assert {k: described['input_activations'][k] for k in inputs} == inputs


@pytest.mark.parametrize('case', MASKS)
def test_masks_and_values_are_matrices_again(golden, as_tensors, case):
  tensor = _read(golden, as_tensors, case)
  np.testing.assert_array_equal(tensor.read(), golden.dense(case))


def test_codes_behind_a_mask(golden, as_tensors):
  scale = np.full((SHAPE[0], 1), 0.003, np.float32)
  arrays = golden.arrays('sparse-24-bitmask-int8') | {'X.weight_scale': scale}
  settings = golden.settings('w8a8') | {'sparsity_config': {'format': 'sparse-24-bitmask'}}
  tensor = compressed_tensors.read(settings, as_tensors(arrays))['X.weight']
  codes = golden.dense('sparse-24-bitmask-int8')
  np.testing.assert_array_equal(tensor.read(), codes.astype(np.float32) * scale)


def test_an_order_of_activations(golden, as_tensors):
  arrays, rng = golden.arrays('int4'), np.random.default_rng(0)
  order = rng.permutation(np.arange(SHAPE[1]) // 32)
  plain = compressed_tensors.read(golden.settings('int4'), as_tensors(arrays))['X.weight'].read()
  scales = arrays['X.weight_scale']
  codes = np.round(plain / np.repeat(scales, 32, 1))
  arrays['X.weight_g_idx'] = order.astype(np.int32)
  tensor = compressed_tensors.read(golden.settings('int4'), as_tensors(arrays))['X.weight']
  np.testing.assert_array_equal(tensor.read(), codes.astype(np.float32) * scales[:, order])
  assert 'different scales' in tensor.codes().weight(jnp.float32)


def test_layers_are_found_by_name_expression_and_class(golden, as_tensors):
  def group(case, *targets):
    return {**golden.settings(case)['config_groups']['group_0'], 'targets': list(targets)}

  cases = {'a.0.b': 'int8', 'a.1.b': 'int4', 'c': 'w8a8'}
  arrays = {
    name.replace('X', layer): array
    for layer, case in cases.items()
    for name, array in golden.arrays(case).items()
  }
  groups = {
    'linear': group('w8a8', 'Linear'),
    'expression': group('int4', r're:a\.\d+\.b$'),
    'name': group('int8', 'a.0.b'),
  }
  settings = {**golden.settings('int4'), 'format': 'mixed-precision', 'config_groups': groups}
  found = compressed_tensors.read(settings, as_tensors(arrays))
  for layer, case in cases.items():
    np.testing.assert_array_equal(found[f'{layer}.weight'].read(), golden.dense(case))
  del groups['linear']
  with pytest.raises(ValueError, match='no target in config_groups names it'):
    compressed_tensors.read(settings, as_tensors(arrays))


@pytest.mark.parametrize('case', ['int4', 'w8a8_static', 'fp8_block', 'mxfp4'])
def test_empty_matrices_are_refused(golden, as_tensors, case):
  leaves = ('weight', 'weight_packed')
  arrays = {n: a[:0] if n[2:] in leaves else a for n, a in golden.arrays(case).items()}
  with pytest.raises(ValueError, match=r'X.*(has the shape|weight_packed)'):
    compressed_tensors.read(golden.settings(case), as_tensors(arrays))


@pytest.mark.parametrize(
  'case, change, message',
  [
    ('fp8_block', {'block_structure': [2**40, 32]}, 'weight_scale has the shape'),
    ('int4', {'num_bits': 9}, 'has no 9 bits'),
    ('int4', {'group_size': 48}, 'groups of 48 do not divide 64 inputs'),
    ('int4', {'dynamic': True}, 'the scales of weights are dynamic'),
    ('int4', {'symmetric': False}, 'weight_zero_point is missing'),
    ('int4', {'strategy': 'block'}, 'do not fit'),
    ('int4', {'rotated': True}, 'unknown keys rotated'),
    ('fp8', {'type': 'int'}, 'does not hold codes of the type int'),
    ('nvfp4', {'group_size': 32}, 'as strategy and group'),
  ],
)
def test_settings_that_are_not_read_are_named(golden, as_tensors, case, change, message):
  settings = golden.settings(case)
  settings['config_groups']['group_0']['weights'] |= change
  with pytest.raises(ValueError, match=message):
    compressed_tensors.read(settings, as_tensors(golden.arrays(case)))


@pytest.mark.parametrize(
  'change, message',
  [
    ({'quantization_status': 'frozen'}, 'only compressed checkpoints are read'),
    ({'transform_config': {'config_groups': {'a': {}}}}, 'rotates inputs at run time'),
    ({'sparsity_config': {'format': 'marlin-24'}}, 'marlin-24'),
    ({'config_groups': {}}, 'is stored as codes, and config_groups in config.json is empty'),
    ({'config_groups': [1]}, 'must be a JSON object'),
  ],
)
def test_checkpoints_that_are_not_read_are_named(golden, as_tensors, change, message):
  with pytest.raises(ValueError, match=message):
    compressed_tensors.read(golden.settings('int4') | change, as_tensors(golden.arrays('int4')))


JUNK = (None, -1, 0, 7, 2**40, 0.5, 'x', 're:(', [], [1], {}, {'a': 1}, True)


def _mutated(rng, settings, arrays):
  """Changes one thing in a checkpoint."""
  name = rng.choice(sorted(arrays))
  array = arrays[name]
  kind = rng.integers(8)
  if kind == 0:
    del arrays[name]
  elif kind == 1:
    arrays[name] = array.reshape(-1)[: rng.integers(array.size)]
  elif kind == 2:
    arrays[name] = array[..., None]
  elif kind == 3:
    arrays[name] = array.astype(rng.choice(['float32', 'int32', 'uint8', 'int64']))
  elif kind == 4:
    data = rng.integers(0, 256, array.nbytes, dtype=np.uint8)
    arrays[name] = data.view(array.dtype).reshape(array.shape)
  elif kind == 5:
    arrays[f'{name}_'] = arrays.pop(name)
  else:
    places = [settings, settings.get('sparsity_config') or settings]
    for group in (settings.get('config_groups') or {}).values():
      places += [group, group['weights'], group['input_activations'] or group]
    place = places[rng.integers(len(places))]
    key = rng.choice(sorted(place))
    place[key] = JUNK[rng.integers(len(JUNK))]


def test_damaged_checkpoints_are_refused_or_read(golden, as_tensors):
  refused, cases = 0, [*CASES, *MASKS]
  for seed in range(400):
    rng = np.random.default_rng(seed)
    case = cases[seed % len(cases)]
    settings, arrays = json.loads(json.dumps(golden.settings(case))), golden.arrays(case)
    _mutated(rng, settings, arrays)
    try:
      with np.errstate(all='ignore'):
        for tensor in compressed_tensors.read(settings, as_tensors(arrays)).values():
          assert tensor.read().shape == tensor.shape
    except ValueError as error:
      refused += 1
      assert len(str(error)) > 10
  assert refused > 200
