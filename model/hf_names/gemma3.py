"""Gemma 3 (text): Gemma 2 with norms of heads and no soft cap of scores, mostly of short windows.

Of six layers, five have a window and a rope of their own, and one sees all tokens. The text model
alone is read, not the one with images. transformers: models/gemma3 (5.24).
"""

import dataclasses

from model.hf_names import fields, gemma2, llama, qwen3, rope
from model.hf_names.family import Family
from ops.rope import RopeConfig

DEFAULTS = dataclasses.replace(gemma2.DEFAULTS, vocab_size=262_208, max_positions=131_072)
WINDOW, PERIOD = 4096, 6
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
GLOBAL, LOCAL = 'full_attention', 'sliding_attention'


def _from_hf(hf):
  ropes = _ropes(hf)
  fields.refuse(hf, 'use_bidirectional_attention', False, None)
  fields.refuse(hf, 'attn_logit_softcapping', None)  # transformers ignores it
  biased = fields.flag(hf, 'attention_bias', False)
  mixer = {
    'query_scale': fields.size(hf, 'query_pre_attn_scalar', 256) ** -0.5,
    'qk_norm': True,
    'qkv_bias': biased,
    'output_bias': biased,
  }
  layers = llama.blocks(hf, DEFAULTS, mixer=mixer, post_norms=True)
  period = fields.size(hf, 'sliding_window_pattern', PERIOD)
  slides = [(l + 1) % period != 0 for l in range(len(layers))]
  windows = fields.windows(hf, slides, fields.size_or_null(hf, 'sliding_window', WINDOW))
  layers = tuple(
    layer if window is None else layer.with_mixer(window=window, rope=ropes[LOCAL])
    for layer, window in zip(layers, windows)
  )
  return llama.decoder(
    hf,
    'gemma3_text',
    DEFAULTS,
    layers,
    rope=ropes[GLOBAL],
    norm_offset=1.0,
    embedding_scale=fields.size(hf, 'hidden_size', DEFAULTS.width) ** 0.5,
    logit_softcap=fields.number_or_null(hf, 'final_logit_softcapping', None),
  )


def _ropes(hf) -> dict[str, RopeConfig]:
  """The ropes of both kinds of layers.

  transformers 5 has a dictionary for each kind in `rope_parameters`, and transformers 4 has
  `rope_theta` and `rope_scaling` of global layers and `rope_local_base_freq` of local ones.
  """
  given, scaling = hf.get('rope_parameters') or {}, hf.get('rope_scaling') or {}
  if not isinstance(given, dict) or not given.keys() <= {GLOBAL, LOCAL}:
    raise ValueError(
      f'rope_parameters in config.json must have {GLOBAL} and {LOCAL}, not {given!r}'
    )
  if not isinstance(scaling, dict):
    raise ValueError(f'rope_scaling in config.json must be a dictionary, not {scaling!r}')
  own = {kind: given.get(kind) or {} for kind in (GLOBAL, LOCAL)}
  own[GLOBAL] = {**own[GLOBAL], **scaling}
  for one in (hf, *own.values()):
    fields.refuse(one, 'partial_rotary_factor', 1, None)
  read = lambda kind, **rest: rope.from_hf(
    {**hf, 'rope_parameters': own[kind], 'rope_scaling': None}, DEFAULTS.max_positions, **rest
  )
  local = {'theta_key': 'rope_local_base_freq', 'theta': LOCAL_THETA, 'types': ('default',)}
  return {
    GLOBAL: read(GLOBAL, theta=GLOBAL_THETA, types=('default', 'linear')),
    LOCAL: read(LOCAL, **local),
  }


def _to_hf(config):
  llama.require_divisible(config)
  heads = config.layers[0].mixer
  scale = heads.query_scale or heads.head_width**-0.5
  local = next(
    (config.rope_of(layer) for layer in config.layers if layer.mixer.window is not None),
    RopeConfig(theta=LOCAL_THETA),
  )
  ropes = {GLOBAL: rope.to_hf(config.rope), LOCAL: rope.to_hf(local)}
  return {
    **llama.decoder_to_hf(config, DEFAULTS.activation_key),
    **ropes[GLOBAL],
    'rope_local_base_freq': ropes[LOCAL]['rope_theta'],
    'rope_parameters': {kind: keys['rope_parameters'] for kind, keys in ropes.items()},
    'attention_bias': heads.qkv_bias,
    'query_pre_attn_scalar': max(1, round(scale**-2)),
    'attn_logit_softcapping': None,
    'final_logit_softcapping': config.logit_softcap,
    # transformers needs a window even if no layer slides.
    'sliding_window': fields.first_window(config.layers) or WINDOW,
    'layer_types': fields.layer_types(config.layers),
  }


GEMMA3 = Family(
  model_type='gemma3_text',
  architecture='Gemma3ForCausalLM',
  prefix='model.',
  rows=(*gemma2.ROWS, *qwen3.QK_NORMS),
  config_from_hf=_from_hf,
  config_to_hf=_to_hf,
  bos_in_windows=True,
)
