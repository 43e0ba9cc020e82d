"""The causal convolution against sums by hand and against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ops import convolution

B, T, O, WIDTH = 2, 11, 3, 4
FLOAT32 = 1e-6  # sums of four products of order 1


@pytest.fixture
def arrays(rng):
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(B, T, O), draw(WIDTH, O)


_run = jax.jit(convolution.causal)


def test_torch_computes_the_same(arrays):
  x, kernel = arrays
  weight = torch.tensor(kernel.T[:, None])
  rows = torch.tensor(x).transpose(1, 2)
  y = torch.nn.functional.conv1d(rows, weight, padding=WIDTH - 1, groups=O)[..., :T]
  np.testing.assert_allclose(_run(x, kernel), y.transpose(1, 2).numpy(), atol=FLOAT32)


def test_a_document_does_not_see_the_one_before(arrays):
  x, kernel = arrays
  starts = np.zeros((B, T), bool)
  starts[0, [2, 4, 9]] = starts[1, 0] = True
  y = _run(x, kernel, jnp.full((B, WIDTH - 1, O), 1e3), starts)
  for begin, end in ((2, 4), (4, 9), (9, 11)):
    alone = _run(x[:1, begin:end], kernel)
    np.testing.assert_allclose(y[:1, begin:end], alone, atol=FLOAT32)
  np.testing.assert_allclose(y[1:], _run(x[1:], kernel), atol=FLOAT32)


def test_it_continues_after_earlier_inputs(arrays):
  x, kernel = arrays
  whole = _run(x, kernel)
  for at in (3, 7):
    y = _run(x[:, at:], kernel, x[:, at - WIDTH + 1 : at])
    np.testing.assert_allclose(y, whole[:, at:], atol=FLOAT32)


def test_inputs_of_another_number_are_refused(arrays):
  x, kernel = arrays
  with pytest.raises(ValueError, match='over 4 tokens needs 3 inputs before them, not 2'):
    convolution.causal(x, kernel, x[:, :2])
