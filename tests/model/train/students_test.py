"""Students from a teacher's layers, by DistilBERT's published choice and against plain slices."""

import jax
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.train import students
from model.transformer import Context, Transformer, parameters
from ops import quantized


def _teacher(depth=4, **settings):
  layer = LayerConfig(
    mixer=AttentionConfig(query_heads=2, kv_heads=1, head_width=8), ffn=FeedForwardConfig(width=24)
  )
  layers = tuple(layer.with_ffn(width=8 * (l + 1)) for l in range(depth))
  # each of its own width, so that a wrong one shows
  config = ModelConfig(
    family='llama', vocab_size=32, width=16, layers=layers, max_positions=64, **settings
  )
  return Transformer(config, rngs=nnx.Rngs(0))


def test_six_of_twelve_layers_are_those_of_distilbert():
  assert students.spread(6, 12) == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize('depth', [1, 2, 5, 12, 30])
def test_the_rule_is_the_nearest_layer_to_even_steps(depth):
  for count in range(1, depth + 1):
    chosen = students.spread(count, depth)
    points = np.linspace(0, depth - 1, count)
    np.testing.assert_array_equal(chosen, np.floor(points + 0.5 + 1e-9))
    assert len(set(chosen)) == count and list(chosen) == sorted(chosen)
  assert students.spread(depth, depth) == tuple(range(depth))


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.quick(tied=(True,))
def test_a_student_predicts_as_the_teacher_without_the_other_layers(rng, tied):
  teacher = _teacher(tied=tied)
  tokens_BT = rng.integers(0, 32, (2, 7))
  student = students.from_layers(teacher, 2)
  assert student.config == teacher.config.replace(
    layers=(teacher.config.layers[0], teacher.config.layers[3])
  )
  context = Context.of(teacher.config, tokens_BT)
  x_BTD = teacher.embed(tokens_BT)
  for index in (0, 3):
    x_BTD, _ = context.run(teacher.layers[index], x_BTD)
  np.testing.assert_array_equal(student(tokens_BT), teacher.logits(teacher.final_norm(x_BTD)))
  assert len(teacher.layers) == 4


def test_a_list_gives_the_order_and_a_layer_may_come_twice(rng):
  teacher = _teacher()
  up = teacher.layers[1].ffn.up.weight
  up.set_value(quantized.quantize(up.get_value(), 'int8'))
  student = students.from_layers(teacher, [2, 1, 1])
  assert [layer.ffn.width for layer in student.config.layers] == [24, 16, 16]
  names = parameters(student)
  assert names['layers.1.ffn.up.weight'] is not names['layers.2.ffn.up.weight']
  for at, index in enumerate([2, 1, 1]):
    for path, param in parameters(teacher.layers[index]).items():
      mine = names[f'layers.{at}.{path}'].get_value()
      assert type(mine) is type(param.get_value())
      for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(param.get_value()), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a is not b


def test_a_random_student_has_the_shape_and_no_weight_of_the_teacher():
  teacher = _teacher()
  student, other = (students.at_random(teacher, 2, seed=seed) for seed in (0, 1))
  from_layers = students.from_layers(teacher, 2)
  assert student.config == from_layers.config
  kernel = lambda model: np.asarray(model.layers[1].ffn.up.weight.get_value())
  assert kernel(student).shape == kernel(from_layers).shape
  assert not np.any(kernel(student) == kernel(from_layers))
  assert not np.any(kernel(student) == kernel(other))


@pytest.mark.parametrize(
  'layers, match',
  [
    (0, 'between 1 and all 4 layers of its teacher, not 0'),
    (5, 'not 5'),
    ([0, 4], r'layers 0 to 3; \[0, 4\] are not of them'),
    ([], r'\[\] are not of them'),
  ],
)
@pytest.mark.parametrize('build', [students.from_layers, students.at_random])
def test_layers_that_the_teacher_lacks_are_refused(build, layers, match):
  with pytest.raises(ValueError, match=match):
    build(_teacher(), layers)
