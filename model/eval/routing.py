"""How many tokens a changed model sends to other experts than its base does.

A compressed model chooses other experts although its routers are exact, because they read what the
layers before them put out. The share of tokens whose set of experts changed is the mean over all
routed layers and all tokens of the text; the order of the experts and their weights do not count.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
import scipy.optimize
from flax import nnx

from model import stacked
from model.eval import perplexity
from model.eval.perplexity import Windows
from model.layers.routed import Routed
from model.transformer import Context, Transformer

Chosen = Mapping[int, np.ndarray]  # the experts [tokens, choices] by the number of the layer
ALIKE = 0.5  # cosine of two columns of routers, above which they may be of one expert


def chosen(model: Transformer, text: Windows) -> Chosen:
  """The experts of every token of a text in every routed layer; nothing without experts."""
  if not _routed(model):
    return {}
  graphdef, state = nnx.split(model)
  with jax.default_matmul_precision('highest'):
    found = [jax.device_get(_chosen(graphdef, state, t)) for t in perplexity.batches(text)]
  return {l: np.concatenate([one[l] for one in found]) for l in found[0]}


@functools.partial(jax.jit, static_argnums=0)
def _chosen(graphdef, state, tokens_BT):
  model = nnx.merge(graphdef, state)
  context, x_BTD = Context.of(model.config, tokens_BT), model.embed(tokens_BT)
  found = stacked.hidden_and_read(model, x_BTD, context, _read)[1]
  return {l: experts_TX for l, experts_TX in enumerate(found) if experts_TX is not None}


def _read(block, z_BTD):
  if not isinstance(block.ffn, Routed):
    return None
  return block.ffn.route(z_BTD.reshape(-1, z_BTD.shape[-1])).experts_TX


def changed_share(
  model: Transformer, own: Chosen, base: Transformer, others: Chosen
) -> float | None:
  """The share of tokens whose set of experts is not that of the base, from what both chose.

  In a model with fewer experts than its base, an expert is the one of the base whose column of the
  router is most like its own; a token that went to one that was removed has changed. None where
  there are no experts, or the two models cannot be compared: layers, choices or routers differ.
  """
  if not own or own.keys() != others.keys():
    return None
  shares = []
  for l, experts_TX in own.items():
    places_E = _places(model.layers[l].ffn, base.layers[l].ffn)
    if places_E is None or experts_TX.shape != others[l].shape:
      return None
    same_TX = np.sort(places_E[experts_TX], axis=1) == np.sort(others[l], axis=1)
    shares.append(1 - same_TX.all(1).mean())
  return float(np.mean(shares))


def _places(own: Routed, base: Routed) -> np.ndarray | None:
  """The number in the base of each expert; None if that is not known."""
  a_DE, b_DE = (np.asarray(ffn.router.weight.get_value(), np.float64) for ffn in (own, base))
  if a_DE.shape[1] == b_DE.shape[1]:
    return np.arange(a_DE.shape[1])
  if a_DE.shape[0] != b_DE.shape[0] or a_DE.shape[1] > b_DE.shape[1]:
    return None
  unit = lambda w_DE: w_DE / np.maximum(np.linalg.norm(w_DE, axis=0), 1e-30)[None]
  alike_EE = unit(a_DE).T @ unit(b_DE)
  rows, places_E = scipy.optimize.linear_sum_assignment(alike_EE, maximize=True)
  return places_E if (alike_EE[rows, places_E] > ALIKE).all() else None


def _routed(model: Transformer) -> bool:
  return any(isinstance(block.ffn, Routed) for block in model.layers)
