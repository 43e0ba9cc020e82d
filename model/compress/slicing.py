"""Rotates the residual stream to its principal axes and removes the last ones.

Ashkboos et al. (2024), SliceGPT, https://arxiv.org/abs/2401.15024. A model whose norms have no
scale computes the same in every rotation of the residual stream (computational invariance). So the
scales and biases of the norms are merged into the matrices that read them, a layer norm becomes an
RMS norm after the mean is taken out of all that is written to the stream, and the head gets a
matrix of its own if it is tied to the embedding, which adds parameters. The stream is then rotated
to the eigenvectors of the covariance of what the norms put out, and the dimensions of the smallest
eigenvalues are removed; `norms` rescales for the new width.

The paper rotates each block by axes of its own and puts a matrix into every skip connection. Here
all blocks share the axes of the mean covariance, so that the result is a plain transformer; it
loses more at the same width. The paper also takes the covariance from the rotated, sliced model,
here it is that of the model as it is. Weights are merged and rotated in float64 and rounded once.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from model import units
from model.compress import norms, sizes
from model.compress.measurements import Measurements
from model.compress.registry import Reshaped, technique
from model.compress.sizes import SizeSpec
from model.config import ModelConfig
from model.transformer import Transformer, abstract, parameters
from ops import structure


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceSpec(SizeSpec):
  """How many dimensions go; `latency` is no target of slicing."""

  def __post_init__(self):
    super().__post_init__()
    if self.latency is not None:
      raise ValueError('slicing takes a ratio, parameters or megabytes, and no latency')


def check(config: ModelConfig, spec: SliceSpec) -> None:
  """Raises ValueError if the norms of a model of this config cannot be merged."""
  del spec
  if any(layer.post_norms for layer in config.layers):
    raise ValueError('the scales of norms after attention and feed-forward cannot be merged')
  if not all(layer.pre_norms for layer in config.layers):
    raise ValueError('layers that read the stream without a norm change with its width')


def _reshapes(model, spec):
  flat = abstract(merged_config(model.config), model.embedding.table.get_value().dtype)
  count = sizes.uniform(flat, spec, 'D', base=model)
  return units.resized(flat.config, units.keep('D', [np.arange(count)]))


@technique(
  'slice',
  spec=SliceSpec,
  paper='Ashkboos et al. 2024, https://arxiv.org/abs/2401.15024',
  scope='shape',
  check=check,
  reshapes=_reshapes,
  calibrates=lambda spec: True,
)
def slice_width(model, measurements, spec):
  """Rotate the residual stream to its principal axes and remove the last of them."""
  width, config = model.config.width, _reshapes(model, spec)
  values, dtypes = merge_norms(model), _dtypes(model)
  flat = units.build(merged_config(model.config), _stored(values, dtypes), model.dtype)
  names = ('input_covariance',)
  found = Measurements(flat, measurements.tokens_BT).normed(names)
  covariances = {path: np.asarray(stats[names[0]], np.float64) for path, stats in found.items()}
  axes_DD, _ = structure.principal_axes(sum(covariances.values()))
  kept = np.arange(config.width)
  result = _stored(_turned(flat, values, axes_DD[:, kept]), dtypes)
  factors = {
    path: norms.factor(np.einsum('Dd,DE,Ed->d', axes_DD, covariance_DD, axes_DD), kept)
    for path, covariance_DD in covariances.items()
  }
  norms.rescale(result, factors, config.norm_offset)
  events = {
    f'{units.NAMES["D"]} removed after rotation, of {width}': width - config.width,
    'tied head given a matrix of its own': int(model.config.tied),
  }
  return Reshaped(config=config, parameters=result, events={'model': events})


def _dtypes(model):
  """The dtypes of parameters by path; new ones have that of the embedding."""
  return {path: param.get_value().dtype for path, param in parameters(model).items()}


def _stored(values, dtypes):
  usual = dtypes['embedding.table']
  return {p: jnp.asarray(value.astype(dtypes.get(p, usual))) for p, value in values.items()}


def _turned(model, values, axes_Dd) -> dict[str, np.ndarray]:
  """Projects every 'D' axis to the new axes; norms, whose scales are all alike, become shorter."""
  found, norms_of_stream = dict(values), _readers(model)
  for path, letters in units.letters(model).items():
    module, _, _ = path.rpartition('.')
    for axis, letter in enumerate(letters):
      if letter == 'D' and module in norms_of_stream:
        found[path] = found[path][: axes_Dd.shape[1]]
      elif letter == 'D':
        found[path] = np.moveaxis(np.tensordot(found[path], axes_Dd, (axis, 0)), -1, axis)
  return found


def merged_config(config: ModelConfig) -> ModelConfig:
  """Returns the config of a model after `merge_norms`: RMS norms, and a head of its own."""
  layers, biased = config.layers, config.norm == 'layer'
  if biased:
    layers = tuple(layer.biased() for layer in layers)
  return config.replace(norm='rms', tied=False, layers=layers, head_bias=config.head_bias or biased)


def merge_norms(model: Transformer) -> dict[str, np.ndarray]:
  """Merges the norms of the stream into the matrices after them: float64 parameters by path.

  They are those of `merged_config`, and the logits are the same.
  """
  values = {}
  for path, param in parameters(model).items():
    units.check_plain(path, param.get_value())
    values[path] = np.asarray(param.get_value(), np.float64)
  if model.head is None:
    values['head.weight'] = values['embedding.table'].T
  if model.config.norm == 'layer':
    _centre(model, values)
  for norm, consumers in _readers(model).items():
    _merge(model.config, values, norm, consumers)
  # A config may have one flag for several biases, some of which no norm is merged into.
  for path, param in parameters(abstract(merged_config(model.config))).items():
    if path.endswith('.bias'):
      values.setdefault(path, np.zeros(param.get_value().shape))
  return values


def _readers(model) -> dict[str, list[str]]:
  """Every norm of the stream with the linear layers that read it, by path."""
  found = {
    f'layers.{l}.{norm}': [f'layers.{l}.{layer}' for layer in consumers]
    for l, block in enumerate(model.layers)
    for norm, consumers in block.layer.wiring.norms.items()
  }
  return found | {'final_norm': ['head']}


def _centre(model, values):
  """Takes the mean out of everything that is written to the stream, which layer norms ignore."""
  norms_of_stream = _readers(model)
  for path, letters in units.letters(model).items():
    if letters[-1] == 'D' and path.rpartition('.')[0] not in norms_of_stream:
      values[path] = values[path] - values[path].mean(-1, keepdims=True)


def _merge(config, values, norm, consumers):
  scale_D = values[f'{norm}.scale'] + config.norm_offset
  bias_D = values.pop(f'{norm}.bias', None)
  for layer in consumers:
    w_DO = values[f'{layer}.weight']
    if bias_D is not None:
      values[f'{layer}.bias'] = values.get(f'{layer}.bias', 0) + bias_D @ w_DO
    values[f'{layer}.weight'] = scale_D[:, None] * w_DO
  values[f'{norm}.scale'] = np.full_like(scale_D, 1 - config.norm_offset)
