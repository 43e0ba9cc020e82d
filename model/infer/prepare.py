"""A model's weights in the form that multiplies fastest on the platform at hand."""

import jax
from flax import nnx

from model.transformer import Transformer, linears
from ops.kernels.cpu import layout, packed
from ops.linear import Matrix, on_one_device


def prepare(model: Transformer, *, activations: packed.Activations = 'int16') -> Transformer:
  """Returns the model with its matrices, the head's included, in the form the platform multiplies.

  On a CPU they are packed for native products, on a TPU or GPU for those that do not widen them. A
  matrix for which there is none, or that is packed already, stays as it is, and so does everything
  on a CPU without the native library. The model itself is not changed; only what is packed is
  copied. `activations` is for those that meet low-bit integers on a CPU: 'int16' rounds them, which
  perplexity does not show, and 'float' keeps them and is slower.
  Call it once where a model is used often: packing reads every weight.
  """
  packed_matrices = {}
  for path, linear in linears(model).items():
    w = linear.weight.get_value()
    fast = _pack(w, activations)
    if fast is not w:
      packed_matrices[path] = fast
  if not packed_matrices:
    return model
  copy = nnx.clone(model)  # merging what was split would share the parameters
  for path, linear in linears(copy).items():
    if path in packed_matrices:
      linear.weight.set_value(packed_matrices[path])
  return copy


def _pack(w: Matrix, activations: packed.Activations) -> Matrix:
  platform, alone = jax.default_backend(), on_one_device(w)
  if platform == 'cpu':
    return layout.pack(w, activations) if alone else w
  # Imported here, for a CPU has no use for Pallas, and JAX means to remove a part of it.
  from ops.kernels import fused

  return fused.pack(w, platform, one_device=alone) if platform in fused.KERNELS else w
