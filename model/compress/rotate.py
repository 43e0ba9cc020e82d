"""Rotates the residual stream, the values and the inner activations of the feed-forward layers.

Ashkboos et al. (2024), QuaRot, https://arxiv.org/abs/2404.00456. An RMS norm without a scale
commutes with every rotation. Once the scale is merged into the matrices after the norm, the
residual stream can be rotated by rotating the embedding, all matrices that read the stream and all
matrices that write it, without changing the logits. The values of each head are rotated in the
value projection and back in the output projection. Other inputs must be rotated while the model
runs (`online`): that of the down projection, which comes after a nonlinearity, the heads before the
output projection, and latents, which have a norm of their own.

Experts are matrices like others; the router reads the rotated stream, and chooses as before.

Weights are rotated in float64 and rounded once. The authors' code also subtracts the mean of the
embedding; this is not done here, because it is meant for layer norms and would change a model with
RMS norms.

Where a norm or a gate comes after the heads (recurrent mixers, Qwen3-Next), a rotation of a head
does not commute with it, and all inputs of the output projection are rotated while the model runs.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from model.compress.registry import technique
from model.layers.basic import Linear
from model.layers.wiring import Attended, Normed
from model.transformer import linears, matrices
from ops import rotated
from ops.linear import Weight
from ops.sparse import looks_pruned


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotateSpec:
  """`online` adds the rotations that are computed while the model runs; `seed` draws the signs."""

  online: bool = True
  seed: int = 0


def check(config, spec) -> None:
  """Raises ValueError if rotating a model of this config would change its outputs."""
  del spec
  if config.norm != 'rms':
    raise ValueError('a layer norm does not commute with rotations; only RMS norms do')
  if any(layer.post_norms for layer in config.layers):
    raise ValueError('the scales of norms after attention and feed-forward cannot be merged')
  if not all(layer.pre_norms for layer in config.layers):
    raise ValueError('only layers with a norm before attention and feed-forward can be rotated')


@technique(
  'rotate',
  spec=RotateSpec,
  paper='Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456',
  scope='model',
  check=check,
)
def rotate(model, spec):
  """Rotate the activations, which spreads outliers over all channels; the outputs do not change."""
  _check_plain(model)
  signs_D = np.random.default_rng(spec.seed).choice([-1.0, 1.0], model.config.width)
  untied = _untie(model)
  _edit(model.embedding.table, lambda table_VD: _turn(table_VD, signs_D))
  for block in model.layers:
    _rotate_block(block, signs_D, spec.online)
  _read(model.final_norm, [model.head], signs_D)
  return {'tied head given a matrix of its own': int(untied)}


def _check_plain(model):
  table = {'embedding': model.embedding.table.get_value()}
  for path, w in {**table, **matrices(model)}.items():
    if isinstance(w, Weight):
      raise ValueError(f'{path} is compressed already; rotation comes before everything else')
    if path not in table and looks_pruned(w):  # rows of a table may be zero: tokens never trained
      raise ValueError(
        f'{path} is pruned, and a rotation would fill its zeros; rotate the model as it was before '
        'it was pruned, then prune'
      )


def _untie(model) -> bool:
  if model.head is not None:
    return False
  table_VD = model.embedding.table.get_value()
  shape, dtype = table_VD.shape[::-1], table_VD.dtype
  head = nnx.eval_shape(
    lambda: Linear(shape, axes=('D', 'V'), bias=False, rngs=nnx.Rngs(0), dtype=dtype)
  )
  model.head = nnx.data(head)
  model.head.weight.set_value(table_VD.T)
  model.config = model.config.replace(tied=False)
  return True


def _rotate_block(block, signs_D, online):
  wiring, layers = block.layer.wiring, linears(block)
  writers = [write.layer for write in wiring.writes]
  for edge in wiring.edges:
    consumers = [layers[name] for name in edge.consumers]
    if isinstance(edge.through, Normed):
      _read(getattr(block, edge.producer), consumers, signs_D)
    if _turns(edge.through):
      _rotate_heads(layers[edge.producer], consumers, edge.through.head_width)
    for name, linear in zip(edge.consumers, consumers):
      if name in writers:
        _write(linear, signs_D)
  # Afterwards, because a matrix that reads a latent may also have outputs that are rotated.
  for edge in wiring.edges if online else ():
    if not isinstance(edge.through, Normed):
      _rotate_inputs([layers[name] for name in edge.consumers], edge.through)


def _turns(through) -> bool:
  """Whether a rotation of each head can be moved from the producer to the consumers."""
  return isinstance(through, Attended) and not through.gated


def _rotate_heads(value, consumers, head_width):
  """Rotates each head of the values, and back where they are read."""
  _edit(value.weight, lambda w_IO: rotated.rotate(w_IO, head_width))
  if value.bias is not None:
    _edit(value.bias, lambda bias_O: rotated.rotate(bias_O, head_width))
  for linear in consumers:
    _edit(linear.weight, lambda w_IO: rotated.rotate(w_IO.T, head_width).T)


def _rotate_inputs(consumers, through):
  """Rotates inputs while the model runs: across heads, whose channels are rotated, or all."""
  inner = through.head_width if _turns(through) else 1
  for linear in consumers:
    w_IO = linear.weight.get_value()
    if w_IO.shape[-2] > inner:
      linear.weight.set_value(rotated.rotated(w_IO, inner=inner))


def _read(norm, consumers, signs_D):
  """Merges a norm's scale into the matrices after it, and makes them read the rotated stream."""
  scale_D = np.asarray(norm.scale.get_value(), np.float64) + norm.offset
  for linear in consumers:
    _edit(linear.weight, lambda w_DO: _turn_inputs(scale_D[:, None] * w_DO, signs_D))
  _edit(norm.scale, lambda scale_D: np.full_like(scale_D, 1 - norm.offset))


def _write(linear, signs_D):
  """Makes a matrix write to the rotated stream."""
  _edit(linear.weight, lambda w_IO: _turn(w_IO, signs_D))
  if linear.bias is not None:
    _edit(linear.bias, lambda bias_O: _turn(bias_O, signs_D))


def _turn_inputs(w_DO, signs_D):
  return np.swapaxes(_turn(np.swapaxes(w_DO, -1, -2), signs_D), -1, -2)


def _turn(x_D, signs_D):
  return rotated.rotate(x_D * signs_D)


def _edit(param, fn):
  """Replaces a parameter by a function of it, computed in float64."""
  value = param.get_value()
  param.set_value(jnp.asarray(fn(np.asarray(value, np.float64)).astype(value.dtype)))
