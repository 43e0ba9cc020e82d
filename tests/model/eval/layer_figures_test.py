"""The pictures of layers: what is drawn, read back from matplotlib's own objects."""

import pytest

from model.eval import layer_figures
from model.eval.records import Metric, Record


def _record(recipe, layers):
  return Record(
    experiment='compress',
    recipe=recipe,
    command='python -m experiments.compress',
    config={'layers': layers},
    environment={},
    seed=0,
    metrics={'ppl': Metric(2.0, '1')},
  )


def _layer(name, error, nbytes=100):
  return {'layer': name, 'shape': [10, 20], 'stored_bytes': nbytes, 'relative_error': error}


@pytest.fixture
def drawn(monkeypatch):
  """The figures, in place of being written."""
  figures = []
  monkeypatch.setattr(layer_figures, '_save', lambda figure, path: figures.append(figure))
  return figures


LAYERS = [
  _layer('head', 0.9),
  _layer('layers.1.ffn.down', 0.4, 50),
  _layer('layers.0.attention.key', 0.3),
  _layer('layers.0.attention.query', 0.1),
]


def test_a_panel_a_recipe_in_running_order(drawn, tmp_path):
  records = [_record('base', LAYERS), *(_record(f'r{i}', LAYERS) for i in range(4))]
  assert layer_figures.write_layers(records, tmp_path / 'layers.png')
  (figure,) = drawn
  panels = [a for a in figure.axes if a.get_title(loc='left')]
  assert [a.get_title(loc='left') for a in panels] == ['r0', 'r1', 'r2', 'r3']
  points = {line.get_color(): line.get_xydata().tolist() for line in panels[0].lines}
  colour = {kind: style[0] for kind, style in layer_figures.KINDS.items()}
  assert points[colour['query']] == [[0, 0.1]] and points[colour['key']] == [[1, 0.3]]
  assert points[colour['down']] == [[2, 0.4]]
  assert panels[0].get_ylim() == (0, pytest.approx(0.44))
  bits = [a.lines[0].get_ydata() for a in figure.axes if len(a.lines) == 1]
  assert [list(b) for b in bits] == [[4.0, 4.0, 2.0]] * 4


def test_nothing_is_drawn_of_records_without_layers(drawn, tmp_path):
  records = [_record('base', LAYERS), _record('other', [])]
  assert not layer_figures.write_layers(records, tmp_path / 'layers.png')
  assert drawn == []


def test_the_map_of_costs(drawn, tmp_path):
  costs = [('layers.0.a', 'as it is', 0.0), ('layers.0.a', 'int8', 1e-4), ('layers.0.a', 'x', 0.1)]
  costs += [('layers.1.a', 'as it is', 0.0), ('layers.1.a', 'int8', 1e-3)]
  layer_figures.write_sensitivity(costs, tmp_path / 'sensitivity.png')
  image = drawn[0].axes[0].images[0].get_array()
  assert image.tolist() == [[pytest.approx(-4), pytest.approx(-1)], [pytest.approx(-3), -9]]
  labels = [text.get_text() for text in drawn[0].axes[0].get_xticklabels()]
  assert labels == ['int8', 'x']


def test_pictures_are_written(tmp_path):
  layer_figures.write_layers([_record('r', LAYERS)], tmp_path / 'layers.png')
  layer_figures.write_sensitivity([('layers.0.a', 'int8', 1e-4)], tmp_path / 'sensitivity.png')
  for name in ('layers.png', 'sensitivity.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
