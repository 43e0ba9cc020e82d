"""A model's weights in the form that multiplies fastest on the platform at hand."""

import jax
from flax import nnx

from model.transformer import Transformer, linears
from ops.kernels.cpu import packed
from ops.linear import Matrix


def prepare(model: Transformer, *, activations: packed.Activations = 'int8') -> Transformer:
  """Returns the model with its matrices, the head's included, packed for native products.

  What has no native product, or is packed already, stays as it is, and so does everything on other
  platforms than a CPU and without the native library. The model itself is not changed; nothing is
  copied but what is packed. `activations` is 'int8' to round those that meet low-bit integers, or
  'float'. Call it once where a model is used often: packing reads every weight.
  """
  if jax.default_backend() != 'cpu':
    return model
  packed_matrices = {}
  for path, linear in linears(model).items():
    w = linear.weight.get_value()
    fast = packed.pack(w, activations) if _on_one_device(w) else w
    if fast is not w:
      packed_matrices[path] = fast
  if not packed_matrices:
    return model
  copy = nnx.clone(model)  # merging what was split would share the parameters
  for path, linear in linears(copy).items():
    if path in packed_matrices:
      linear.weight.set_value(packed_matrices[path])
  return copy


def _on_one_device(w: Matrix) -> bool:
  return all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(w))
