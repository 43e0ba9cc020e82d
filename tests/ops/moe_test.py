"""Routing against transformers' routers and a loop in numpy, dispatch against all experts dense."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
  SwitchTransformersTop1Router,
)

from ops import moe
from ops.linear import grouped_matmul
from ops.moe import Router

TOKENS, EXPERTS, WIDTH, INNER = 40, 12, 6, 5
SAME_FLOAT32 = 1e-6  # weights of at most `scale`, from exponentials in another order
SUMS = 1e-5  # sums of some products of order 1, in another order

DEEPSEEK = {
  'hidden_size': EXPERTS,
  'num_attention_heads': 1,
  'n_routed_experts': EXPERTS,
  'num_experts_per_tok': 3,
}
QWEN = {'hidden_size': EXPERTS, 'num_experts': EXPERTS, 'num_experts_per_tok': 3}
LOCAL = {'hidden_size': EXPERTS, 'num_local_experts': EXPERTS, 'num_experts_per_tok': 3}
# Name -> our router, and theirs. Their weights are set to the identity, so logits go in.
FAMILIES = {
  'mixtral': (
    Router(choices=3, renormalize=True),
    lambda: MixtralTopKRouter(transformers.MixtralConfig(**LOCAL)),
  ),
  'qwen2_moe': (
    Router(choices=3),
    lambda: Qwen2MoeTopKRouter(transformers.Qwen2MoeConfig(**QWEN, norm_topk_prob=False)),
  ),
  'qwen3_moe': (
    Router(choices=3, renormalize=True),
    lambda: Qwen3MoeTopKRouter(transformers.Qwen3MoeConfig(**QWEN, norm_topk_prob=True)),
  ),
  'olmoe': (
    Router(choices=3),
    lambda: OlmoeTopKRouter(transformers.OlmoeConfig(**QWEN, norm_topk_prob=False)),
  ),
  'granite': (
    Router(choices=3, score='softmax_of_chosen'),
    lambda: GraniteMoeTopKRouter(transformers.GraniteMoeConfig(**LOCAL)),
  ),
  'gpt_oss': (
    Router(choices=3, score='softmax_of_chosen'),
    lambda: GptOssTopKRouter(transformers.GptOssConfig(**LOCAL)),
  ),
  'deepseek_v2': (
    Router(choices=3, scale=1.7),
    lambda: DeepseekV2TopkRouter(
      transformers.DeepseekV2Config(**DEEPSEEK, topk_method='greedy', routed_scaling_factor=1.7)
    ),
  ),
  'deepseek_v2_groups': (
    Router(choices=3, groups=4, group_limit=2, scale=1.7),
    lambda: DeepseekV2TopkRouter(
      transformers.DeepseekV2Config(
        **DEEPSEEK,
        topk_method='group_limited_greedy',
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
      )
    ),
  ),
  'deepseek_v3': (
    Router(
      choices=3,
      score='sigmoid',
      groups=4,
      group_limit=2,
      group_score='sum_of_two',
      renormalize=True,
      scale=2.5,
    ),
    lambda: DeepseekV3TopkRouter(
      transformers.DeepseekV3Config(
        **DEEPSEEK, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5
      )
    ),
  ),
}


def _route(logits_TE, router, bias_E=None):
  return jax.jit(lambda x, b: moe.route(x, router, b))(logits_TE, bias_E)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_chooses_as_transformers_does(rng, name):
  router, theirs = FAMILIES[name]
  logits_TE = np.float32(2 * rng.standard_normal((TOKENS, EXPERTS)))
  module, bias_E = theirs(), None
  with torch.no_grad():
    module.weight.copy_(torch.eye(EXPERTS))
    if name == 'deepseek_v3':
      # Some biases are far below zero, where a closed group must still lose.
      bias_E = np.float32(rng.standard_normal(EXPERTS) - 1)
      module.e_score_correction_bias.copy_(torch.from_numpy(bias_E))
    if name == 'gpt_oss':
      module.bias.zero_()
    _, weights, chosen = module(torch.from_numpy(logits_TE))
  routing = _route(logits_TE, router, bias_E)
  order = np.argsort(np.asarray(chosen), axis=1), np.argsort(routing.experts_TX, axis=1)
  sort = lambda array, by: np.take_along_axis(np.asarray(array), by, axis=1)
  np.testing.assert_array_equal(sort(routing.experts_TX, order[1]), sort(chosen, order[0]))
  np.testing.assert_allclose(
    sort(routing.weights_TX, order[1]), sort(weights, order[0]), atol=SAME_FLOAT32 * router.scale
  )
  assert routing.experts_TX.dtype == jnp.int32 and routing.weights_TX.dtype == jnp.float32


def test_switch_keeps_the_probability_of_its_one_choice(rng):
  logits_TE = np.float32(rng.standard_normal((TOKENS, EXPERTS)))
  config = transformers.SwitchTransformersConfig(
    hidden_size=EXPERTS, num_experts=EXPERTS, expert_capacity=TOKENS, router_jitter_noise=0.0
  )
  module = SwitchTransformersTop1Router(config).eval()
  with torch.no_grad():
    module.classifier.weight.copy_(torch.eye(EXPERTS))
    found = [np.asarray(part) for part in module(torch.from_numpy(logits_TE)[None])]
  one_hot = next(part for part in found if part.dtype.kind == 'i').reshape(TOKENS, EXPERTS)
  weights = next(part for part in found if part.dtype.kind == 'f' and part.shape[-1] == 1)
  routing = _route(logits_TE, Router(choices=1))
  np.testing.assert_array_equal(routing.experts_TX[:, 0], one_hot.argmax(-1))
  np.testing.assert_allclose(routing.weights_TX[:, 0], weights.reshape(-1), atol=SAME_FLOAT32)


def _by_hand(logits_E, router, bias_E):
  """The definition in float64, for one token: its experts in order and their weights."""
  logits_E = np.float64(logits_E)
  softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
  score_E = {
    'softmax': softmax,
    'sigmoid': lambda x: 1 / (1 + np.exp(-x)),
    'softmax_of_chosen': lambda x: x,
  }[router.score](logits_E)
  choice_E = score_E + bias_E
  parts = np.split(np.arange(len(choice_E)), router.groups)
  two = {'max': 1, 'sum_of_two': 2}[router.group_score]
  goodness = [np.sort(choice_E[part])[-two:].sum() for part in parts]
  best = sorted(range(router.groups), key=lambda g: (-goodness[g], g))[: router.open_groups]
  allowed = [e for g in best for e in parts[g]]
  chosen = sorted(allowed, key=lambda e: (-choice_E[e], e))[: router.choices]
  weights = score_E[chosen]
  if router.score == 'softmax_of_chosen':
    weights = softmax(weights)
  if router.renormalize:
    weights = weights / weights.sum()
  return chosen, router.scale * weights


@pytest.mark.parametrize('score', ['softmax', 'sigmoid', 'softmax_of_chosen'])
@pytest.mark.parametrize('group_score', ['max', 'sum_of_two'])
@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.quick(group_score=('sum_of_two',))
def test_every_switch_is_its_definition(rng, score, group_score, renormalize):
  if renormalize and score == 'softmax_of_chosen':
    return
  for groups, limit, choices in ((1, None, 1), (1, None, 12), (3, 2, 4), (6, 1, 2), (4, 4, 5)):
    router = Router(
      choices=choices,
      score=score,
      groups=groups,
      group_limit=limit,
      group_score=group_score,
      renormalize=renormalize,
      scale=1.5,
    )
    logits_TE = np.float32(rng.standard_normal((7, EXPERTS)))
    bias_E = np.float32(0.3 * rng.standard_normal(EXPERTS))
    routing = moe.route(jnp.asarray(logits_TE), router, jnp.asarray(bias_E))
    for t in range(7):
      chosen, weights = _by_hand(logits_TE[t], router, bias_E)
      np.testing.assert_array_equal(routing.experts_TX[t], chosen)
      np.testing.assert_allclose(routing.weights_TX[t], weights, atol=2 * SAME_FLOAT32)


def test_of_equal_scores_the_first_expert_is_chosen():
  logits_TE = jnp.asarray([[0.0] * 6, [1, 2, 2, 2, 0, 2], [3, 3, 1, 1, 3, 3]])
  routing = _route(logits_TE, Router(choices=3))
  np.testing.assert_array_equal(routing.experts_TX, [[0, 1, 2], [1, 2, 3], [0, 1, 4]])


def test_scores_of_bfloat16_logits_are_those_of_float32():
  logits_TE = jnp.linspace(-2, 2, 24).reshape(2, 12).astype(jnp.bfloat16)
  router = Router(choices=3)
  expected = moe.route(logits_TE.astype(jnp.float32), router)
  np.testing.assert_array_equal(moe.route(logits_TE, router).weights_TX, expected.weights_TX)


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.quick(name=('mixtral', 'granite', 'deepseek_v3'))
def test_gradients_reach_the_logits_and_not_the_bias(rng, name):
  router = FAMILIES[name][0]
  logits_TE = np.float32(rng.standard_normal((4, EXPERTS)))
  bias_E = np.float32(0.1 * rng.standard_normal(EXPERTS))
  mix_TX = np.float32(rng.standard_normal((4, router.choices)))
  value = lambda x, b: jnp.sum(moe.route(x, router, b).weights_TX * mix_TX)
  slope_TE, slope_E = jax.grad(value, (0, 1))(jnp.asarray(logits_TE), jnp.asarray(bias_E))
  np.testing.assert_array_equal(slope_E, 0)
  by_hand = lambda x: sum(_by_hand(x[t], router, bias_E)[1] @ mix_TX[t] for t in range(4))
  step, x = 1e-6, np.float64(logits_TE)
  for t, e in np.ndindex(4, EXPERTS):
    moved = np.zeros_like(x)
    moved[t, e] = step
    expected = (by_hand(x + moved) - by_hand(x - moved)) / (2 * step)
    assert slope_TE[t, e] == pytest.approx(expected, abs=SUMS)


def _experts(rng, count=EXPERTS):
  up_EIO = np.float32(rng.standard_normal((count, WIDTH, INNER)))
  down_EIO = np.float32(rng.standard_normal((count, INNER, WIDTH)))
  return jnp.asarray(up_EIO), jnp.asarray(down_EIO)


def _sorted(x_TD, logits_TE, up_EIO, down_EIO, router):
  network = lambda x, sizes: grouped_matmul(
    jnp.tanh(grouped_matmul(x, up_EIO, sizes)), down_EIO, sizes
  )
  return moe.mix(x_TD, moe.route(logits_TE, router), len(up_EIO), network)


def _dense(x_TD, logits_TE, up_EIO, down_EIO, router):
  """All experts on all tokens; the weight of one that is not chosen is zero."""
  routing = moe.route(logits_TE, router)
  one_hot_TXE = jax.nn.one_hot(routing.experts_TX, len(up_EIO))
  weights_TE = jnp.einsum('TX,TXE->TE', routing.weights_TX, one_hot_TXE)
  inner = jnp.tanh(jnp.einsum('TD,EDF->TEF', x_TD, up_EIO))
  return jnp.einsum('TE,TEF,EFD->TD', weights_TE, inner, down_EIO)


@pytest.mark.parametrize('tokens, choices', [(1, 1), (1, 3), (9, 2), (TOKENS, 3), (5, EXPERTS)])
@pytest.mark.quick(choices=(3, EXPERTS))
def test_outputs_and_gradients_are_those_of_all_experts_dense(rng, tokens, choices):
  router = Router(choices=choices, renormalize=choices > 1)
  x_TD = jnp.asarray(rng.standard_normal((tokens, WIDTH)), jnp.float32)
  # Three experts have no tokens unless all are chosen.
  away_E = np.where(np.arange(EXPERTS) % 4 == 2, 30, 0)
  logits_TE = jnp.asarray(rng.standard_normal((tokens, EXPERTS)) - away_E, jnp.float32)
  arguments = (x_TD, logits_TE, *_experts(rng))
  mixed_TD = np.float32(rng.standard_normal((tokens, WIDTH)))
  total = lambda fn: lambda *a: jnp.sum(fn(*a, router) * mixed_TD)
  found = jax.jit(jax.value_and_grad(total(_sorted), (0, 1, 2, 3)))(*arguments)
  expected = jax.jit(jax.value_and_grad(total(_dense), (0, 1, 2, 3)))(*arguments)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=SUMS, atol=SUMS * 10)
  np.testing.assert_allclose(
    jax.jit(_sorted, static_argnums=4)(*arguments, router), _dense(*arguments, router), atol=SUMS
  )


def test_the_picture_of_a_dispatch():
  plan = moe.dispatch(jnp.asarray([[2, 0], [0, 3], [3, 2]]), 5)
  # Choices in order of experts 0, 0, 2, 2, 3, 3; each expert has its tokens in order.
  np.testing.assert_array_equal(plan.pair_M, [1, 2, 0, 5, 3, 4])
  np.testing.assert_array_equal(plan.row_M[plan.pair_M], np.arange(6))
  np.testing.assert_array_equal(plan.sizes_E, [2, 0, 2, 2, 0])
  x_TD = jnp.asarray([[10.0], [20.0], [30.0]])
  np.testing.assert_array_equal(moe.to_experts(x_TD, plan)[:, 0], [10, 20, 10, 30, 20, 30])


def test_outputs_are_summed_in_float32(rng):
  experts_TX = jnp.asarray(rng.permuted(np.tile(np.arange(8), (5, 1)), axis=1))
  plan = moe.dispatch(experts_TX, 8)
  y_MD = jnp.asarray(rng.standard_normal((40, 3)), jnp.bfloat16)
  weights_TX = jnp.asarray(rng.random((5, 8)), jnp.float32)
  found = moe.from_experts(y_MD, plan, weights_TX)
  y_TXD = np.float64(y_MD)[np.asarray(plan.row_M)].reshape(5, 8, 3)
  expected = np.einsum('TX,TXD->TD', np.float64(weights_TX), y_TXD)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, jnp.asarray(expected, jnp.bfloat16))


@pytest.mark.parametrize('order', ['token', 'choice'])
def test_the_choices_over_the_capacity_are_those_that_come_last(rng, order):
  experts_TX = np.argsort(rng.random((TOKENS, 5)), axis=1)[:, :2]
  pairs = [(t, x) for t in range(TOKENS) for x in range(2)]
  pairs.sort(key=lambda pair: pair if order == 'token' else pair[::-1])
  for capacity in (0, 1, 7, TOKENS):
    expected, taken = np.zeros((TOKENS, 2), bool), np.zeros(5, int)
    for t, x in pairs:
      expected[t, x] = taken[experts_TX[t, x]] < capacity
      taken[experts_TX[t, x]] += 1
    kept_TX = moe.within_capacity(jnp.asarray(experts_TX), 5, capacity, order)
    np.testing.assert_array_equal(kept_TX, expected)


@pytest.mark.parametrize('order', ['token', 'choice'])
def test_buffers_give_what_all_experts_dense_give_of_the_choices_with_room(rng, order):
  up_EIO, down_EIO = _experts(rng)
  x_TD = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), jnp.float32)
  logits_TE = jnp.asarray(rng.standard_normal((TOKENS, EXPERTS)), jnp.float32)
  router = Router(choices=3, renormalize=True)
  kept_TX = moe.within_capacity(moe.route(logits_TE, router).experts_TX, EXPERTS, 8, order)
  assert 0 < (~kept_TX).sum() < kept_TX.size / 2
  mixed_TD = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), jnp.float32)

  def buffered(x_TD, logits_TE, up_EIO, down_EIO):
    network = lambda x_ECD: jnp.einsum(
      'ECF,EFD->ECD', jnp.tanh(jnp.einsum('ECD,EDF->ECF', x_ECD, up_EIO)), down_EIO
    )
    routing = moe.route(logits_TE, router)
    y_TD = moe.mix_in_buffers(x_TD, routing, (EXPERTS, 8), network, order)
    return jnp.sum(y_TD * mixed_TD)

  def dense(x_TD, logits_TE, up_EIO, down_EIO):
    routing = moe.route(logits_TE, router)
    one_hot_TXE = jax.nn.one_hot(routing.experts_TX, EXPERTS)
    weights_TE = jnp.einsum('TX,TXE->TE', routing.weights_TX * kept_TX, one_hot_TXE)
    inner = jnp.tanh(jnp.einsum('TD,EDF->TEF', x_TD, up_EIO))
    return jnp.sum(jnp.einsum('TE,TEF,EFD->TD', weights_TE, inner, down_EIO) * mixed_TD)

  arguments = x_TD, logits_TE, up_EIO, down_EIO
  found, expected = (
    jax.jit(jax.value_and_grad(fn, (0, 1, 2, 3)))(*arguments) for fn in (buffered, dense)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=SUMS, atol=SUMS * 10)


def test_a_capacity_is_a_part_of_an_even_share_and_at_most_all_tokens():
  assert moe.capacity(40, 3, 12, 1.0) == 10 and moe.capacity(40, 3, 12, 1.01) == 11
  assert moe.capacity(40, 3, 12, None) == moe.capacity(40, 3, 12, 99.0) == 40


CHOOSER = Router(choices=2, chooser='expert', scale=1.5)


def test_experts_choose_the_tokens_that_score_highest_with_them(rng):
  up_EIO, down_EIO = _experts(rng)
  x_TD = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), jnp.float32)
  logits_TE = np.float32(rng.standard_normal((TOKENS, EXPERTS)))
  network = lambda x, sizes: grouped_matmul(
    jnp.tanh(grouped_matmul(x, up_EIO, sizes)), down_EIO, sizes
  )
  chosen = moe.choose_tokens(jnp.asarray(logits_TE), CHOOSER)
  p_TE = np.exp(np.float64(logits_TE))
  p_TE /= p_TE.sum(1, keepdims=True)
  rows, expected = -(-TOKENS * 2 // EXPERTS), np.zeros((TOKENS, WIDTH))
  assert chosen.tokens_EC.shape == (EXPERTS, rows)
  for e in range(EXPERTS):
    best = np.argsort(-p_TE[:, e])[:rows]
    np.testing.assert_array_equal(chosen.tokens_EC[e], best)
    inner = np.tanh(np.float64(x_TD)[best] @ np.float64(up_EIO[e]))
    expected[best] += 1.5 * p_TE[best, e, None] * (inner @ np.float64(down_EIO[e]))
  found = jax.jit(lambda x, c: moe.mix_chosen(x, c, network))(x_TD, chosen)
  np.testing.assert_allclose(found, expected, atol=10 * SUMS)


def test_choice_by_experts_depends_on_later_tokens(rng):
  logits_TE = rng.standard_normal((TOKENS, EXPERTS))
  other_TE = logits_TE.copy()
  other_TE[TOKENS // 2 :] = rng.standard_normal((TOKENS // 2, EXPERTS))
  early = [
    {(e, t) for (e, _), t in np.ndenumerate(chosen.tokens_EC) if t < TOKENS // 2}
    for chosen in (moe.choose_tokens(jnp.asarray(x), CHOOSER) for x in (logits_TE, other_TE))
  ]
  assert early[0] != early[1]


def test_the_two_choosers_have_functions_of_their_own():
  logits_TE = jnp.zeros((4, 8))
  with pytest.raises(ValueError, match=r'call ops\.moe\.choose_tokens'):
    moe.route(logits_TE, CHOOSER)
  with pytest.raises(ValueError, match=r'call ops\.moe\.route'):
    moe.choose_tokens(logits_TE, Router(choices=2))
  with pytest.raises(ValueError, match="chooser 'expert' has no groups"):
    moe.choose_tokens(logits_TE, dataclasses.replace(CHOOSER, renormalize=True))


def test_only_the_order_by_tokens_is_causal(rng):
  leaks = {'token': 0, 'choice': 0}
  for _ in range(20):
    experts_TX = np.argsort(rng.random((32, 8)), axis=1)[:, :2]
    other = experts_TX.copy()
    other[16:] = np.argsort(rng.random((16, 8)), axis=1)[:, :2]
    for order in leaks:
      a, b = (moe.within_capacity(jnp.asarray(e), 8, 8, order)[:16] for e in (experts_TX, other))
      leaks[order] += not np.array_equal(a, b)
  assert leaks['token'] == 0 and leaks['choice'] > 10


@pytest.mark.parametrize(
  'fields, why',
  [
    ({'score': 'tanh'}, "score 'tanh' is not one of softmax"),
    ({'chooser': 'both'}, "chooser 'both' is not one of token, expert"),
    ({'group_score': 'mean'}, "group_score 'mean' is not one of max"),
    ({'choices': 0}, 'choices 0 and groups 1 must be at least 1'),
    ({'groups': 2, 'group_limit': 3}, 'group_limit 3 must be 1 to 2'),
    ({'score': 'softmax_of_chosen', 'renormalize': True}, 'leave renormalize off'),
  ],
)
def test_a_router_that_makes_no_sense_is_refused(fields, why):
  with pytest.raises(ValueError, match=why):
    Router(**{'choices': 2, **fields})


@pytest.mark.parametrize(
  'fields, why',
  [
    ({'choices': 9}, 'cannot choose 9 experts of 8'),
    ({'groups': 3}, '8 experts do not divide into 3'),
    ({'groups': 4, 'group_limit': 1, 'choices': 3}, 'cannot choose 3 experts of 2'),
    ({'groups': 8, 'group_limit': 4, 'group_score': 'sum_of_two'}, 'by two experts each'),
  ],
)
def test_experts_that_a_router_cannot_choose_are_refused(fields, why):
  router = dataclasses.replace(Router(choices=2), **fields)
  with pytest.raises(ValueError, match=why):
    moe.route(jnp.zeros((2, 8)), router)
