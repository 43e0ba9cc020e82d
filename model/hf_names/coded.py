"""Layouts that store the weights of some modules as codes and scales.

The codes of a checkpoint become the weight type that holds them, bit for bit; nothing is widened.
"""

import functools

import jax

from model import transformer
from model.hf_names.family import Layout
from model.transformer import Transformer
from ops import quantized
from ops.formats import FormatName
from ops.linear import Matrix, Weight
from ops.quantized import QuantizedTensor


def give_formats(model: Transformer, layout: Layout) -> None:
  """Gives the weights of an abstract model the types whose arrays a layout stores.

  Raises ValueError if the format does not fit a weight.
  """
  parameters = transformer.parameters(model)
  for path in _coded(layout, len(model.layers)):
    w = parameters[path].get_value() if path in parameters else None
    if w is not None and len(w.shape) > 2:
      encode = functools.partial(quantized.quantize, format=layout.format)
      parameters[path].set_value(jax.eval_shape(jax.vmap(encode), w))


def holds(layout: Layout, model: Transformer) -> bool:
  """Whether a layout stores every weight of a model in the type that it has."""
  coded = _coded(layout, len(model.layers))
  return all(
    _is_of(param.get_value(), layout.format)
    if path in coded
    else not isinstance(param.get_value(), Weight)
    for path, param in transformer.parameters(model).items()
  )


def _coded(layout: Layout, layers: int) -> set[str]:
  """The paths of the experts' weights that a layout stores as codes."""
  modules = {module for row in layout.rows if 'weight.values' in row.leaves for module in row.ours}
  return {f'{module.format(l=l)}.weight' for module in modules for l in range(layers)}


def _is_of(w: Matrix, format: FormatName) -> bool:
  """Whether these are packed codes of experts, with scales as the format defines them."""
  if not isinstance(w, QuantizedTensor) or w.format != format:
    return False
  return w.packed and len(w.shape) == 3 and w.scales.dtype == quantized.scale_dtype(format, 2)
