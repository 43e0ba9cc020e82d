"""Closeness of two models against sums of scipy over all logits."""

import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, rel_entr

from model.config import ModelConfig
from model.eval import closeness
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.transformer import Transformer, linears


def _model(seed, layers=1):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=16)
  )
  config = ModelConfig(
    family='llama', vocab_size=20, width=16, layers=(layer,) * layers, max_positions=64
  )
  model = Transformer(config, rngs=nnx.Rngs(seed))
  for linear in linears(model).values():
    linear.weight.set_value(12 * linear.weight.get_value())
  return model


@pytest.mark.parametrize('masked', [False, True])
def test_means_match_scipy(rng, masked):
  student, teacher = _model(1), _model(2, layers=2)
  tokens_BT = rng.integers(0, 20, (closeness.ROWS + 5, 9)).astype(np.int32)
  counted_BT = rng.random(tokens_BT.shape) < 0.4 if masked else None
  got = closeness.measure(student, teacher, tokens_BT, counted_BT)
  log_q, log_p = (log_softmax(np.float64(m(tokens_BT))[:, :-1], -1) for m in (student, teacher))
  q, p = np.exp(log_q), np.exp(log_p)
  labels = tokens_BT[:, 1:]
  real = np.ones(labels.shape, bool) if counted_BT is None else counted_BT[:, 1:]
  mean = lambda values: values[real].mean()
  assert got.tokens == real.sum()
  nll = -np.take_along_axis(log_q, labels[..., None], -1)[..., 0]
  assert got.cross_entropy == pytest.approx(mean(nll), rel=1e-5)
  assert got.entropy == pytest.approx(mean(-(q * log_q).sum(-1)), rel=1e-5)
  assert got.forward_kl == pytest.approx(mean(rel_entr(p, q).sum(-1)), rel=1e-4)
  assert got.reverse_kl == pytest.approx(mean(rel_entr(q, p).sum(-1)), rel=1e-4)
  confidence, right = q.max(-1)[real], (q.argmax(-1) == labels)[real]
  error = 0.0
  for low in range(closeness.BINS):
    inside = np.minimum((confidence * closeness.BINS).astype(int), closeness.BINS - 1) == low
    error += abs(confidence[inside].sum() - right[inside].sum()) / len(confidence)
  assert got.calibration_error == pytest.approx(error, rel=1e-4)


def test_no_tokens_to_predict_are_refused():
  tokens_BT = np.zeros((2, 3), np.int32)
  counted_BT = np.array([[True, False, False]] * 2)
  with pytest.raises(ValueError, match='no token to predict'):
    closeness.measure(_model(1), _model(2), tokens_BT, counted_BT)
