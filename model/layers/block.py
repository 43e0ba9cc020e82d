"""A decoder block: a mixer and a feed-forward network with residual connections."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from model.layers.basic import Norm, StreamConfig
from model.layers.cache import Cache
from model.layers.checks import check_positive
from model.layers.sublayer import FfnConfig, MixerConfig, SubLayerConfig, Units
from model.layers.wiring import Edge, Normed, Streamed, Wiring, Write
from ops.masks import AttentionMask


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
  """The two sub-layers of a block, and how it joins them."""

  mixer: MixerConfig
  ffn: FfnConfig
  pre_norms: bool = True  # a norm before each sub-layer; OLMo 2 has none
  post_norms: bool = False  # a norm after each sub-layer (Gemma 2)
  parallel: bool = False  # both sub-layers read the same input (GPT-NeoX)
  residual_scale: float = 1.0  # of what each sub-layer adds to the stream (Granite)

  def __post_init__(self):
    for name, base in (('mixer', MixerConfig), ('ffn', FfnConfig)):
      part = getattr(self, name)
      if not isinstance(part, base):
        raise ValueError(f'{name} must be a {base.__name__}, not {type(part).__name__}')
    check_positive('residual_scale', self.residual_scale)

  @property
  def sublayers(self) -> dict[str, SubLayerConfig]:
    """Both, by the names of their modules, which stand in the paths of parameters.

    That of the mixer is 'attention' whatever its kind, because files and recipes have that name.
    """
    return {'attention': self.mixer, 'ffn': self.ffn}

  @property
  def wiring(self) -> Wiring:
    """How the linear layers of the block are connected."""
    parts = self.sublayers.items()
    return Wiring(
      edges=tuple(self._edge(edge) for name, part in parts for edge in part.edges(name)),
      writes=tuple(
        Write(layer=layer, norm=f'{name}_post_norm' if self.post_norms else None)
        for name, part in parts
        for layer in part.writers(name)
      ),
    )

  def _edge(self, edge: Edge) -> Edge:
    """An edge of a sub-layer as it is in this block."""
    if self.pre_norms or not isinstance(edge.through, Normed):
      return edge
    return dataclasses.replace(edge, producer=None, through=Streamed())

  @property
  def units(self) -> tuple[Units, ...]:
    """What can be removed from each sub-layer."""
    return tuple(part.units for part in self.sublayers.values())

  def resized(self, letter: str, count: int) -> 'LayerConfig':
    """The config with so many units of this letter."""
    resize = lambda part: part.resized(count) if part.units.letter == letter else part
    return dataclasses.replace(self, mixer=resize(self.mixer), ffn=resize(self.ffn))

  def biased(self) -> 'LayerConfig':
    """The config in which every linear layer that reads the residual stream has a bias."""
    return dataclasses.replace(self, mixer=self.mixer.biased(), ffn=self.ffn.biased())

  def with_mixer(self, **changes) -> 'LayerConfig':
    """The config with other fields of the mixer."""
    return dataclasses.replace(self, mixer=dataclasses.replace(self.mixer, **changes))

  def with_ffn(self, **changes) -> 'LayerConfig':
    """The config with other fields of the feed-forward network."""
    return dataclasses.replace(self, ffn=dataclasses.replace(self.ffn, **changes))


class Block(nnx.Module):
  """One decoder layer: a mixer and a feed-forward network, with norms before or after."""

  def __init__(self, stream: StreamConfig, layer: LayerConfig, *, rngs, dtype):
    self.layer = layer
    norm = lambda there: Norm(stream.width, stream, dtype=dtype) if there else None
    self.attention_norm = norm(layer.pre_norms)
    self.attention = layer.mixer.build(stream, rngs=rngs, dtype=dtype)
    self.attention_post_norm = norm(layer.post_norms)
    self.ffn_norm = norm(layer.pre_norms)
    self.ffn = layer.ffn.build(stream, rngs=rngs, dtype=dtype)
    self.ffn_post_norm = norm(layer.post_norms)

  def __call__(self, x_BTD, angles, mask: AttentionMask, cache: Cache | None = None):
    """Returns (x_BTD, cache)."""
    return self.run(x_BTD, angles, mask, cache)[:2]

  def run(self, x_BTD, angles, mask: AttentionMask, cache: Cache | None = None):
    """Returns (x_BTD, cache, z_BTD), where z_BTD is what the feed-forward network has read."""
    y_BTD, cache = self.attention(self.mixer_input(x_BTD), angles, mask, cache)
    attended_BTD = x_BTD + self._written(self.attention_post_norm, y_BTD)
    source_BTD = x_BTD if self.layer.parallel else attended_BTD
    z_BTD = _normed(self.ffn_norm, source_BTD)
    return attended_BTD + self._written(self.ffn_post_norm, self.ffn(z_BTD)), cache, z_BTD

  def mixer_input(self, x_BTD):
    """What the mixer reads of the stream."""
    return _normed(self.attention_norm, x_BTD)

  def _written(self, norm: Norm | None, y_BTD):
    """What the output of a sub-layer adds to the stream."""
    y_BTD, scale = _normed(norm, y_BTD), self.layer.residual_scale
    return y_BTD if scale == 1.0 else y_BTD * jnp.asarray(scale, y_BTD.dtype)


def _normed(norm: Norm | None, x_BTD):
  return x_BTD if norm is None else norm(x_BTD)
