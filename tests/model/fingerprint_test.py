"""Fingerprints change with anything that they stand for, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from model import fingerprint, presets
from model.compress import pipeline, recipe
from model.transformer import Transformer, parameters

UP = 'layers.0.ffn.up.weight'


def _model(seed=0):
  return Transformer(presets.preset('tiny-llama'), rngs=nnx.Rngs(seed))


def _changed(change):
  model = _model()
  param = parameters(model)[UP]
  param.set_value(change(param.get_value()))
  return fingerprint.of_model(model)


def test_a_model_is_known_by_type_shape_and_every_bit_of_its_weights():
  first = fingerprint.of_model(_model())
  assert first == fingerprint.of_model(_model())
  changed = [
    _changed(lambda w: w.at[3, 4].set(np.nextafter(w[3, 4], np.float32(9)))),
    _changed(lambda w: w.reshape(w.shape[::-1])),
    _changed(lambda w: w.view(jnp.int32)),
    _changed(lambda w: w.astype(jnp.bfloat16)),
    fingerprint.of_model(_model(seed=1)),
  ]
  assert len({first, *changed}) == 6


def test_a_compressed_model_is_known_by_its_codes_and_scales():
  step = recipe.parse({'name': 'x', 'steps': [{'round_to_nearest': {'format': 'int8'}}]})
  model, _ = pipeline.compress(_model(), step)
  param = parameters(model)[UP]
  before, leaves = fingerprint.of_model(model), jax.tree.leaves(param.get_value())
  found = set()
  for i, leaf in enumerate(leaves):
    changed = [*leaves[:i], leaf.at[(0,) * leaf.ndim].add(1), *leaves[i + 1 :]]
    param.set_value(jax.tree.unflatten(jax.tree.structure(param.get_value()), changed))
    found.add(fingerprint.of_model(model))
  assert len(found - {before}) == len(leaves) >= 2


def test_files_are_known_by_their_contents_in_any_order(tmp_path):
  (tmp_path / 'a.py').write_text('1')
  (tmp_path / 'b.py').write_text('2')
  paths = [tmp_path / 'a.py', tmp_path / 'b.py']
  first = fingerprint.of_files(paths)
  assert first == fingerprint.of_files(paths[::-1])
  (tmp_path / 'b.py').write_text('3')
  assert first != fingerprint.of_files(paths)
