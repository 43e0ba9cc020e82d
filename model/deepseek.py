"""The shapes of DeepSeek-V2 and V3, which `model.presets` lists, by the config files on the hub."""

import dataclasses
import math
from collections.abc import Callable

from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.latent import LatentConfig
from model.layers.routed import RoutedConfig
from ops.moe import Router
from ops.rope import RopeConfig

V2 = {'family': 'deepseek_v2', 'vocab_size': 102_400, 'bos_id': 100_000, 'eos_ids': (100_001,)}
V3 = {'family': 'deepseek_v3', 'bos_id': 0, 'eos_ids': (1,)}
V3_ROUTER = {'score': 'sigmoid', 'group_score': 'sum_of_two', 'renormalize': True, 'scale': 2.5}


def _rope(mscale: float) -> RopeConfig:
  """The rope of 4,096 positions, stretched 40 times."""
  return RopeConfig(
    kind='yarn',
    factor=40.0,
    original_max_positions=4096,
    mscale=mscale,
    mscale_all_dim=mscale,
  )


def _heads(count: int, query_rank: int | None) -> LatentConfig:
  return LatentConfig(
    query_heads=count,
    kv_heads=count,
    still_width=128,
    rotary_width=64,
    value_width=128,
    rank=512,
    query_rank=query_rank,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layers:
  """The first `dense` layers have a feed-forward network of the width `ffn`, and others experts."""

  depth: int
  dense: int
  mixer: LatentConfig
  ffn: int
  experts: RoutedConfig

  def under(self, rope: RopeConfig) -> tuple[LayerConfig, ...]:
    mscale = 0.1 * rope.mscale * math.log(rope.factor) + 1
    mixer = dataclasses.replace(self.mixer, query_scale=mscale**2 * self.mixer.head_width**-0.5)
    dense = LayerConfig(mixer=mixer, ffn=FeedForwardConfig(width=self.ffn))
    routed = LayerConfig(mixer=mixer, ffn=self.experts)
    return (dense,) * self.dense + (routed,) * (self.depth - self.dense)


def _model(layers: _Layers, mscale: float, **fields) -> ModelConfig:
  rope = _rope(mscale)
  defaults = {'max_positions': 163_840, 'norm_eps': 1e-6}
  return ModelConfig(layers=layers.under(rope), rope=rope, **(defaults | fields))


def _v2() -> ModelConfig:
  router = Router(choices=6, groups=8, group_limit=3, scale=16.0)
  experts = RoutedConfig(experts=160, width=1536, shared_width=3072, router=router)
  layers = _Layers(depth=60, dense=1, mixer=_heads(128, 1536), ffn=12_288, experts=experts)
  return _model(layers, 0.707, width=5120, **V2)


def _v2_lite() -> ModelConfig:
  experts = RoutedConfig(experts=64, width=1408, shared_width=2816, router=Router(choices=6))
  layers = _Layers(depth=27, dense=1, mixer=_heads(16, None), ffn=10_944, experts=experts)
  return _model(layers, 0.707, width=2048, **V2)


def _v3() -> ModelConfig:
  router = Router(choices=8, groups=8, group_limit=4, **V3_ROUTER)
  experts = RoutedConfig(
    experts=256, width=2048, shared_width=2048, router=router, choice_bias=True
  )
  layers = _Layers(depth=61, dense=3, mixer=_heads(128, 1536), ffn=18_432, experts=experts)
  return _model(layers, 1.0, width=7168, vocab_size=129_280, **V3)


def _tiny() -> ModelConfig:
  mixer = LatentConfig(
    query_heads=4,
    kv_heads=4,
    still_width=8,
    rotary_width=8,
    value_width=16,
    rank=24,
    query_rank=32,
  )
  router = Router(choices=2, groups=4, group_limit=2, **V3_ROUTER)
  experts = RoutedConfig(experts=8, width=32, shared_width=32, router=router, choice_bias=True)
  layers = _Layers(depth=2, dense=1, mixer=mixer, ffn=152, experts=experts)
  return _model(layers, 1.0, width=64, vocab_size=256, **V3 | {'max_positions': 128})


PRESETS: dict[str, Callable[[], ModelConfig]] = {
  'deepseek-v2': _v2,
  'deepseek-v2-lite': _v2_lite,
  'deepseek-v3': _v3,
  'tiny-deepseek-v3': _tiny,
}
