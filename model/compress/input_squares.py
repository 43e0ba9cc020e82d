"""The mean squares of the inputs of layers: the importance of their weights for rounding."""

import numpy as np

from model.compress.measurements import Measurements
from model.transformer import Transformer, linears
from ops.linear import Weight


def input_squares(model: Transformer, calibration_BT: np.ndarray) -> dict[str, np.ndarray]:
  """The mean square of each input of each layer of the blocks, by path: float32 [I].

  Layers that transform their inputs first are left out, because their matrices are written without.
  """
  measured, found = Measurements(model, calibration_BT), {}
  blocks = measured.inputs(lambda block: tuple(linears(block)), ('input_norm',))
  for l, block in enumerate(blocks):
    for layer, statistics in block.items():
      norm_I = np.asarray(statistics['input_norm'])
      found[f'layers.{l}.{layer}'] = np.square(norm_I) / calibration_BT.size
  transforming = {
    path
    for path, linear in linears(model).items()
    if isinstance(w := linear.weight.get_value(), Weight) and w.transforms_input
  }
  return {path: squares for path, squares in found.items() if path not in transforming}
