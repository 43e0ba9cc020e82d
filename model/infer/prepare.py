"""A model's weights in the form that multiplies fastest on the platform at hand."""

import jax
from flax import nnx

from model.transformer import Transformer, linears, parameters
from ops.kernels.cpu import layout, packed
from ops.linear import Matrix, Weight, kernel, on_one_device
from ops.transposed import as_transposed

EMBEDDING = 'embedding.table'


def prepare(model: Transformer, *, activations: packed.Activations = 'int16') -> Transformer:
  """Returns the model with its matrices, the head's included, in the form the platform multiplies.

  An embedding that is also the head is looked up in that form; any other stays as it is.

  On a CPU matrices are packed for native products, on a TPU or GPU for products that do not widen
  them. A matrix without such a product, or one that is packed already, stays as it is, and so does
  everything on a CPU without the native library. The model itself is not changed; only packed
  matrices are copied. `activations` says how a CPU multiplies them by low-bit integers: 'int16'
  rounds them, which perplexity does not show, and 'float' keeps them and is slower. Packing reads
  every weight, so call this once for a model that is used often.
  """
  held = {f'{path}.weight': linear.weight.get_value() for path, linear in linears(model).items()}
  fast = {path: _pack(w, activations) for path, w in held.items()}
  if model.head is None:
    held[EMBEDDING] = model.embedding.table.get_value()
    fast[EMBEDDING] = _pack_table(held[EMBEDDING], activations)
  changed = {path: w for path, w in fast.items() if w is not held[path]}
  if not changed:
    return model
  copy = nnx.clone(model)  # merging what was split would share the parameters
  params = parameters(copy)
  for path, w in changed.items():
    params[path].set_value(w)
  return copy


def _pack_table(w: Matrix, activations: packed.Activations) -> Matrix:
  """Packs the embedding of a tied model; an array stays an array where XLA multiplies it well."""
  if not isinstance(w, Weight) and kernel(w, jax.default_backend()) is not None:
    return w
  fast = _pack(as_transposed(w), activations)
  return fast if isinstance(fast.weight, Weight) else w


def _pack(w: Matrix, activations: packed.Activations) -> Matrix:
  platform, alone = jax.default_backend(), on_one_device(w)
  if platform == 'cpu':
    return layout.pack(w, activations) if alone else w
  # Imported here, because a CPU does not need Pallas, and JAX means to remove a part of it.
  from ops.kernels import fused

  return fused.pack(w, platform, one_device=alone) if platform in fused.KERNELS else w
