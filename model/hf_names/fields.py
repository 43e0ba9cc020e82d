"""Reads the keys of `config.json` that families share, with their types.

An absent key takes the default of the family's configuration class in transformers; `null` is a
value, not an absent key. A value that is not supported raises a ValueError that names the key.
"""

from model.config import ModelConfig
from model.layers.block import LayerConfig

# Names of activations in transformers and here. Where several names mean one of ours, the first is
# the one that is written.
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_python': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_accurate': 'gelu_tanh',
  'gelu_python_tanh': 'gelu_tanh',
  'quick_gelu': 'quick_gelu',
  'relu': 'relu',
}


def size(hf: dict, key: str, default: int) -> int:
  """An integer of at least 1."""
  value = integer(hf, key, default)
  if value < 1:
    raise ValueError(f'{key} in config.json must be at least 1, not {value}')
  return value


def integer(hf: dict, key: str, default: int) -> int:
  return _read(hf, key, default, int, 'an integer')


def number(hf: dict, key: str, default: float) -> float:
  return float(_read(hf, key, default, (int, float), 'a number'))


def positive(hf: dict, key: str, default: float) -> float:
  """A number above 0."""
  value = number(hf, key, default)
  if not value > 0:
    raise ValueError(f'{key} in config.json must be above 0, not {value}')
  return value


def flag(hf: dict, key: str, default: bool) -> bool:
  return _read(hf, key, default, bool, 'true or false')


def size_or_null(hf: dict, key: str, default: int | None) -> int | None:
  return None if hf.get(key, default) is None else size(hf, key, default)


def number_or_null(hf: dict, key: str, default: float | None) -> float | None:
  return None if hf.get(key, default) is None else number(hf, key, default)


def _read(hf, key, default, kinds, what):
  value = hf.get(key, default)
  # bool is a subclass of int, but `true` is no number.
  if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
    raise ValueError(f'{key} in config.json must be {what}, not {value!r}')
  return value


def refuse(hf: dict, key: str, *harmless) -> None:
  """Raises ValueError if a key has a value that is not supported."""
  if key in hf and hf[key] not in harmless:
    ok = ' or '.join(repr(value) for value in harmless)
    raise ValueError(f'{key} = {hf[key]!r} in config.json is not supported; supported: {ok}')


def activation(hf: dict, key: str, default: str) -> str:
  name = hf.get(key, default)
  if not isinstance(name, str) or name not in ACTIVATIONS:
    raise ValueError(
      f'{key} = {name!r} in config.json is not supported; supported: {", ".join(ACTIVATIONS)}'
    )
  return ACTIVATIONS[name]


def activation_name(ours: str) -> str:
  return next(name for name, kind in ACTIVATIONS.items() if kind == ours)


def tokens(
  hf: dict, bos: int | None, eos: int | None, pad: int | None = None, *, vocab_size: int
) -> dict:
  """The special tokens as keywords of ModelConfig; `bos`, `eos`, `pad` are the family's defaults.

  A padding token beyond the vocabulary belongs to the tokenizer alone, and is None here.
  """
  bos_id, ids = hf.get('bos_token_id', bos), hf.get('eos_token_id', eos)
  pad_id = hf.get('pad_token_id', pad)
  ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
  for i in (*ids, *(one for one in (bos_id, pad_id) if one is not None)):
    if not isinstance(i, int) or isinstance(i, bool):
      raise ValueError(
        f'bos_token_id, eos_token_id and pad_token_id in config.json must be integers; {i!r} is not'
      )
  pad_id = None if pad_id is None or pad_id >= vocab_size else pad_id
  return {'bos_id': bos_id, 'eos_ids': tuple(ids), 'pad_id': pad_id}


def tokens_to_hf(config: ModelConfig) -> dict:
  """The keys that `tokens` reads."""
  ids = list(config.eos_ids)
  eos = None if not ids else ids[0] if len(ids) == 1 else ids
  return {'bos_token_id': config.bos_id, 'eos_token_id': eos, 'pad_token_id': config.pad_id}


def windows(hf: dict, slides: list[bool], window: int | None) -> list[int | None]:
  """The window of each layer: from `layer_types` or, where that is absent, from `slides`."""
  types = hf.get('layer_types')
  if types is None:
    types = ['sliding_attention' if s else 'full_attention' for s in slides]
  known = ('full_attention', 'sliding_attention')
  if not isinstance(types, list) or any(kind not in known for kind in types):
    raise ValueError(f'layer_types = {types!r} in config.json; supported: {", ".join(known)}')
  if len(types) != len(slides):
    raise ValueError(
      f'layer_types in config.json has {len(types)} entries, but there are {len(slides)} layers'
    )
  if 'sliding_attention' in types and window is None:
    raise ValueError('layer_types in config.json has sliding layers, but no sliding_window is set')
  return [window if kind == 'sliding_attention' else None for kind in types]


def layer_types(layers: tuple[LayerConfig, ...]) -> list[str]:
  return [
    'full_attention' if layer.mixer.window is None else 'sliding_attention' for layer in layers
  ]


def first_window(layers: tuple[LayerConfig, ...]) -> int | None:
  return next((layer.mixer.window for layer in layers if layer.mixer.window is not None), None)
