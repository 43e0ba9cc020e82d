"""The budget search: the program against enumeration, costs against whole forward passes."""

import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from model.compress import budget, pipeline, recipe
from model.compress.budget import Option
from model.transformer import linears, matrices, parameters
from ops import activations
from ops.linear import dense

# Float32 logits through another program; a divergence of 1e-3 is known to a hundredth.
TOLERANCE = 1e-5


def _recipe(name, *steps):
  return recipe.parse({'name': name, 'steps': list(steps)})


RECIPES = [
  _recipe('int8', {'cast': {}}, {'round_to_nearest': {'format': 'int8'}}),
  _recipe('int4', {'round_to_nearest': {'format': 'int4', 'group_size': 16}}),
  _recipe('half', {'wanda': {'n': 2, 'm': 4}}, {'round_to_nearest': {'format': 'int8'}}),
]
to_dense = jax.jit(dense)
CAST = _recipe('first', {'cast': {}}).steps


def _options(rng, layers, names):
  return [
    Option(layer=f'l{i}', treatment=name, nbytes=int(rng.integers(1, 50)), kl=float(rng.random()))
    for i in range(layers)
    for name in names
  ]


def _best(options, limit):
  """The lowest sum within the limit, by trying all."""
  layers = list(dict.fromkeys(o.layer for o in options))
  each = [[o for o in options if o.layer == layer] for layer in layers]
  fitting = [c for c in itertools.product(*each) if sum(o.nbytes for o in c) <= limit]
  return min((sum(o.kl for o in c) for c in fitting), default=None)


@pytest.mark.parametrize('seed', range(12))
def test_the_program_finds_what_enumeration_finds(seed):
  rng = np.random.default_rng(seed)
  options = _options(rng, 5, 'abc')
  limit = int(rng.integers(40, 160))
  best = _best(options, limit)
  if best is None:
    with pytest.raises(ValueError, match='at least'):
      budget.allocate(options, limit)
    return
  chosen = budget.allocate(options, limit)
  picked = [o for o in options if chosen[o.layer] == o.treatment]
  assert len(picked) == len(chosen) == 5
  assert sum(o.nbytes for o in picked) <= limit
  assert sum(o.kl for o in picked) == pytest.approx(best)


def test_tiny_costs_and_large_sizes_are_told_apart():
  options = [
    Option(layer=f'l{i}', treatment=name, nbytes=nbytes, kl=kl)
    for i in range(3)
    for name, nbytes, kl in [('a', 10**9, 0.0), ('b', 5 * 10**8 + i, (i + 1) * 1e-7)]
  ]
  assert budget.allocate(options, 2 * 10**9 + 5 * 10**8) == {'l0': 'b', 'l1': 'a', 'l2': 'a'}


def _logits(model, tokens_BT):
  return np.asarray(_run(*nnx.split(model), tokens_BT), np.float64)


_run = jax.jit(lambda graphdef, state, tokens: nnx.merge(graphdef, state)(tokens), static_argnums=0)


def _kl(p, q):
  log = lambda x: (
    x
    - x.max(-1, keepdims=True)
    - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
  )
  p, q = log(p), log(q)
  return (np.exp(p) * (p - q)).sum(-1).mean()


@pytest.mark.slow
def test_costs_are_those_of_the_whole_model(tiny, tokens_BT):
  model = tiny(layers=2)
  options = budget.measure(model, budget.treatments(RECIPES), tokens_BT)
  assert len(options) == 2 * 7 * 4
  expected = _logits(model, tokens_BT)
  by_name = {(o.layer, o.treatment): o for o in options}
  for layer, name in [('layers.0.ffn.down', 'int4'), ('layers.1.attention.key', 'half')]:
    steps = [{**step, 'only': [layer]} for step in _plain(name)]
    one = recipe.parse({'name': 'x', 'steps': steps, 'sequential': 'none'})
    treated, _ = pipeline.compress(model, one, tokens_BT)
    option = by_name[layer, name]
    assert option.nbytes == matrices(treated)[layer].nbytes
    kl = _kl(expected, _logits(treated, tokens_BT))
    assert option.kl == pytest.approx(kl, rel=0.02, abs=TOLERANCE) and kl > 1e-4
  left = [o for o in options if o.treatment == 'as it is']
  assert all(o.kl == 0 and o.nbytes == matrices(model)[o.layer].nbytes for o in left)


@pytest.mark.slow
def test_rounding_the_inputs_is_not_free(tiny, tokens_BT):
  """Activations of 4 bits cost what the whole model loses by them, though no weight changes."""
  model = tiny(layers=2)
  a4 = _recipe('a4', {'quantize_activations': {'bits': 4}})
  options = budget.measure(model, budget.treatments([a4]), tokens_BT)
  layer = 'layers.0.ffn.down'
  found = next(o for o in options if (o.layer, o.treatment) == (layer, 'a4'))
  treated = nnx.clone(model)
  param = parameters(treated)[f'{layer}.weight']
  param.set_value(activations.quantize_activations(param.get_value(), 4))
  kl = _kl(_logits(model, tokens_BT), _logits(treated, tokens_BT))
  assert found.kl == pytest.approx(kl, rel=0.02, abs=TOLERANCE) and kl > 1e-4


def _plain(name):
  one = next(r for r in RECIPES if r.name == name).to_dict()
  return [step for step in one['steps'] if 'cast' not in step]


@pytest.mark.parametrize('count', [1, pytest.param(10, marks=pytest.mark.slow)])
def test_budgets_are_kept_and_beat_uniform_treatment(tiny, tokens_BT, rng, count):
  model, choices = tiny(layers=2), budget.treatments(RECIPES)
  uniform = {}
  for choice in choices:
    allocation = dict.fromkeys([p for p in linears(model) if p.startswith('layers.')], choice.name)
    one = budget.recipe_of('u', allocation, choices, CAST)
    treated, _ = pipeline.compress(model, one, tokens_BT)
    nbytes = sum(p.get_value().nbytes for p in parameters(treated).values())
    uniform[choice.name] = nbytes, _kl(_logits(model, tokens_BT), _logits(treated, tokens_BT))
  smallest, largest = (f(n for n, _ in uniform.values()) for f in (min, max))
  options = None
  for limit in rng.integers(smallest, largest + 1000, count):
    found, options = budget.search(
      model, choices, tokens_BT, int(limit), first=CAST, options=options
    )
    again, _ = pipeline.compress(model, found.recipe, tokens_BT)
    nbytes = sum(p.get_value().nbytes for p in parameters(again).values())
    assert nbytes == found.nbytes <= limit
    kl = _kl(_logits(model, tokens_BT), _logits(again, tokens_BT))
    assert found.kl == pytest.approx(kl, rel=0.02, abs=TOLERANCE)
    best = min(kl for n, kl in uniform.values() if n <= limit)
    assert kl <= best * 1.02 + TOLERANCE


@pytest.mark.slow
def test_the_recipe_can_be_written_down_and_read_again(tiny, tokens_BT):
  model, choices = tiny(layers=2), budget.treatments(RECIPES)
  found, options = budget.search(model, choices, tokens_BT, 60_000, first=CAST)
  assert recipe.parse(found.recipe.to_dict()) == found.recipe
  names = {o.treatment for o in options}
  assert names == {'as it is', 'int8', 'int4', 'half'} and 'found under' in found.recipe.description


def test_a_budget_that_nothing_fits_says_what_is_needed(tiny, tokens_BT):
  with pytest.raises(ValueError, match=r'at least [0-9,]+ bytes'):
    budget.search(tiny(), budget.treatments(RECIPES), tokens_BT, 30_000, first=CAST)


def test_what_does_not_treat_one_matrix_is_refused():
  for step in ({'rotate': {}}, {'owl': {}}):
    with pytest.raises(ValueError, match='cannot be chosen layer by layer'):
      budget.treatments([_recipe('x', step)])


def test_dense_of_a_treated_matrix_is_what_is_measured(tiny, tokens_BT):
  model = tiny(layers=1)
  one = recipe.parse({'name': 'x', 'steps': [{'round_to_nearest': {'format': 'int4'}}]})
  treated, _ = pipeline.compress(model, one)
  plain = nnx.clone(treated)
  for path, linear in linears(plain).items():
    linear.weight.set_value(to_dense(matrices(treated)[path]))
  np.testing.assert_allclose(
    _logits(treated, tokens_BT), _logits(plain, tokens_BT), atol=1e-5, rtol=0
  )
