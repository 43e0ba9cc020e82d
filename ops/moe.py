"""Mixture of experts: which experts a token goes to, and how its rows get there and back.

A `Router` is a few switches, which cover the published families:

                     score              groups    renormalize  scale
  Switch, top-1      softmax            1         no           1
  Mixtral, Qwen3     softmax            1         yes          1
  Qwen2, OLMoE       softmax            1         no           1
  Granite, gpt-oss   softmax_of_chosen  1         -            1
  DeepSeek-V2        softmax            n, max    no           s
  DeepSeek-V3        sigmoid            n, top 2  yes          s

After Shazeer et al. (2017), https://arxiv.org/abs/1701.06538; Fedus et al. (2021), Switch,
https://arxiv.org/abs/2101.03961; DeepSeek-AI (2024), https://arxiv.org/abs/2412.19437. Scores are
float32 whatever the logits are, because bfloat16 changes the chosen experts of some tokens. Of
experts with equal scores the first is chosen. A token's experts depend on no other token.

No token is dropped: the rows are sorted by expert, and `ops.linear.grouped_matmul` multiplies each
group. Sorting and gathering cost no multiplications. `mix_in_buffers` instead gives each expert a
buffer of limited size and drops the choices that do not fit; `within_capacity` says which ones fit.

`choose_tokens` and `mix_chosen` are expert choice (Zhou et al., 2022,
https://arxiv.org/abs/2202.09368): each expert takes the tokens that score highest with it, so all
have the same load. Whether a token is taken depends on later tokens, so language models cannot use
expert choice.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ops import axes

Score = Literal['softmax', 'sigmoid', 'softmax_of_chosen']
GroupScore = Literal['max', 'sum_of_two']
DropOrder = Literal['token', 'choice']
Chooser = Literal['token', 'expert']
TINY = 1e-20  # keeps a sum of scores that are all rounded to zero from dividing by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
  """How experts are chosen by their logits, and what their outputs are multiplied by.

  choices: experts per token; their mean, where experts choose.
  chooser: whether tokens choose experts or experts choose tokens, which no decoder may do.
  score: of the logits; 'softmax_of_chosen' takes the softmax over the chosen experts alone.
  groups, group_limit: experts are in equal groups of consecutive ones, and only the `group_limit`
    best groups of a token are open to it (None: all).
  group_score: a group is as good as its best expert, or as its two best together.
  renormalize: the weights of the chosen experts are divided by their sum. With one choice they
    would be 1, and the router would get no gradient.
  scale: multiplies the final weights.
  """

  choices: int
  chooser: Chooser = 'token'
  score: Score = 'softmax'
  groups: int = 1
  group_limit: int | None = None
  group_score: GroupScore = 'max'
  renormalize: bool = False
  scale: float = 1.0

  def __post_init__(self):
    if self.chooser not in get_args(Chooser):
      raise ValueError(f'chooser {self.chooser!r} is not one of {", ".join(get_args(Chooser))}')
    if self.score not in get_args(Score):
      raise ValueError(f'score {self.score!r} is not one of {", ".join(get_args(Score))}')
    if self.group_score not in get_args(GroupScore):
      options = ', '.join(get_args(GroupScore))
      raise ValueError(f'group_score {self.group_score!r} is not one of {options}')
    if self.choices < 1 or self.groups < 1:
      raise ValueError(f'choices {self.choices} and groups {self.groups} must be at least 1')
    if not 1 <= self.open_groups <= self.groups:
      raise ValueError(f'group_limit {self.group_limit} must be 1 to {self.groups}, the groups')
    if self.renormalize and self.score == 'softmax_of_chosen':
      raise ValueError('a softmax over the chosen experts adds up to 1; leave renormalize off')

  @property
  def open_groups(self) -> int:
    return self.groups if self.group_limit is None else self.group_limit

  def check(self, count: int) -> None:
    """Raises ValueError unless `count` experts can be chosen from in this way."""
    if count % self.groups:
      raise ValueError(f'{count} experts do not divide into {self.groups} equal groups')
    size = count // self.groups
    if self.choices > self.open_groups * size:
      raise ValueError(
        f'a token cannot choose {self.choices} experts of {self.open_groups * size}; '
        'lower the choices or raise the experts'
      )
    if self.group_score == 'sum_of_two' and self.open_groups < self.groups and size < 2:
      raise ValueError('groups are compared by two experts each, but have one')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """The experts of each token, best first, int32, and the weights of their outputs, float32."""

  experts_TX: jax.Array
  weights_TX: jax.Array


def route(logits_TE: jax.Array, router: Router, bias_E: jax.Array | None = None) -> Routing:
  """Chooses the experts of each token.

  `bias_E` is added to the scores for the choice alone; the weights do not contain it, so it gets no
  gradient. Raises ValueError if the router cannot choose among that number of experts, or if it has
  experts choose tokens.
  """
  _check_chooser(router, 'token')
  sizes = axes.check('TE,E', logits_TE, bias_E)
  router.check(sizes['E'])
  scores_TE = _scores(logits_TE.astype(jnp.float32), router.score)
  choice_TE = jax.lax.stop_gradient(scores_TE)
  if bias_E is not None:
    choice_TE = choice_TE + jax.lax.stop_gradient(bias_E.astype(jnp.float32))[None]
  _, experts_TX = jax.lax.top_k(_open(choice_TE, router), router.choices)
  weights_TX = jnp.take_along_axis(scores_TE, experts_TX, axis=-1)
  if router.score == 'softmax_of_chosen':
    weights_TX = jax.nn.softmax(weights_TX, axis=-1)
  if router.renormalize:
    weights_TX = weights_TX / (jnp.sum(weights_TX, axis=-1, keepdims=True) + TINY)
  return Routing(experts_TX=experts_TX, weights_TX=router.scale * weights_TX)


def _check_chooser(router: Router, chooser: Chooser) -> None:
  if router.chooser != chooser:
    function = {'token': 'route', 'expert': 'choose_tokens'}[router.chooser]
    raise ValueError(f'chooser is {router.chooser!r}; call ops.moe.{function}')


def _scores(logits_TE, score: Score):
  match score:
    case 'softmax':
      return jax.nn.softmax(logits_TE, axis=-1)
    case 'sigmoid':
      return jax.nn.sigmoid(logits_TE)
    case 'softmax_of_chosen':
      return logits_TE


def _open(choice_TE, router: Router):
  """Closes the experts of all but the best groups, by a score below every other."""
  if router.open_groups == router.groups:
    return choice_TE
  tokens, count = choice_TE.shape
  grouped = choice_TE.reshape(tokens, router.groups, -1)
  two = router.group_score == 'sum_of_two'
  best = jax.lax.top_k(grouped, 2)[0].sum(-1) if two else grouped.max(-1)
  _, chosen = jax.lax.top_k(best, router.open_groups)
  is_open = (chosen[:, :, None] == jnp.arange(router.groups)[None, None]).any(1)
  open_TE = jnp.repeat(is_open, count // router.groups, axis=1)
  return jnp.where(open_TE, choice_TE, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch:
  """The rows of the tokens in order of their experts; rows of one expert keep the tokens' order.

  pair_M: the choice that each row is, numbered token by token.  row_M: the row of each choice, so
  the inverse permutation.  sizes_E: how many rows each expert has.
  """

  pair_M: jax.Array
  row_M: jax.Array
  sizes_E: jax.Array


def dispatch(experts_TX: jax.Array, count: int) -> Dispatch:
  """Sorts the choices of all tokens by expert; there are `count` experts."""
  axes.check('TX', experts_TX)
  expert_M = experts_TX.reshape(-1)
  pair_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
  place_M = jnp.arange(len(pair_M), dtype=jnp.int32)
  row_M = jnp.zeros_like(pair_M).at[pair_M].set(place_M, unique_indices=True)
  sizes_E = jnp.bincount(expert_M, length=count).astype(jnp.int32)
  return Dispatch(pair_M=pair_M, row_M=row_M, sizes_E=sizes_E)


def to_experts(x_TD: jax.Array, plan: Dispatch) -> jax.Array:
  """The rows that experts multiply, [M, D]: each token once per choice, in order of experts."""
  tokens, width = x_TD.shape
  x_TXD = jnp.broadcast_to(x_TD[:, None], (tokens, len(plan.pair_M) // tokens, width))
  return _permuted(x_TXD.reshape(-1, width), plan.pair_M, plan.row_M)


def from_experts(y_MD: jax.Array, plan: Dispatch, weights_TX: jax.Array) -> jax.Array:
  """Adds up the outputs of each token's experts by their weights: [T, D] in the dtype of y.

  The sum is float32, and its order does not depend on the device.
  """
  return _weighted(_permuted(y_MD, plan.row_M, plan.pair_M), weights_TX)


def _weighted(y_MD, weights_TX):
  """Adds up the rows of each token, which follow one another."""
  y_TXD = y_MD.reshape(*weights_TX.shape, -1).astype(jnp.float32)
  return jnp.einsum('TX,TXD->TD', weights_TX, y_TXD).astype(y_MD.dtype)


def mix(
  x_TD: jax.Array,
  routing: Routing,
  count: int,
  network: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Runs `network(x_MD, sizes_E) -> y_MD` on the rows of all experts: [T, D].

  No token is dropped, and experts without tokens cost nothing but their place.
  """
  plan = dispatch(routing.experts_TX, count)
  y_MD = network(to_experts(x_TD, plan), plan.sizes_E)
  return from_experts(y_MD, plan, routing.weights_TX)


@jax.custom_vjp
def _permuted(x, order, inverse):
  """x[order]. Its gradient gathers by the inverse, where JAX would scatter, which is slower."""
  del inverse
  return x[order]


_permuted.defvjp(
  lambda x, order, inverse: (x[order], inverse),
  lambda inverse, dy: (dy[inverse], None, None),
)


def within_capacity(
  experts_TX: jax.Array, count: int, capacity: int, order: DropOrder = 'token'
) -> jax.Array:
  """Which choices fit if an expert takes at most `capacity` rows: bool [T, X].

  'token': earlier tokens first, with all their choices. That is causal, but late tokens lose even
  their first choices. 'choice': the first choices of all tokens, then their second ones (Switch,
  GShard); with two or more choices a token's experts then depend on later tokens, which a language
  model must not. A dropped choice has no output: set its weight to zero.
  """
  return _slots(experts_TX, count, capacity, order) < count * capacity


def capacity(tokens: int, choices: int, count: int, factor: float | None) -> int:
  """How many rows each of `count` experts takes: `factor` times an even share, rounded up.

  No more than all tokens, which is the capacity without a factor: then nothing is dropped.
  """
  return tokens if factor is None else min(tokens, math.ceil(factor * tokens * choices / count))


def mix_in_buffers(
  x_TD: jax.Array,
  routing: Routing,
  shape: tuple[int, int],
  network: Callable[[jax.Array], jax.Array],
  order: DropOrder = 'token',
) -> jax.Array:
  """Runs `network(x_ECD) -> y_ECD` on buffers of the shape (E, C), one for each expert: [T, D].

  Only the choices of `within_capacity` have an output. Empty rows of a buffer are zero, and their
  outputs are ignored.
  """
  count, size = shape
  slot_M = _slots(routing.experts_TX, count, size, order).reshape(-1)
  pairs = len(slot_M)
  pair_of_slot = jnp.full(count * size, pairs, jnp.int32)
  pair_of_slot = pair_of_slot.at[slot_M].set(jnp.arange(pairs, dtype=jnp.int32), mode='drop')
  x_TXD = jnp.broadcast_to(x_TD[:, None], (*routing.experts_TX.shape, x_TD.shape[-1]))
  x_ECD = _placed(x_TXD.reshape(pairs, -1), pair_of_slot, slot_M).reshape(count, size, -1)
  y_ECD = network(x_ECD)
  y_MD = _placed(y_ECD.reshape(count * size, -1), slot_M, pair_of_slot)
  return _weighted(y_MD, routing.weights_TX)


def _slots(experts_TX, count, size, order: DropOrder):
  """The place of each choice in buffers of `size` rows per expert; past them if it is dropped."""
  if order not in get_args(DropOrder):
    raise ValueError(f'drop order {order!r} is not one of {", ".join(get_args(DropOrder))}')
  ids = experts_TX if order == 'token' else experts_TX.T
  plan, ids_M = dispatch(ids, count), ids.reshape(-1)
  starts_E = jnp.cumsum(plan.sizes_E) - plan.sizes_E
  place_M = plan.row_M - starts_E[ids_M]
  slots = jnp.where(place_M < size, ids_M * size + place_M, count * size).reshape(ids.shape)
  return slots if order == 'token' else slots.T


@jax.custom_vjp
def _placed(x, order, inverse):
  """x[order], zero where the index is past the end; `inverse` says where each row of x went."""
  del inverse
  return x.at[order].get(mode='fill', fill_value=0)


_placed.defvjp(
  lambda x, order, inverse: (_placed(x, order, inverse), inverse),
  lambda inverse, dy: (dy.at[inverse].get(mode='fill', fill_value=0), None, None),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenChoice:
  """The tokens that each expert chose, best first, int32, and the weights of its outputs."""

  tokens_EC: jax.Array
  weights_EC: jax.Array


def choose_tokens(logits_TE: jax.Array, router: Router) -> TokenChoice:
  """Has each expert choose as many tokens as an even share is, rounded up.

  Raises ValueError if the router has tokens choose, or if it has groups or weights that depend on
  the other experts of a token, which experts that choose cannot have.
  """
  _check_chooser(router, 'expert')
  if router.groups > 1 or router.renormalize or router.score == 'softmax_of_chosen':
    raise ValueError(
      "chooser 'expert' has no groups and weighs a token by its own score; set groups=1, "
      "renormalize=False and score 'softmax' or 'sigmoid'"
    )
  sizes = axes.check('TE', logits_TE)
  scores_TE = _scores(logits_TE.astype(jnp.float32), router.score)
  rows = capacity(sizes['T'], router.choices, sizes['E'], 1.0)
  weights_EC, tokens_EC = jax.lax.top_k(scores_TE.T, rows)
  return TokenChoice(tokens_EC=tokens_EC, weights_EC=router.scale * weights_EC)


def mix_chosen(
  x_TD: jax.Array, chosen: TokenChoice, network: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
  """Runs `network(x_MD, sizes_E) -> y_MD` on the tokens that experts chose: [T, D].

  A token that no expert chose gets zero.
  """
  count, size = chosen.tokens_EC.shape
  tokens_M = chosen.tokens_EC.reshape(-1)
  y_MD = network(x_TD[tokens_M], jnp.full(count, size, jnp.int32))
  y_MD = chosen.weights_EC.reshape(-1, 1) * y_MD.astype(jnp.float32)
  return jnp.zeros(x_TD.shape, jnp.float32).at[tokens_M].add(y_MD).astype(x_TD.dtype)
