"""Recipes in phases: what each phase sees, that zeros stay, and that a killed run ends the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model import native
from model.compress import pipeline, progress, recipe, registry
from model.compress.phases import phases
from model.compress.registry import Learned, Technique
from model.transformer import matrices, parameters
from ops.linear import dense
from ops.sparse import SparseTensor

WANDA, NUDGE = {'wanda': {'sparsity': 0.5}}, {'nudge': {}}
INT4 = {'round_to_nearest': {'format': 'int4', 'group_size': 8}}
TWO_OF_FOUR = {'wanda': {'n': 2, 'm': 4}, 'only': ['*.ffn.*']}
FEW = {'wanda': {'sparsity': 0.1}, 'only': ['*.attention.*']}  # not a share of zeros that shows


class Killed(Exception):
  """Stands for a kill."""


@dataclasses.dataclass(frozen=True)
class NudgeSpec:
  """No options."""


@dataclasses.dataclass
class School:
  """Counts the lessons."""

  fingerprint: str = 'school'
  lessons: int = 0


def _nudge(model, school, spec, folder):
  """Adds a number to all that is a number, as training might."""
  del spec, folder
  school.lessons += 1
  model = nnx.clone(model)
  add = lambda a: a + jnp.asarray(0.03, a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
  for param in parameters(model).values():
    param.set_value(jax.tree.map(add, param.get_value()))
  return Learned(model=model, events={'lessons': 1})


ROW = Technique(
  name='nudge',
  function=_nudge,
  spec=NudgeSpec,
  statistics=(),
  paper='',
  scope='learn',
  becomes=lambda model, spec: model,
)


@pytest.fixture(autouse=True)
def nudge(monkeypatch):
  """A step that trains and costs nothing."""
  monkeypatch.setitem(registry.TECHNIQUES, 'nudge', ROW)


def _recipe(*steps, **fields):
  return recipe.parse({'name': 'x', 'steps': list(steps), **fields})


def _compress(model, tokens_BT, *steps, **options):
  return pipeline.compress(model, _recipe(*steps), tokens_BT, **{'school': School(), **options})


def _bytes(model):
  arrays, layout = native.flatten(model)
  return layout, {name: np.asarray(a).tobytes() for name, a in arrays.items()}


@pytest.mark.parametrize(
  'names, expected',
  [
    ('cast wanda gptq', ['cast wanda gptq']),
    ('prune_ffn nudge rotate gptq', ['prune_ffn nudge rotate gptq']),
    ('wanda nudge nudge gptq', ['wanda', 'nudge nudge gptq']),
    ('nudge wanda nudge gptq nudge', ['nudge wanda', 'nudge gptq', 'nudge']),
    ('rotate nudge', ['rotate', 'nudge']),
  ],
)
def test_a_step_that_trains_after_others_begins_a_phase(names, expected):
  found = phases(_recipe(*({name: {}} for name in names.split())))
  assert [' '.join(s.technique for s in phase.recipe.steps) for phase in found] == expected
  assert [phase.first for phase in found] == [0, *(phase.last + 1 for phase in found[:-1])]
  assert [phase.is_last for phase in found] == [False] * (len(found) - 1) + [True]


def test_each_phase_sees_the_model_that_the_last_one_left(tiny, tokens_BT):
  model, ledger = _compress(tiny(), tokens_BT, TWO_OF_FOUR, NUDGE, FEW, INT4)
  by_hand, _ = _compress(tiny(), tokens_BT, TWO_OF_FOUR)
  by_hand = _nudge(by_hand, School(), None, None).model
  by_hand, last = _compress(by_hand, tokens_BT, FEW, INT4)
  assert _bytes(model) == _bytes(by_hand)
  assert ledger.layers == last.layers
  assert [row.technique for row in ledger.events].count('nudge') == 1


def test_zeros_stay_and_only_kept_weights_learn(tiny, tokens_BT):
  before, _ = _compress(tiny(), tokens_BT, TWO_OF_FOUR, FEW)
  after, _ = _compress(tiny(), tokens_BT, TWO_OF_FOUR, FEW, NUDGE)
  for layer, w in matrices(after).items():
    old, new = np.asarray(dense(matrices(before)[layer])), np.asarray(dense(w))
    kept = old != 0
    np.testing.assert_array_equal(new, np.where(kept, old + np.float32(0.03), 0), layer)
    assert isinstance(w, SparseTensor) == ('.ffn.' in layer)
    assert (kept.mean() < 0.95) == (layer != 'head')


def test_the_zeros_of_a_model_that_was_pruned_before_stay(tiny, tokens_BT):
  pruned, _ = _compress(tiny(), tokens_BT, {'magnitude': {'sparsity': 0.5}})
  after, _ = _compress(pruned, tokens_BT, NUDGE)
  for layer, w in matrices(pruned).items():
    np.testing.assert_array_equal(np.asarray(w) == 0, np.asarray(matrices(after)[layer]) == 0)


CHAIN = (TWO_OF_FOUR, NUDGE, FEW, INT4, NUDGE)
KEPT = 2 + 1 + (1 + 2 + 1) + (1 + 2)  # blocks, and models after a phase or a step that trains


@pytest.fixture(scope='module')
def whole(tiny):
  """The model and the ledger of the chain, in one go."""
  tokens_BT = np.random.default_rng(0).integers(0, 60, (6, 10), np.int32)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry.TECHNIQUES, 'nudge', ROW)
    model, ledger = _compress(tiny(), tokens_BT, *CHAIN)
  return tokens_BT, _bytes(model), ledger


def _after_each_state(patch):
  """Has a run die as soon as it has kept another state."""
  for name in ('save', 'save_model'):
    patch.setattr(progress.Progress, name, _dying(getattr(progress.Progress, name)))


def _before_each_removal(patch):
  """Has a run die when it has kept a state, with what that supersedes still there."""
  real, close = progress._remove, progress.Progress.close
  patch.setattr(progress, '_remove', _dying(lambda *args, **options: None))

  def closing(self):
    patch.setattr(progress, '_remove', real)
    close(self)

  patch.setattr(progress.Progress, 'close', closing)


def _dying(function):
  def run(*args, **options):
    function(*args, **options)
    raise Killed

  return run


@pytest.mark.parametrize('killed', [_after_each_state, _before_each_removal])
@pytest.mark.quick(killed=(_after_each_state,))
def test_killed_again_and_again_it_ends_with_the_same_bits(tiny, tmp_path, whole, killed):
  tokens_BT, want, ledger = whole
  folder, school = tmp_path / 'progress', School()
  with pytest.MonkeyPatch.context() as patch:
    killed(patch)
    for _ in range(KEPT):
      with pytest.raises(Killed):
        _compress(tiny(), tokens_BT, *CHAIN, resume=folder, school=school)
    model, again = _compress(tiny(), tokens_BT, *CHAIN, resume=folder, school=school)
  assert _bytes(model) == want
  assert (again.events, again.layers) == (ledger.events, ledger.layers)
  assert school.lessons == 2  # no step ran twice
  assert not folder.exists()


def test_a_teacher_that_is_compressed_in_place_stays_as_it_is(tiny, tokens_BT):
  model = tiny()
  before = _bytes(model)
  _compress(model, tokens_BT, INT4, NUDGE, in_place=True)
  assert _bytes(model) == before
  same, _ = _compress(model, tokens_BT, INT4, in_place=True)
  assert same is model


@pytest.mark.parametrize(
  'steps, message',
  [
    (
      [WANDA, NUDGE, {'rotate': {}}],
      'rotate changes the whole model, so it has to come before wanda',
    ),
    ([WANDA, NUDGE, {'prune_ffn': {}}], 'prune_ffn changes the whole .* before wanda'),
    ([TWO_OF_FOUR, NUDGE, WANDA], 'wanda prunes plain matrices, not a SparseTensor'),
    ([FEW, NUDGE, {'hqq': {'group_size': 8}}], 'what wanda set to zero would not stay zero'),
    ([INT4, NUDGE, INT4], r'already quantized \(int4\)'),
    ([WANDA, NUDGE, {**INT4, 'only': ['*.upp']}], "no layer matches '.*upp' of round"),
  ],
)
def test_what_does_not_fit_in_a_later_phase_is_refused_before_any_work(
  tiny, tokens_BT, steps, message
):
  school = School()
  with pytest.raises(ValueError, match=message):
    _compress(tiny(), tokens_BT, *steps, school=school, progress=_forbidden)
  assert school.lessons == 0


def _forbidden(*args):
  raise AssertionError('work was done')
