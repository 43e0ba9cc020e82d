"""Folders of compressed models: bitwise the same after loading, and each damage named."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from model import hf, native, safetensors_io, transformer
from model.config import ModelConfig
from model.infer.generate import generate
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, parameters
from ops import adapter_starts, quantized, sparse
from ops.linear import map_values
from ops.rope import RopeConfig

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=16), ffn=FeedForwardConfig(width=64)
)
CONFIG = ModelConfig(
  family='llama', vocab_size=40, width=32, layers=(LAYER,) * 2, max_positions=16, eos_ids=(2,)
)
UP = 'layers.0.ffn.up.weight'
TOKENS = np.arange(12).reshape(2, 6) * 3


def _int4(w):
  return quantized.quantize(w, 'int4', group_size=16, symmetric=False)


def _int8(w):
  return quantized.quantize(w, 'int8')


def _nf4(w):
  return quantized.quantize(w, 'nf4', group_size=16, double=True)


def _pruned(w):
  return sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)


def compressed(dtype=jnp.float32) -> Transformer:
  """One layer of each kind of weight, nested ones too; the others stay plain arrays."""
  model = Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)
  adapted = lambda w: adapter_starts.zero(_nf4(w), 4, scale=2.0, key=jax.random.key(0))
  kinds = {
    'layers.0.attention.query': _int4,
    'layers.0.attention.output': lambda w: quantized.quantize(w, 'fp8_e4m3'),
    'layers.0.ffn.gate': adapted,
    'layers.0.ffn.up': _int8,
    'layers.0.ffn.down': _pruned,
    'layers.1.attention.query': lambda w: quantized.quantize(w, 'mxfp4'),
    'layers.1.attention.output': lambda w: quantized.quantize(w, 'mxfp8'),
    'layers.1.ffn.up': lambda w: map_values(_int8, _pruned(w)),
    'layers.1.ffn.gate': lambda w: quantized.quantize(w, 'nvfp4'),
    'head': _nf4,
  }
  for path, kind in kinds.items():
    weight = transformer.linears(model)[path].weight
    weight.set_value(jax.jit(kind)(weight.get_value()))
  return model


@pytest.fixture(scope='module')
def model():
  return compressed()


@pytest.fixture
def folder(model, tmp_path):
  hf.save_pretrained(model, None, tmp_path / 'model', recipe={'steps': ['anything']})
  return tmp_path / 'model'


def _edit_manifest(folder, change):
  about = json.loads((folder / native.MANIFEST).read_text())
  change(about)
  (folder / native.MANIFEST).write_text(json.dumps(about))


def _edit_arrays(folder, change):
  arrays = {name: np.array(t.read()) for name, t in safetensors_io.read_folder(folder).items()}
  change(arrays)
  tensors = {
    name: safetensors_io.Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()
  }
  safetensors_io.write_folder(folder, tensors)


def assert_same_model(actual, expected):
  ours, theirs = (nnx.split(m)[1] for m in (actual, expected))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _logits(model):
  graphdef, state = nnx.split(model)
  return jax.jit(lambda state: nnx.merge(graphdef, state)(TOKENS))(state)


def test_a_loaded_model_is_bitwise_the_one_saved(model, folder):
  loaded, tokenizer = hf.load_pretrained(folder)
  assert tokenizer is None and loaded.config == model.config and native.is_compressed(loaded)
  assert_same_model(loaded, model)
  np.testing.assert_array_equal(_logits(loaded), _logits(model))
  about = json.loads((folder / native.MANIFEST).read_text())
  assert about['recipe'] == {'steps': ['anything']}


def test_half_precision_models_and_shards(tmp_path):
  model = compressed(jnp.bfloat16)
  hf.save_pretrained(model, None, tmp_path / 'model', max_shard_bytes=8000)
  assert len(list((tmp_path / 'model').glob('*.safetensors'))) > 1
  loaded, _ = hf.load_pretrained(tmp_path / 'model', jnp.bfloat16)
  assert loaded.dtype == jnp.bfloat16
  assert_same_model(loaded, nnx.clone(model))


def test_what_is_loaded_outlives_its_file(model, folder):
  loaded, _ = hf.load_pretrained(folder)
  path = folder / 'model.safetensors'
  with path.open('r+b') as file:  # in place: the very bytes that were mapped
    file.write(bytes(path.stat().st_size))
  assert_same_model(loaded, model)


def test_the_folder_is_small(folder, tmp_path):
  hf.save_pretrained(Transformer(CONFIG, rngs=nnx.Rngs(0)), None, tmp_path / 'plain')
  size = lambda path: (path / 'model.safetensors').stat().st_size
  assert size(folder) < 0.7 * size(tmp_path / 'plain')
  assert not native.is_native(tmp_path / 'plain')


def test_transformers_refuses_the_folder(folder):
  # It is not enough that the quantization is unknown: that is only warned of.
  with pytest.raises(ValueError, match='lissom'):
    transformers.AutoModelForCausalLM.from_pretrained(folder)
  with pytest.raises(ValueError, match='lissom'):
    transformers.AutoConfig.from_pretrained(folder)


def test_missing_and_unexpected_arrays_are_all_listed(folder):
  def damage(arrays):
    del arrays[f'{UP}.scales'], arrays['final_norm.scale']
    arrays['extra'] = np.zeros(2, np.float32)

  _edit_arrays(folder, damage)
  with pytest.raises(ValueError) as caught:
    hf.load_pretrained(folder)
  for line in (f'{UP}.scales is missing', 'final_norm.scale is missing', 'extra is unexpected'):
    assert line in str(caught.value)


def test_misshapen_arrays_and_other_dtypes_are_all_listed(folder):
  def damage(arrays):
    arrays[f'{UP}.scales'] = arrays[f'{UP}.scales'][:, :1].copy()  # it would broadcast
    arrays[f'{UP}.values'] = arrays[f'{UP}.values'].astype(np.float32)
    arrays['final_norm.scale'] = arrays['final_norm.scale'][:3].copy()

  _edit_arrays(folder, damage)
  with pytest.raises(ValueError) as caught:
    hf.load_pretrained(folder)
  for line in (
    f"{UP}.scales is [[1, 1], 'float32'], not [[1, 64], 'float32']",
    f"{UP}.values is [[32, 64], 'float32'], not [[32, 64], 'int8']",
    "final_norm.scale is [[3], 'float32'], not [[32], 'float32']",
    'final_norm.scale is (3,), the config says (32,)',
  ):
    assert line in str(caught.value)


def test_scales_of_another_matrix_are_named(folder):
  name = f'{UP}.scales'
  _edit_arrays(folder, lambda arrays: arrays.update({name: np.ones((3, 5), np.float32)}))
  _edit_manifest(folder, _set('arrays', name, value=[[3, 5], 'float32']))
  with pytest.raises(ValueError, match=f'{UP}, QuantizedTensor: 64 columns.* scales for 5'):
    hf.load_pretrained(folder)
  _edit_arrays(folder, lambda arrays: arrays.update({name: np.ones(64, np.float32)}))
  _edit_manifest(folder, _set('arrays', name, value=[[64], 'float32']))
  with pytest.raises(ValueError, match=f'{UP}: scales has the shape'):
    hf.load_pretrained(folder)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_scales_of_any_precision_are_read(folder, dtype):
  name = f'{UP}.scales'
  _edit_arrays(folder, lambda arrays: arrays.update({name: arrays[name].astype(jnp.dtype(dtype))}))
  _edit_manifest(folder, _set('arrays', name, value=[[1, 64], dtype]))
  w = parameters(hf.load_pretrained(folder)[0])[UP].get_value()
  assert w.scales.dtype == dtype and np.isfinite(w.dense()).all()


def test_long_lists_are_capped_with_a_count(folder):
  _edit_arrays(folder, lambda arrays: [arrays.pop(name) for name in sorted(arrays)[:25]])
  with pytest.raises(ValueError, match='; and 5 more'):
    hf.load_pretrained(folder)


@pytest.mark.parametrize('name', [f'{UP}.scales', 'embedding.table'])
def test_arrays_that_are_not_finite_are_listed(folder, name):
  _edit_arrays(folder, lambda arrays: arrays[name].fill(np.nan))
  with pytest.raises(ValueError, match=f'{name} has NaN or infinity'):
    hf.load_pretrained(folder)


def _set(*path, value):
  def change(about):
    for key in path[:-1]:
      about = about[key]
    about[path[-1]] = value

  return change


MANIFESTS = {
  'a newer version': (_set('version', value=2), 'has version 2; this code reads 1'),
  'no version': (lambda about: about.pop('version'), 'has version None'),
  'an unknown type': (
    _set('weights', UP, 'type', value='VectorQuantized'),
    r"has the weight type 'VectorQuantized'.*QuantizedTensor",
  ),
  'no type': (lambda about: about['weights'][UP].pop('type'), 'has the weight type None'),
  'an unknown field': (_set('weights', UP, 'axis', value=0), r"fields \['axis'"),
  'a lost field': (lambda about: about['weights'][UP].pop('inputs'), 'were stored, not'),
  'an unknown format': (_set('weights', UP, 'format', value='int5'), f"{UP}.*'int5' is not one of"),
  'a format of other codes': (_set('weights', UP, 'format', value='int4'), f'{UP}.*codes of int4'),
  'other inputs': (_set('weights', UP, 'inputs', value=33), f'{UP}.*33 inputs of int8'),
  'inputs that are no number': (_set('weights', UP, 'inputs', value='32'), f"{UP}.*'32' inputs"),
  'no scales': (_set('weights', UP, 'scales', value=None), 'scales is unexpected'),
  'no such dtype': (_set('weights', UP, 'dtype', value='float12'), f"{UP} has the dtype 'float12'"),
  'no description': (lambda about: about['weights'].pop(UP), f'{UP} is not described'),
  'no fields': (_set('weights', UP, value=3), 'described as 3'),
  'a surplus': (_set('weights', 'other', value='array'), 'other is no parameter of the config'),
  'no weights': (lambda about: about.pop('weights'), 'lacks weights'),
  'a lost shape': (lambda about: about['arrays'].pop(UP + '.values'), 'values has no shape'),
  'another width': (_set('config', 'width', value=48), r'the config says \(48,'),
  'an unknown option': (_set('config', 'depth', value=3), r'no config of this version.*depth'),
  'a lost option': (lambda about: about['config'].pop('layers'), "no config .*'layers'"),
  'a bad option': (
    _set('config', 'vocab_size', value=0),
    'vocab_size must be an integer of at least 1, not 0',
  ),
}


@pytest.mark.parametrize('what', MANIFESTS)
def test_manifests_that_make_no_sense_are_named(folder, what):
  change, message = MANIFESTS[what]
  _edit_manifest(folder, change)
  with pytest.raises(ValueError, match=message):
    hf.load_pretrained(folder)


def test_a_field_of_the_config_that_is_newer_than_the_folder_has_its_default(folder):
  _edit_manifest(folder, lambda about: about['config'].pop('pad_id'))
  assert hf.load_config(folder).pad_id is None


@pytest.mark.parametrize('text', ['{"version": 1', '[]', '', '{"version": 1}'])
def test_manifests_that_are_none_are_named(folder, text):
  (folder / native.MANIFEST).write_text(text)
  with pytest.raises(ValueError, match=r'lissom\.json'):
    hf.load_pretrained(folder)


def test_a_truncated_file_is_named(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r'model\.safetensors is no sound safetensors file'):
    hf.load_pretrained(folder)


def test_plain_models_are_described_too():
  plain = Transformer(CONFIG, rngs=nnx.Rngs(0))
  arrays, layout = native.flatten(plain)
  assert set(layout.values()) == {'array'} and arrays.keys() == layout.keys()
  assert not native.is_compressed(plain)


def _uneven(**changes):
  """A model whose layers differ in every width."""
  layers = (
    LAYER,
    LayerConfig(
      mixer=AttentionConfig(query_heads=6, kv_heads=3, head_width=8),
      ffn=FeedForwardConfig(width=40),
    ),
    LayerConfig(
      mixer=AttentionConfig(query_heads=1, kv_heads=1, head_width=4), ffn=FeedForwardConfig(width=3)
    ),
  )
  return Transformer(CONFIG.replace(layers=layers, **changes), rngs=nnx.Rngs(0))


UNSAID = {
  'widths': (_uneven, r'layers 1: mixer\.kv_heads = 3 \(it would be 1\)'),
  'kind of rope': (
    lambda: _uneven(rope=RopeConfig(kind='ntk', factor=2.0)),
    "cannot describe the rope kind 'ntk'",
  ),
}


@pytest.mark.parametrize('case', UNSAID)
def test_what_config_json_cannot_describe_is_saved_all_the_same(case, tmp_path, caplog):
  make, reason = UNSAID[case]
  model = make()
  hf.save_pretrained(model, None, tmp_path / 'model')
  (message,) = caplog.messages
  assert message.startswith('saved in the format of Lissom, which transformers does not read: ')
  assert re.search(reason, message)
  loaded, _ = hf.load_pretrained(tmp_path / 'model')
  assert loaded.config == model.config and not native.is_compressed(loaded)
  assert_same_model(loaded, model)
  np.testing.assert_array_equal(_logits(loaded), _logits(model))
  with pytest.raises(ValueError, match='lissom'):
    transformers.AutoConfig.from_pretrained(tmp_path / 'model')


def test_a_layer_may_be_narrower_and_compressed(tmp_path, caplog):
  model = _uneven()
  weight = transformer.linears(model)['layers.1.ffn.up'].weight
  weight.set_value(jax.jit(_int8)(weight.get_value()))
  hf.save_pretrained(model, None, tmp_path / 'model')
  loaded, _ = hf.load_pretrained(tmp_path / 'model')
  assert_same_model(loaded, model)
  np.testing.assert_array_equal(_logits(loaded), _logits(model))
  assert caplog.messages == []  # transformers does not read compressed weights either way
  cached = generate(loaded, [[1, 2, 3]], max_new_tokens=5)
  assert cached == generate(model, [[1, 2, 3]], max_new_tokens=5) and len(cached[0]) > 0
