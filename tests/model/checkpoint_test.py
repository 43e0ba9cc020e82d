"""Tests that checkpoints restore every kind of weight bit by bit, on one device or on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import checkpoint, native, sharding, transformer
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer
from ops import adapter_starts, quantized, sparse
from ops.linear import map_values

LAYER = LayerConfig(
  mixer=AttentionConfig(query_heads=2, kv_heads=2, head_width=16, qkv_bias=True),
  ffn=FeedForwardConfig(width=64),
)
CONFIG = ModelConfig(
  family='llama', vocab_size=40, width=32, layers=(LAYER,), max_positions=16, eos_ids=(2, 3)
)


def _pruned(w):
  return sparse.compress(w, sparse.n_of_m_mask(jnp.abs(w), 2, 4), 2, 4)


def _quantized(name, **options):
  return lambda w: quantized.quantize(w, name, **options)


KINDS = {
  'attention.query': _quantized('int4', group_size=16, symmetric=False),
  'attention.key': _quantized('nvfp4'),
  'attention.value': _quantized('mxfp8'),
  'attention.output': _quantized('nf4', group_size=16, double=True),
  'ffn.gate': _pruned,
  'ffn.up': lambda w: map_values(_quantized('int8'), _pruned(w)),
  'ffn.down': lambda w: adapter_starts.zero(
    quantized.quantize(w, 'nf4', double=True), 4, scale=2.0, key=jax.random.key(1)
  ),
}


@pytest.fixture(scope='module')
def model():
  model = Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  for path, kind in KINDS.items():
    weight = transformer.linears(model)[f'layers.0.{path}'].weight
    weight.set_value(jax.jit(kind)(weight.get_value()))
  return model


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
  path = tmp_path_factory.mktemp('checkpoints') / 'first'
  checkpoint.save(path, model)
  return path


def _assert_same(actual, expected):
  ours, theirs = (nnx.split(m)[1] for m in (actual, expected))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_kind_of_weight_is_restored_bit_by_bit(model, saved):
  loaded = checkpoint.load(saved)
  assert loaded.config == model.config and loaded.dtype == jnp.bfloat16
  _assert_same(loaded, model)
  assert {d for a in jax.tree.leaves(nnx.state(loaded)) for d in a.devices()} == {jax.devices()[0]}


@pytest.mark.parametrize('shape', [{'data': 2, 'fsdp': 2, 'model': 2}, {'model': 8}])
def test_arrays_are_read_with_the_shardings_of_a_mesh(model, saved, shape):
  mesh = sharding.make_mesh(**shape)
  loaded = checkpoint.load(saved, mesh)
  _assert_same(loaded, model)
  for param, places in sharding.shardings_of(loaded, mesh):
    assert jax.tree.map(lambda leaf: leaf.sharding, param.get_value()) == places
  split = {
    name for name, a in native.flatten(loaded)[0].items() if not a.sharding.is_fully_replicated
  }
  ffn = {f'layers.0.ffn.gate.weight.{name}' for name in ('values', 'indices')}
  assert ffn | {'layers.0.ffn.up.weight.values.scales', 'embedding.table'} <= split
  assert 'layers.0.attention_norm.scale' not in split


def test_a_sharded_model_is_saved_whole(model, saved, tmp_path):
  sharded = nnx.clone(model)
  sharding.shard(sharded, sharding.make_mesh(data=2, fsdp=2, model=2))
  checkpoint.save(tmp_path / 'sharded', sharded)
  _assert_same(checkpoint.load(tmp_path / 'sharded'), model)


def test_an_earlier_checkpoint_is_never_overwritten(model, saved):
  with pytest.raises(ValueError, match='exists already'):
    checkpoint.save(saved, model)


def test_a_path_without_a_checkpoint_is_named(tmp_path):
  with pytest.raises(ValueError, match='is not a checkpoint that'):
    checkpoint.load(tmp_path)
  with pytest.raises(ValueError, match='is not a checkpoint that'):
    checkpoint.load(tmp_path / 'nowhere')


def test_a_killed_save_leaves_nothing(model, tmp_path, monkeypatch):
  def killed(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint.ocp.args, 'JsonSave', killed)
  with pytest.raises(KeyboardInterrupt):
    checkpoint.save(tmp_path / 'new', model)
  assert not (tmp_path / 'new').exists()
