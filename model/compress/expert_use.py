"""Measures what each expert of a routed layer does on calibration text.

All numbers are sums over tokens, so that scores, merging and densifying divide them as they need.
The norm of an expert's output is measured on the tokens that it was chosen for alone. Outputs of
all experts on all tokens, which only a comparison of experts needs, cost as many products as if
every token chose every expert.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from model.compress import calibrate
from model.compress.programs import compiled
from model.layers.block import Block
from model.layers.routed import Routed
from model.transformer import Context
from ops import moe


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('rows_E', 'weights_E', 'norms_E', 'shares_E', 'logits_EE', 'outputs_EE', 'opened'),
  meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertUse:
  """Sums over the tokens of one layer.

  rows_E: 1 for each token that chose the expert.  weights_E: the weights of its outputs.
  norms_E: the L2 norms of its outputs.  shares_E: these norms times the expert's share of the
    weights of the token's chosen experts.
  logits_EE: products of the router's logits of two experts, each minus the token's mean logit.
  outputs_EE: scalar products of the outputs of two experts; None if they were not compared.
  opened: the gate of the shared experts; 1 for each token without a gate.
  """

  rows_E: np.ndarray
  weights_E: np.ndarray
  norms_E: np.ndarray
  shares_E: np.ndarray
  logits_EE: np.ndarray
  outputs_EE: np.ndarray | None
  opened: np.ndarray


def measure(stream: calibrate.Stream, block: Block, outputs: bool = False) -> ExpertUse | None:
  """Measures the block that a stream stands before: sums in float64, or None without experts.

  Raises ValueError if an expert's output is not finite.
  """
  if not isinstance(block.ffn, Routed):
    return None
  function, values = calibrate.split(stream.config, block)
  found = [_of_batch(function, outputs, values, *batch) for batch in stream.batches]
  total = jax.tree.map(lambda *sums: np.sum(np.float64(sums), axis=0), *found)
  if not np.isfinite(total.norms_E).all():
    raise ValueError('the outputs of experts are not finite; check the weights')
  return total


@functools.partial(compiled, static_argnums=(0, 1))
def _of_batch(function: calibrate.BlockFunction, outputs: bool, values, tokens_BT, x_BTD):
  block = function.merge(values)
  z_BTD = Context.of(function.config, tokens_BT).run_and_read(block, x_BTD)[2]
  return of_tokens(block.ffn, z_BTD.reshape(-1, z_BTD.shape[-1]), outputs)


def of_tokens(ffn: Routed, x_TD: jax.Array, outputs: bool = False) -> ExpertUse:
  """Measures a routed network on what it reads, in float32."""
  count, routing = ffn.config.experts, ffn.route(x_TD)
  plan = moe.dispatch(routing.experts_TX, count)
  y_MD = ffn.experts(moe.to_experts(x_TD, plan), plan.sizes_E).astype(jnp.float32)
  norms_TX = jnp.linalg.norm(y_MD, axis=-1)[plan.row_M].reshape(routing.weights_TX.shape)
  of_token_T1 = routing.weights_TX.sum(-1, keepdims=True) + moe.TINY
  add = lambda values_TX: jnp.zeros(count).at[routing.experts_TX].add(values_TX)
  logits_TE = ffn.scores(x_TD)
  logits_TE = logits_TE - logits_TE.mean(-1, keepdims=True)
  return ExpertUse(
    rows_E=plan.sizes_E.astype(jnp.float32),
    weights_E=add(routing.weights_TX),
    norms_E=add(norms_TX),
    shares_E=add(norms_TX * routing.weights_TX / of_token_T1),
    logits_EE=logits_TE.T @ logits_TE,
    outputs_EE=_compared(ffn, x_TD) if outputs else None,
    opened=ffn.opened(x_TD).sum(),
  )


def _compared(ffn: Routed, x_TD) -> jax.Array:
  """The scalar products of the outputs of all experts, summed over all tokens."""
  count, tokens = ffn.config.experts, len(x_TD)
  sizes_E = jnp.full(count, tokens, jnp.int32)
  y_MD = ffn.experts(jnp.tile(x_TD, (count, 1)), sizes_E).astype(jnp.float32)
  y_E_ = y_MD.reshape(count, -1)
  return y_E_ @ y_E_.T
