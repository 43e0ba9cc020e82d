"""The studies on a tiny base: what their records say, and their claims on invented runs."""

import itertools
import math
import types

import jax
import pytest
from flax import nnx

from experiments import (
  arms,
  small_models,
  study_adapters,
  study_attention,
  study_caches,
  study_compressed_experts,
  study_distillation,
  study_experts,
  study_int8,
  study_linearised,
  study_pruning,
  study_qat,
  study_upcycling,
)
from experiments import base as embedded
from experiments.arms import Options
from model import adapters, corpus
from model.eval import records
from model.transformer import Transformer

STUDIES = (
  study_adapters,
  study_attention,
  study_caches,
  study_compressed_experts,
  study_distillation,
  study_experts,
  study_int8,
  study_linearised,
  study_pruning,
  study_qat,
  study_upcycling,
)


@pytest.fixture
def smoke(base, tmp_path):
  """A function (study's module, arms, ...) -> the records by arm."""

  def run(module, *names, **more):
    out = tmp_path / 'study.jsonl'
    arms.run(module.STUDY, Options(arms=names, smoke=True, output=str(out), **more))
    return {row.recipe: row for row in records.read(out)}

  return run


@pytest.mark.parametrize('module', STUDIES, ids=lambda module: module.STUDY.name)
def test_claims_are_about_arms_of_the_study(module):
  study = module.STUDY
  assert study.name == module.__name__.rpartition('.')[2]
  used = set(itertools.chain.from_iterable(claim.arms for claim in study.claims))
  assert used <= study.arms.keys()
  starts = {getattr(arm, 'start', None) for arm in study.arms.values()}
  about = {claim.name.partition(',')[0] for claim in study.claims}
  assert all(f'  {name}  ' in module.__doc__ for name in about)
  assert starts - {None, 'random', 'layers', 'teacher'} <= study.arms.keys()


def _counts(module, runs):
  return {str(c.claim.text): c.held for c in arms.count(module.STUDY.claims, [runs])}


def test_adapters_on_invented_runs():
  loss = lambda value: {'cross_entropy': value}
  runs = {
    'full_short': {1e-3: loss(2.0), 2e-3: loss(2.1)},
    'lora_short': {1e-2: loss(2.03), 2e-2: loss(2.01)},
    'full_long': {1e-3: loss(1.5), 2e-3: loss(1.6)},
    'lora_long': {1e-2: loss(1.54), 4e-2: loss(1.53)},
  }
  held = _counts(study_adapters, runs)
  assert held == {
    'cross_entropy, lora_short < 1.02 x full_short': 1,
    'cross_entropy, lora_long < 1.02 x full_long': 0,  # 1.53 is not below it
    'cross_entropy, lora_short at 10 times the best rate of full_short < 1.02 x full_short': 1,
    'cross_entropy, lora_long at 10 times the best rate of full_long < 1.02 x full_long': 0,
    'cross_entropy, lora - full is larger with more text': 1,  # 0.03 and 0.01
    'learning_rate, lora_short / full_short within 4 and 30': 1,
    'learning_rate, lora_long / full_long within 4 and 30': 0,  # 40
  }


def test_qat_on_invented_runs():
  values = lambda loss, part: {0.0: {'cross_entropy': loss, 'recovered': part}}
  runs = {
    'rtn_int4': values(2.1, 0.0),
    'gptq_int4': values(2.05, 0.5),
    'qat_int4': values(2.06, 0.4),
    'rtn_int3': values(2.5, 0.0),
    'gptq_int3': values(2.3, 0.4),
    'qat_int3': values(2.2, 0.6),
    'rtn_int2': values(4.0, 0.0),
    'gptq_int2': values(3.5, 0.25),
    'qat_int2': values(2.7, 0.65),
  }
  assert _counts(study_qat, runs) == {
    'cross_entropy, qat_int4 < rtn_int4': 1,
    'cross_entropy, qat_int4 < gptq_int4': 0,
    'cross_entropy, qat_int3 < rtn_int3': 1,
    'cross_entropy, qat_int3 < gptq_int3': 1,
    'cross_entropy, qat_int2 < rtn_int2': 1,
    'cross_entropy, qat_int2 < gptq_int2': 1,
    'recovered, qat_int4 < qat_int3 < qat_int2': 1,
    'recovered of qat_int4 >= 0.3': 1,
    'recovered of qat_int3 >= 0.5': 1,
    'recovered of qat_int2 >= 0.7': 0,
  }


@pytest.mark.slow
def test_a_pruned_model_is_healed_and_says_how_much_came_back(smoke):
  rows = smoke(study_pruning)
  assert set(rows) == {'layers_quarter', 'channels_quarter', *study_pruning.STUDY.smoke}
  for shape in ('layers_quarter', 'channels_quarter'):
    before, healed = rows[shape], rows[f'{shape}_kd_16']
    assert healed.value('parameters') == before.value('parameters')
    lost, left = (
      r.value('cross_entropy') - r.value('base_cross_entropy') for r in (before, healed)
    )
    assert healed.value('recovered') == pytest.approx(1 - left / lost)
  width, depth = (
    rows[f'{kind}_quarter'].value('parameters_kept') for kind in ('channels', 'layers')
  )
  assert 0.75 < width <= depth < 0.9  # of four layers one goes; the embeddings stay


@pytest.mark.slow
def test_experts_made_of_the_base_start_as_it_did(smoke):
  rows = smoke(study_upcycling)
  assert set(rows) == {'copy_start', 'copy'}
  start = rows['copy_start']
  assert start.value('logit_difference') <= study_upcycling.EXACT
  assert start.value('cross_entropy') == pytest.approx(start.value('base_cross_entropy'), abs=1e-4)
  assert rows['copy'].value('cross_entropy') != start.value('cross_entropy')


@pytest.mark.slow
def test_compressed_experts_say_how_many_tokens_went_elsewhere(smoke):
  rows = smoke(study_compressed_experts)
  assert set(rows) == {'base', 'gptq_int3', 'reap50'}
  for name, row in rows.items():
    assert row.value('ppl') == pytest.approx(math.exp(row.value('cross_entropy')))
    changed = row.value('experts_changed')
    assert changed is None if name == 'base' else 0 < changed < 1
  # A pair of eight experts stays whole if both are among the four that are left.
  assert rows['reap50'].value('experts_changed') > 0.2


@pytest.mark.slow
def test_the_losses_of_qat_are_set_beside_those_of_rounding(smoke):
  rows = smoke(study_qat)
  assert set(rows) == {'rtn_int3', 'qat_int3'}
  loss = {name: row.value('cross_entropy') for name, row in rows.items()}
  assert rows['rtn_int3'].value('recovered') == 0
  base = small_models.prepare(Options(smoke=True), steps=1).base_loss
  part = (loss['rtn_int3'] - loss['qat_int3']) / (loss['rtn_int3'] - base)
  assert rows['qat_int3'].value('recovered') == pytest.approx(part)
  assert rows['qat_int3'].config['learning_rate'] == study_qat.RATES[0]


@pytest.mark.slow
def test_an_adapter_trains_less_of_the_base_on_its_own_text(smoke):
  rows = smoke(study_adapters)
  full, lora = rows['full_short'], rows['lora_short']
  assert lora.value('trained_parameters') < full.value('trained_parameters') / 4
  assert lora.value('base_cross_entropy') == full.value('base_cross_entropy')
  assert lora.config['adapter']['rank'] == 9 and full.config['adapter'] is None
  assert lora.config['text_fingerprint'] == corpus.load('python-docs').fingerprint


def test_attention_alone_gets_as_many_parameters_as_all_layers():
  special = types.SimpleNamespace(bos_id=0, eos_ids=(0,))
  base = Transformer(embedded.config(small_models.PLAN, special), rngs=nnx.Rngs(0))
  count = lambda config: sum(
    w.a_IR.size + w.b_RO.size
    for w in adapters.adapted(adapters.attach(base, config, key=jax.random.key(0))).values()
  )
  everywhere, attention = count(study_adapters.LORA), count(study_adapters.ATTENTION)
  assert everywhere == 93_312  # 9 x (4 layers of 2,048 and a head of 2,176)
  assert attention == pytest.approx(everywhere, rel=2e-3)


@pytest.mark.slow
def test_int8_products_and_float_ones_train_the_same_model(smoke):
  rows = smoke(study_int8)
  assert rows['float'].value('train_tokens') == rows['int8_inputs'].value('train_tokens')
  losses = [rows[name].value('cross_entropy') for name in study_int8.STUDY.smoke]
  assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.01)


def test_experts_on_invented_runs():
  values = lambda loss, violation, dead: {
    1e-3: {'cross_entropy': loss, 'max_violation': violation, 'dead_experts': dead}
  }
  runs = {
    'dense': values(3.0, 0, 0),
    'routed1_loss': values(2.9, 0.5, 0),
    'routed1_bias': values(3.1, 0.7, 0),
    'routed1_none': values(3.0, 3.0, 1),
  }
  assert _counts(study_experts, runs) == {
    'cross_entropy, routed1_loss < dense': 1,
    'cross_entropy, routed1_bias < dense': 0,
    'dead_experts of routed1_none >= 1': 1,
    'max_violation, routed1_loss < 0.2 x routed1_none': 1,
    'max_violation, routed1_bias < 0.2 x routed1_none': 0,
  }


def test_attention_on_invented_runs():
  values = lambda recall, far: {
    4e-3: {'cross_entropy': 1.0, 'recall': recall, 'recall_far': far, 'recall_far_answers': 1600}
  }
  runs = {
    'dense': values(0.99, 0.98),
    'window': values(0.5, 1 / 16 + 0.018),
    'window_dense': values(0.97, 0.96),
    'dilated': values(0.7, 0.3),
    'random': values(0.5, 0.09),
    'linear': values(0.3, 0.2),
    'gla': values(0.6, 0.5),
    'gated_delta': values(0.8, 0.7),
    'hybrid': values(0.9, 0.9),
  }
  assert _counts(study_attention, runs) == {
    'recall_far, window < 0.5 x dense': 1,
    'recall_far of window within three errors of 1 / 16': 1,
    'recall_far of window_dense >= 0.95 x that of dense': 1,
    'recall_far of hybrid >= 0.95 x that of dense': 0,
    'recall_far, window < 0.8 x dilated': 1,
    'recall_far, window < 0.8 x random': 0,
    'recall, linear < gla < gated_delta < dense': 1,
  }
  runs['window'] = values(0.5, 1 / 16 + 0.019)
  assert _counts(study_attention, runs)['recall_far of window within three errors of 1 / 16'] == 0


def test_linearised_on_invented_runs():
  values = lambda near, far: {
    4e-3: {
      'cross_entropy': 1.0,
      'recall_near': near,
      'recall_far': far,
      'recall_far_answers': 1600,
    }
  }
  runs = {'windowed': values(0.95, 0.07), 'linear': values(0.5, 0.08), 'decaying': values(0.9, 0.5)}
  runs['dense'] = values(1.0, 0.25)
  assert _counts(study_linearised, runs) == {
    'recall_near of windowed >= 0.9': 1,
    'recall_far, windowed < 0.33 x dense': 1,
    'recall_far, windowed < 0.8 x linear': 0,
    'recall_far, windowed < 0.8 x decaying': 1,
  }


@pytest.mark.slow
def test_a_dense_model_becomes_each_retrofit(smoke):
  rows = smoke(study_linearised)
  assert set(rows) == set(study_linearised.ARMS)
  kept = {name: row.value('cached') for name, row in rows.items()}
  assert kept['dense'] == 2 * 64 * 2 * 64
  # 17 tokens of two bytes each are a state of four: 2 layers, 4 heads.
  assert kept['linear'] == kept['decaying'] == 2 * 4 * 16 * 17
  assert kept['windowed'] >= 2 * 17 * 2 * 64


@pytest.mark.slow
def test_each_mixer_is_trained_and_asked(tmp_path):
  out = tmp_path / 'study.jsonl'
  arms.run(study_attention.STUDY, Options(smoke=True, output=str(out)))
  rows = {row.recipe: row for row in records.read(out)}
  assert set(rows) == set(study_attention.STUDY.smoke)
  kinds = [layer['kind'] for layer in rows['hybrid'].config['layers']]
  assert kinds == ['gated_delta', 'attention']
  assert rows['dilated'].config['layers'][1]['sparse'] == 'window12x4'
  kept = {name: row.value('cached') for name, row in rows.items()}
  assert kept['dense'] == 2 * 64 * 2 * 64 > kept['linformer_dynamic'] > kept['dilated'] / 2
  assert all(0 <= row.value('recall_far') <= 1 for row in rows.values())


@pytest.mark.slow
def test_a_token_costs_no_more_with_experts_than_without(smoke):
  rows = smoke(study_experts, 'dense', 'routed2_bias')
  dense, routed = rows['dense'], rows['routed2_bias']
  flops = [row.value('training_flops_per_token') for row in (routed, dense)]
  assert 0.99 * flops[1] < flops[0] <= flops[1]
  assert routed.value('parameters') > 1.5 * routed.value('active_parameters')
  assert dense.value('train_tokens') == routed.value('train_tokens')
  assert 0 <= routed.value('max_violation') <= study_experts.EXPERTS / 2 - 1


@pytest.mark.slow
def test_each_distilled_student_has_a_record(smoke, capsys):
  rows = smoke(study_distillation)
  assert set(rows) == {'kd', 'kd_sampled'}
  for row in rows.values():
    assert 0 <= row.value('calibration_error') <= 1
    assert row.value('forward_kl') > 0 and row.value('own_reverse_kl') > 0
    assert 3 < row.value('cross_entropy') < 7  # of 512 tokens, a few updates away from chance
  # Two bytes for each of 50 ids, 8 for two sums, a digest a row.
  assert 108 < rows['kd_sampled'].value('bytes_per_token') < 110
  printed = capsys.readouterr().out
  assert 'D5, within 0.5 %: cross_entropy, kd_sampled < 1.005 x kd: held' in printed
  assert 'D6' not in printed  # its arms were not asked for


@pytest.mark.slow
def test_an_arm_that_goes_on_trains_the_one_before_it_and_writes(smoke):
  rows = smoke(study_distillation, 'more_on_policy', 'teacher')
  assert set(rows) == {'layers_all', 'more_on_policy', 'teacher'}
  assert rows['more_on_policy'].config['written'] == 1.0
  own = [rows[name].value('own_forward_kl') for name in ('teacher', 'more_on_policy', 'layers_all')]
  assert pytest.approx(own[0], abs=1e-5) == 0 and own == sorted(own)
