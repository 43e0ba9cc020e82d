"""Calibrated steps on the head: against numpy, on what the final norm of the result puts out."""

import jax
import numpy as np
import pytest
from flax import nnx

from model import hf
from model.compress import pipeline, recipe
from model.transformer import parameters
from ops.linear import dense

SAME = 1e-5  # float32 and 48 steps, against float64
GROUP = 16
OPTIONS = {'format': 'int4', 'group_size': GROUP, 'symmetric': False}
ROUND, GPTQ = {'round_to_nearest': OPTIONS}, {'gptq': OPTIONS}
PRUNE = {'wanda': {'sparsity': 0.5}}
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (6, 10))
SEEN_LATE = 'compressed after the blocks, whose calibration saw it as it was'

last_hidden = jax.jit(lambda model, tokens_BT: model.hidden(tokens_BT)[0])


def _recipe(*steps, **options):
  return recipe.parse({'name': 'x', 'steps': list(steps), 'head': True, **options})


def _head(model) -> np.ndarray:
  """The matrix of a head, float32 [D, V]."""
  tied = model.config.tied
  w = parameters(model)['embedding.table' if tied else 'head.weight'].get_value()
  return np.asarray(dense(w).T if tied else dense(w))


def _inputs(model, start) -> np.ndarray:
  """The inputs of the head over the plain table of `start`, float64 [tokens, D]."""
  model = nnx.clone(model)
  model.embedding.table.set_value(start.embedding.table.get_value())
  return np.asarray(last_hidden(model, TOKENS_BT), np.float64).reshape(-1, model.config.width)


def _grid(w_IO):
  """The scale and the zero point of each weight, asymmetric int4."""
  w_JgO = w_IO.reshape(-1, GROUP, w_IO.shape[1]).astype(np.float64)
  low_JO, high_JO = np.minimum(w_JgO.min(1), 0), np.maximum(w_JgO.max(1), 0)
  scale_JO = ((high_JO - low_JO) / 15).astype(np.float16).astype(np.float64)
  zero_JO = np.clip(np.round(-low_JO / scale_JO), 0, 15)
  return scale_JO.repeat(GROUP, 0), zero_JO.repeat(GROUP, 0)


def _nearest(w, scale, zero):
  return (np.clip(np.round(w / scale) + zero, 0, 15) - zero) * scale


def _gptq(w_IO, x_TI) -> np.ndarray:
  """GPTQ as published, by the inverse's Cholesky factor, in falling order of the diagonal."""
  hessian_II = x_TI.T @ x_TI / len(x_TI)
  hessian_II += 0.01 * np.diag(hessian_II).mean() * np.eye(len(hessian_II))
  order_I = np.argsort(-np.diag(hessian_II), kind='stable')
  upper_II = np.linalg.cholesky(np.linalg.inv(hessian_II[order_I][:, order_I])).T
  scale_IO, zero_IO = (a[order_I] for a in _grid(w_IO))
  w_IO = w_IO.astype(np.float64)[order_I]
  for i in range(len(w_IO)):
    value_O = _nearest(w_IO[i], scale_IO[i], zero_IO[i])
    w_IO[i:] -= np.outer(upper_II[i, i:], (w_IO[i] - value_O) / upper_II[i, i])
    w_IO[i] = value_O
  return w_IO[np.argsort(order_I)]


@pytest.fixture(scope='module', params=[False, True], ids=['untied', 'tied'])
def compressed(request, tiny):
  """A model, and it with rounded blocks and a head by GPTQ, with its ledger."""
  model = tiny(tied=request.param)
  steps = {**ROUND, 'only': ['layers.*']}, {**GPTQ, 'only': ['head']}
  return model, *pipeline.compress(model, _recipe(*steps), TOKENS_BT)


def test_it_is_gptq_on_what_the_compressed_blocks_hand_on(compressed):
  model, found, ledger = compressed
  x_TD = _inputs(found, model)
  np.testing.assert_allclose(_head(found), _gptq(_head(model), x_TD), atol=SAME)
  of_start = _gptq(_head(model), _inputs(model, model))
  assert np.abs(of_start - _head(found)).max() > 100 * SAME
  late = [('embedding', 'gptq', SEEN_LATE)] if model.config.tied else []
  assert [(row.layer, row.technique, row.event) for row in ledger.events] == late


def test_it_moves_weights_further_and_logits_less_than_rounding(compressed):
  model, found, _ = compressed
  x_TD, w_DV = _inputs(found, model), _head(model)
  moved_DV, rounding_DV = _head(found) - w_DV, _nearest(w_DV, *_grid(w_DV)) - w_DV
  assert np.linalg.norm(moved_DV) > np.linalg.norm(rounding_DV)
  assert np.linalg.norm(x_TD @ moved_DV) < 0.8 * np.linalg.norm(x_TD @ rounding_DV)


def test_a_folder_holds_it_bit_for_bit(compressed, tmp_path):
  _, found, _ = compressed
  hf.save_pretrained(found, None, tmp_path / 'model')
  again, _ = hf.load_pretrained(tmp_path / 'model')
  before, after = (parameters(m) for m in (found, again))
  assert before.keys() == after.keys()
  for path, param in before.items():
    ours, theirs = (jax.tree.leaves(p.get_value()) for p in (param, after[path]))
    assert [np.asarray(a).tobytes() for a in ours] == [np.asarray(a).tobytes() for a in theirs]


def test_a_recipe_that_names_it_is_read_as_it_was_written():
  one = _recipe({**GPTQ, 'only': ['head']}, sequential='none')
  assert recipe.parse(one.to_dict()) == one and one.steps[0].only == ('head',)


def test_measured_before_anything_is_compressed_it_is_gptq_on_the_plain_model(tiny):
  model = tiny(tied=True)
  steps = {**ROUND, 'only': ['layers.*']}, {**GPTQ, 'only': ['embedding']}
  found, ledger = pipeline.compress(model, _recipe(*steps, sequential='none'), TOKENS_BT)
  expected_DV = _gptq(_head(model), _inputs(model, model))
  np.testing.assert_allclose(_head(found), expected_DV, atol=SAME)
  assert ledger.events == []


def test_wanda_prunes_the_head_and_no_embedding_that_is_only_looked_up(tiny):
  model = tiny()
  steps = PRUNE, {**ROUND, 'only': ['embedding']}
  found, ledger = pipeline.compress(model, _recipe(*steps, embedding=True), TOKENS_BT)
  x_TD, w_DV = _inputs(found, found), _head(model)
  score_DV = np.abs(w_DV) * np.linalg.norm(x_TD, axis=0)[:, None]
  kept_DV = score_DV >= np.sort(score_DV, 0)[len(w_DV) // 2]
  np.testing.assert_array_equal(_head(found), np.where(kept_DV, w_DV, 0))
  why = 'left as it was, because an embedding that is only looked up has no inputs to calibrate on'
  rows = [(row.layer, row.technique, row.event) for row in ledger.events]
  assert rows == [('embedding', 'wanda', why)]
