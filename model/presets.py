"""Builds the configs of named architectures and lists their published parameter counts.

The numbers come from the models' own config files. The `tiny-*` shapes have the traits of each
family at a size for tests; their counts are those of the same shapes in Hugging Face transformers.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

from model import deepseek
from model.config import ModelConfig
from model.layers.block import LayerConfig
from model.layers.feed_forward import FeedForwardConfig
from model.layers.mixers.attention import AttentionConfig
from model.layers.mixers.delta import GatedDeltaConfig
from model.layers.routed import RoutedConfig
from ops.moe import Router
from ops.rope import RopeConfig

# A tied head counts once.
PARAMETERS = {
  'deepseek-v2': 235_741_434_880,
  'deepseek-v2-lite': 15_706_484_224,
  'deepseek-v3': 671_026_419_200,  # with the biases of the choice of experts
  'gemma-2-2b': 2_614_341_888,
  'gemma-3-1b': 999_885_952,
  'gpt2': 124_439_808,
  'granite-3.0-2b': 2_533_531_648,
  'llama-2-7b': 6_738_415_616,
  'llama-3.1-8b': 8_030_261_248,
  'mistral-7b-v0.1': 7_241_732_096,
  'olmo-2-1b': 1_484_916_736,
  'olmoe-1b-7b': 6_919_161_856,
  'phi-3-mini': 3_821_079_552,
  'pythia-70m': 70_426_624,
  'qwen3-0.6b': 596_049_920,
  'qwen3-next-80b-a3b': 79_674_391_296,
  'smollm2-135m': 134_515_008,
  'smollm3-3b': 3_075_098_624,
  'tinyllama-1.1b': 1_100_048_384,
  'tiny-deepseek-v3': 143_288,
  'tiny-gemma2': 102_976,
  'tiny-gemma3': 103_040,
  'tiny-gpt2': 124_672,
  'tiny-llama': 116_032,
  'tiny-mistral': 116_032,
  'tiny-neox': 132_864,
  'tiny-olmo2': 124_480,
  'tiny-olmoe': 173_632,
  'tiny-phi3': 124_224,
  'tiny-qwen3': 99_712,
  'tiny-qwen3-next': 325_544,
  'tiny-smollm3': 182_848,
}


def preset(name: str) -> ModelConfig:
  """Returns the config of a named architecture.

  Raises:
    ValueError: the name is unknown; the message lists the nearest names.
  """
  if name not in _BUILDERS:
    near = difflib.get_close_matches(name.lower(), _BUILDERS, n=3, cutoff=0.4)
    hint = f'did you mean {" or ".join(near)}?' if near else f'the presets: {", ".join(names())}'
    raise ValueError(f'there is no preset {name!r}; {hint}')
  return _BUILDERS[name]()


def names() -> list[str]:
  """Returns the names that `preset` accepts, sorted."""
  return sorted(_BUILDERS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
  """The widths of a layer."""

  mixer: dict[str, int]
  ffn: int


def _sizes(query_heads: int, kv_heads: int, head_width: int, ffn: int) -> _Sizes:
  heads = {'query_heads': query_heads, 'kv_heads': kv_heads, 'head_width': head_width}
  return _Sizes(mixer=heads, ffn=ffn)


def _llama(depth: int, sizes: _Sizes, window: int | None = None, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, window=window), ffn=FeedForwardConfig(width=sizes.ffn)
  )
  defaults = {'family': 'llama', 'bos_id': 1, 'eos_ids': (2,)}
  return ModelConfig(layers=(layer,) * depth, **(defaults | fields))


def _gpt2(depth: int, sizes: _Sizes, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, qkv_bias=True, output_bias=True),
    ffn=FeedForwardConfig(width=sizes.ffn, activation='gelu_tanh', gated=False, bias=True),
  )
  return ModelConfig(
    family='gpt2', layers=(layer,) * depth, norm='layer', rope=None, tied=True, **fields
  )


def _neox(depth: int, sizes: _Sizes, **fields) -> ModelConfig:
  rotary_width = sizes.mixer['head_width'] // 4
  layer = LayerConfig(
    mixer=AttentionConfig(
      **sizes.mixer, rotary_width=rotary_width, qkv_bias=True, output_bias=True
    ),
    ffn=FeedForwardConfig(width=sizes.ffn, activation='gelu', gated=False, bias=True),
    parallel=True,
  )
  return ModelConfig(
    family='gpt_neox', layers=(layer,) * depth, norm='layer', bos_id=0, eos_ids=(0,), **fields
  )


def _qwen3(depth: int, sizes: _Sizes, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, qk_norm=True), ffn=FeedForwardConfig(width=sizes.ffn)
  )
  rope = RopeConfig(theta=1e6)
  return ModelConfig(
    family='qwen3', layers=(layer,) * depth, norm_eps=1e-6, rope=rope, tied=True, **fields
  )


def _qwen3_next(
  depth: int, sizes: _Sizes, delta: GatedDeltaConfig, experts: int, choices: int, **fields
) -> ModelConfig:
  heads = AttentionConfig(
    **sizes.mixer, rotary_width=sizes.mixer['head_width'] // 4, qk_norm=True, gated=True
  )
  ffn = RoutedConfig(
    experts=experts,
    width=sizes.ffn,
    router=Router(choices=choices, renormalize=True),
    shared_width=sizes.ffn,
    shared_gate=True,
  )
  mixers = [delta if (l + 1) % 4 else heads for l in range(depth)]
  return ModelConfig(
    family='qwen3_next',
    layers=tuple(LayerConfig(mixer=mixer, ffn=ffn) for mixer in mixers),
    norm_eps=1e-6,
    norm_offset=1.0,
    rope=RopeConfig(theta=1e7),
    **fields,
  )


def _smollm3(depth: int, sizes: _Sizes, **fields) -> ModelConfig:
  layer = LayerConfig(mixer=AttentionConfig(**sizes.mixer), ffn=FeedForwardConfig(width=sizes.ffn))
  still = layer.with_mixer(rotates=False)
  layers = tuple(layer if (l + 1) % 4 else still for l in range(depth))
  rope = RopeConfig(theta=5e6)
  return ModelConfig(family='smollm3', layers=layers, norm_eps=1e-6, rope=rope, tied=True, **fields)


def _granite(depth: int, sizes: _Sizes, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, query_scale=1 / 64),
    ffn=FeedForwardConfig(width=sizes.ffn),
    residual_scale=0.22,
  )
  scales = {'embedding_scale': 12.0, 'logit_divisor': 8.0}
  return ModelConfig(family='granite', layers=(layer,) * depth, tied=True, **scales, **fields)


def _olmo2(depth: int, sizes: _Sizes, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, qk_norm=True, qk_norm_over='all'),
    ffn=FeedForwardConfig(width=sizes.ffn),
    pre_norms=False,
    post_norms=True,
  )
  rope = RopeConfig(theta=5e5)
  return ModelConfig(family='olmo2', layers=(layer,) * depth, norm_eps=1e-6, rope=rope, **fields)


def _olmoe(depth: int, sizes: _Sizes, experts: int, choices: int, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, qk_norm=True, qk_norm_over='all'),
    ffn=RoutedConfig(experts=experts, width=sizes.ffn, router=Router(choices=choices)),
  )
  return ModelConfig(family='olmoe', layers=(layer,) * depth, **fields)


def _gemma2(depth: int, sizes: _Sizes, window: int, **fields) -> ModelConfig:
  scale = sizes.mixer['head_width'] ** -0.5
  layer = LayerConfig(
    mixer=AttentionConfig(**sizes.mixer, softcap=50.0, query_scale=scale),
    ffn=FeedForwardConfig(width=sizes.ffn, activation='gelu_tanh'),
    post_norms=True,
  )
  local = layer.with_mixer(window=window)
  return ModelConfig(
    family='gemma2',
    layers=tuple(layer if l % 2 else local for l in range(depth)),
    norm_eps=1e-6,
    norm_offset=1.0,
    tied=True,
    embedding_scale=math.sqrt(fields['width']),
    logit_softcap=30.0,
    bos_id=2,
    eos_ids=(1,),
    **fields,
  )


def _gemma3(depth: int, sizes: _Sizes, window: int, period: int, **fields) -> ModelConfig:
  layer = LayerConfig(
    mixer=AttentionConfig(
      **sizes.mixer, query_scale=sizes.mixer['head_width'] ** -0.5, qk_norm=True
    ),
    ffn=FeedForwardConfig(width=sizes.ffn, activation='gelu_tanh'),
    post_norms=True,
  )
  local = layer.with_mixer(window=window, rope=RopeConfig())
  return ModelConfig(
    family='gemma3_text',
    layers=tuple(local if (l + 1) % period else layer for l in range(depth)),
    norm_eps=1e-6,
    norm_offset=1.0,
    rope=RopeConfig(theta=1e6),
    tied=True,
    embedding_scale=math.sqrt(fields['width']),
    bos_id=2,
    eos_ids=(1,),
    **fields,
  )


_LLAMA3_ROPE = RopeConfig(theta=5e5, kind='llama3', factor=8.0, original_max_positions=8192)
_TINY = {'vocab_size': 256, 'width': 64, 'max_positions': 128}

_BUILDERS: dict[str, Callable[[], ModelConfig]] = {
  **deepseek.PRESETS,
  'gemma-2-2b': lambda: _gemma2(
    26, _sizes(8, 4, 256, 9216), 4096, vocab_size=256_000, width=2304, max_positions=8192
  ),
  'gemma-3-1b': lambda: _gemma3(
    26, _sizes(4, 1, 256, 6912), 512, 6, vocab_size=262_144, width=1152, max_positions=32_768
  ),
  'gpt2': lambda: _gpt2(
    12,
    _sizes(12, 12, 64, 3072),
    vocab_size=50_257,
    width=768,
    max_positions=1024,
    bos_id=50_256,
    eos_ids=(50_256,),
  ),
  'granite-3.0-2b': lambda: _granite(
    40,
    _sizes(32, 8, 64, 8192),
    vocab_size=49_155,
    width=2048,
    max_positions=4096,
    bos_id=0,
    eos_ids=(0,),
    pad_id=0,
  ),
  'llama-2-7b': lambda: _llama(
    32, _sizes(32, 32, 128, 11_008), vocab_size=32_000, width=4096, max_positions=4096
  ),
  'llama-3.1-8b': lambda: _llama(
    32,
    _sizes(32, 8, 128, 14_336),
    vocab_size=128_256,
    width=4096,
    max_positions=131_072,
    rope=_LLAMA3_ROPE,
    bos_id=128_000,
    eos_ids=(128_001,),
  ),
  'mistral-7b-v0.1': lambda: _llama(
    32,
    _sizes(32, 8, 128, 14_336),
    4096,
    family='mistral',
    vocab_size=32_000,
    width=4096,
    max_positions=32_768,
  ),
  'olmo-2-1b': lambda: _olmo2(
    16,
    _sizes(16, 16, 128, 8192),
    vocab_size=100_352,
    width=2048,
    max_positions=4096,
    eos_ids=(100_257,),
    pad_id=100_277,
  ),
  'olmoe-1b-7b': lambda: _olmoe(
    16,
    _sizes(16, 16, 128, 1024),
    64,
    8,
    vocab_size=50_304,
    width=2048,
    max_positions=4096,
    eos_ids=(50_279,),
    pad_id=1,
  ),
  'phi-3-mini': lambda: _llama(
    32,
    _sizes(32, 32, 96, 8192),
    2047,
    family='phi3',
    vocab_size=32_064,
    width=3072,
    max_positions=4096,
    eos_ids=(32_000,),
  ),
  'pythia-70m': lambda: _neox(
    6, _sizes(8, 8, 64, 2048), vocab_size=50_304, width=512, max_positions=2048
  ),
  'qwen3-0.6b': lambda: _qwen3(
    28,
    _sizes(16, 8, 128, 3072),
    vocab_size=151_936,
    width=1024,
    max_positions=40_960,
    bos_id=151_643,
    eos_ids=(151_645,),
  ),
  'qwen3-next-80b-a3b': lambda: _qwen3_next(
    48,
    _sizes(16, 2, 256, 512),
    GatedDeltaConfig(key_heads=16, value_heads=32, key_width=128, value_width=128),
    512,
    10,
    vocab_size=151_936,
    width=2048,
    max_positions=262_144,
    bos_id=151_643,
    eos_ids=(151_645,),
  ),
  'smollm2-135m': lambda: _llama(
    30,
    _sizes(9, 3, 64, 1536),
    vocab_size=49_152,
    width=576,
    max_positions=8192,
    tied=True,
    rope=RopeConfig(theta=1e5),
    bos_id=0,
    eos_ids=(0,),
  ),
  'smollm3-3b': lambda: _smollm3(
    36,
    _sizes(16, 4, 128, 11_008),
    vocab_size=128_256,
    width=2048,
    max_positions=65_536,
    bos_id=128_000,
    eos_ids=(128_012,),
    pad_id=128_004,
  ),
  'tinyllama-1.1b': lambda: _llama(
    22, _sizes(32, 4, 64, 5632), vocab_size=32_000, width=2048, max_positions=2048
  ),
  'tiny-gemma2': lambda: _gemma2(2, _sizes(4, 2, 16, 160), 32, **_TINY),
  'tiny-gemma3': lambda: _gemma3(2, _sizes(4, 2, 16, 160), 32, 2, **_TINY),
  'tiny-gpt2': lambda: _gpt2(2, _sizes(4, 4, 16, 256), **_TINY),
  'tiny-llama': lambda: _llama(2, _sizes(4, 2, 16, 152), **_TINY),
  'tiny-mistral': lambda: _llama(2, _sizes(4, 2, 16, 152), 32, family='mistral', **_TINY),
  'tiny-neox': lambda: _neox(2, _sizes(4, 4, 16, 256), **_TINY),
  'tiny-olmo2': lambda: _olmo2(2, _sizes(4, 4, 16, 152), **_TINY),
  'tiny-olmoe': lambda: _olmoe(2, _sizes(4, 4, 16, 32), 8, 2, **_TINY | {'vocab_size': 320}),
  'tiny-phi3': lambda: _llama(2, _sizes(4, 4, 16, 152), 64, family='phi3', **_TINY),
  'tiny-qwen3': lambda: _qwen3(2, _sizes(4, 2, 16, 152), **_TINY),
  'tiny-qwen3-next': lambda: _qwen3_next(
    4,
    _sizes(4, 2, 16, 32),
    GatedDeltaConfig(key_heads=2, value_heads=4, key_width=16, value_width=16),
    8,
    2,
    **_TINY,
  ),
  'tiny-smollm3': lambda: _smollm3(4, _sizes(4, 2, 16, 152), **_TINY),
}
