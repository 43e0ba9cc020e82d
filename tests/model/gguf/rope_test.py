"""Llama 3's parameters from the factors that a GGUF file holds."""

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.gguf import rope

PUBLISHED = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
PUBLISHED['original_max_position_embeddings'] = 8192


def _factors(theta, head_width, **scaling):
  """What each frequency is divided by in transformers, in float32 as in the files."""
  config = transformers.LlamaConfig(
    hidden_size=head_width,
    num_attention_heads=1,
    max_position_embeddings=131072,
    rope_parameters={'rope_type': 'llama3', 'rope_theta': theta, **scaling},
  )
  scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](config, torch.device('cpu'))
  plain = theta ** -(torch.arange(0, head_width, 2).float() / head_width)
  return (plain / scaled).numpy()


@pytest.mark.parametrize('factor, head_width', [(8.0, 128), (32.0, 64)])
def test_llama_3_comes_back_as_published(factor, head_width):
  scaling = {'factor': factor, **PUBLISHED}
  factors = _factors(500000.0, head_width, **scaling)
  found = rope.from_factors(factors, 500000.0, 131072)
  assert found == {'rope_type': 'llama3', **scaling, 'factor': pytest.approx(factor)}


@pytest.mark.parametrize('original', [64, 100, 1000, 5000])
@pytest.mark.parametrize('head_width', [8, 16, 20, 64])
@pytest.mark.parametrize('low, high', [(1.0, 4.0), (0.5, 1.5), (2.0, 32.0), (1.0, 1.01)])
def test_any_ramp_is_described_again(original, head_width, low, high):
  scaling = {'factor': 8.0, 'low_freq_factor': low, 'high_freq_factor': high}
  scaling['original_max_position_embeddings'] = original
  factors = _factors(10000.0, head_width, **scaling)
  found = rope.from_factors(factors, 10000.0, 131072)
  kind = found.pop('rope_type')
  again = np.full_like(factors, found['factor'])
  if kind == 'llama3':
    again = _factors(10000.0, head_width, **found)
  np.testing.assert_allclose(again, factors, rtol=1e-5)  # float32 in and out


def test_factors_of_one_are_no_scaling_and_equal_ones_are_linear():
  assert rope.from_factors(np.ones(8, np.float32), 1e4, 64) is None
  found = rope.from_factors(np.full(8, 4, np.float32), 1e4, 64)
  assert found == {'rope_type': 'linear', 'factor': 4.0}


def test_other_factors_are_refused():
  factors = np.float32([1, 1.5, 1.2, 3, 2, 4, 4, 4])
  with pytest.raises(ValueError, match=r'rope_freqs\.weight holds factors that no llama3'):
    rope.from_factors(factors, 1e4, 64)


@pytest.mark.parametrize('value', [0.5, 0.0, np.nan, np.inf])
def test_factors_that_speed_up_or_are_not_finite_are_refused(value):
  with pytest.raises(ValueError, match='less than 1 or not finite'):
    rope.from_factors(np.float32([1, value, 4, 4]), 1e4, 64)
