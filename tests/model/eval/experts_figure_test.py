"""The picture of experts: what it draws is the load of the records, and it is drawn."""

import numpy as np
from matplotlib import image

from model.eval import experts_figure


def _record(*loads):
  return {'experts': {f'layers.{l}.ffn': {'load': load} for l, load in enumerate(loads)}}


def test_loads_are_multiples_of_an_even_share():
  records = [_record([0.5, 0.5, 0, 0], [[0.25, 0.75], [1, 0]])] * 2 + [
    _record([0.25] * 4, [[0.5, 0.5], [0, 1]])
  ]
  found = experts_figure.loads(records)
  assert list(found) == ['layers.0.ffn', 'layers.1.ffn 0', 'layers.1.ffn 1']
  np.testing.assert_array_equal(found['layers.0.ffn'], [[2, 2, 1], [2, 2, 1], [0, 0, 1], [0, 0, 1]])
  np.testing.assert_array_equal(found['layers.1.ffn 0'], [[0.5, 0.5, 1], [1.5, 1.5, 1]])


def test_long_runs_are_drawn_by_means_of_stretches():
  load_E_ = np.arange(900.0).reshape(1, 900)
  expected = load_E_.reshape(1, 300, 3).mean(2)
  np.testing.assert_array_equal(experts_figure.shortened(load_E_), expected)
  np.testing.assert_array_equal(experts_figure.shortened(load_E_[:, :7]), load_E_[:, :7])


def test_an_expert_that_takes_all_is_red_and_a_dead_one_blue(tmp_path):
  experts_figure.write([_record([1.0, 0, 0, 0])] * 3, tmp_path / 'experts.png')
  pixels = image.imread(tmp_path / 'experts.png')[..., :3]
  red, _, blue = np.moveaxis(pixels, -1, 0)
  share = lambda mask: mask.mean()
  strong_red, strong_blue = share(red - blue > 0.2), share(blue - red > 0.2)
  assert 2 < strong_blue / strong_red < 4  # three experts of four, and the scale beside the panel
