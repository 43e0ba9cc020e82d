"""Checkpoints in the format of Hugging Face, in and out, and GGUF files in.

  model, tokenizer = hf.load_pretrained('path/or/hub-id')
  model, tokenizer = hf.load_pretrained('model.gguf')
  hf.save_pretrained(model, tokenizer, 'folder')

A folder holds config.json, model.safetensors (or shards and their index) and the tokenizer's files.
`model.hf_names` has the tensor names and config keys of each family, `model.gguf` those of GGUF
files, which hold everything in one file. The tensors of a checkpoint are compared with its config
before any of them is read, and are read and written one at a time.

Matrices that other tools have quantized (`model.hf_quantized`) stay as they are stored where a
weight type of ours holds the same numbers.

A model that config.json cannot describe (compressed weights, layers of different widths) is written
in the format of `model.native`, which `load_pretrained` reads too.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from model import (
  gguf,
  hf_folder,
  hf_names,
  hf_quantized,
  kept_codes,
  native,
  transformer,
)
from model.config import ModelConfig
from model.files import read_json
from model.hf_folder import CONFIG, GENERATION
from model.hf_names import Entry, Family, Layout, coded
from model.safetensors_io import Tensor
from model.tokenizer import Tokenizer
from model.tokenizer import check as check_tokenizer
from model.transformer import Transformer
from ops.linear import Weight

MAX_LISTED = 20
BYTES = (np.dtype(np.uint8),)
LOG = logging.getLogger(__name__)
Say = Callable[[str], None]
# What is downloaded: weights, configs and tokenizer files of the top folder. Some repositories keep
# a second copy of their weights in consolidated*.safetensors.
_WANTED = ('*.json', '*.safetensors', '*.jinja', '*.txt', '*.model')
_UNWANTED = ('*/*', 'consolidated*')


def load_pretrained(
  path_or_hub_id: str | Path, dtype=None, *, say: Say = LOG.warning
) -> tuple[Transformer, Tokenizer | None]:
  """Loads a model, and its tokenizer if the checkpoint has one.

  A GGUF file is named itself, or by its folder if that holds no other and no config.json. Its
  weights are dequantized to float32.

  `dtype` is the type of the activations, and the parameters are cast to it. None keeps the stored
  type of the parameters (float32 for float64) and computes in float32. `say` gets a line for each
  kind of tensor that is not loaded as it is stored: buffers and the heads of other tasks are left
  out, and quantized matrices are widened where no weight type holds their numbers.

  Raises:
    ValueError: there is no such file, folder or hub repository; the config is absent or describes
      something unsupported; tensors are missing, unexpected, misshapen, not finite, or of a type
      that is not read (floating types are, and the blocks of `gguf.container`); a
      file is damaged; the tokenizer has more tokens than the model.
  """
  file = gguf.find_file(path_or_hub_id)
  if file is not None:
    return _load_gguf(file, dtype, say)
  folder = find_folder(path_or_hub_id)
  config = load_config(folder)
  tokenizer = Tokenizer.load(folder)
  if tokenizer is not None:
    check_tokenizer(tokenizer, config.vocab_size)
  if native.is_native(folder):
    return native.read(folder, dtype), tokenizer
  quantized = hf_quantized.settings(folder, read_json(folder / CONFIG))
  stored = hf_quantized.decode(quantized, hf_quantized.files.read(folder, quantized), say)
  return load_tensors(config, stored, dtype, say=say), tokenizer


def _load_gguf(path, dtype, say):
  file = gguf.read(path)
  config, tokenizer = gguf.to_config(file), gguf.to_tokenizer(file)
  if tokenizer is not None:
    check_tokenizer(tokenizer, config.vocab_size)
  names = gguf.find(file.metadata['general.architecture'])
  try:
    return load_tensors(config, file.tensors, dtype, names, say=say), tokenizer
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def find_folder(path_or_hub_id: str | Path) -> Path:
  """The local folder itself, or the one that the hub's files were downloaded into."""
  folder = Path(path_or_hub_id)
  if folder.is_dir():
    return folder
  name = str(path_or_hub_id)
  if folder.exists() or not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name) or name.startswith('.'):
    raise ValueError(
      f'{name!r} is no folder, no {gguf.EXTENSION} file, nor the name of a Hugging Face repository'
    )
  import huggingface_hub  # seconds to import, and local folders do without

  try:
    found = huggingface_hub.snapshot_download(
      name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
    )
  except (OSError, huggingface_hub.errors.HfHubHTTPError, ValueError) as error:
    raise ValueError(
      f'{name!r} is no local folder, and it could not be fetched from the Hugging Face hub: {error}'
    ) from error
  return Path(found)


def load_config(folder: str | Path) -> ModelConfig:
  """Reads config.json, and the special tokens of generation_config.json.

  The stop tokens of generation_config.json win, because chat models add theirs there. Its padding
  token counts where config.json has none.
  """
  folder = Path(folder)
  if native.is_native(folder):
    return native.read_config(folder)
  if not (folder / CONFIG).is_file():
    raise ValueError(
      f'{folder} has no {CONFIG}; name a folder with {CONFIG} and safetensors, or a .gguf file'
    )
  hf = read_json(folder / CONFIG)
  hf[hf_quantized.KEY] = hf_quantized.settings(folder, hf)
  generation = _read_generation(folder / GENERATION)
  for key, wins in (('eos_token_id', True), ('pad_token_id', hf.get('pad_token_id') is None)):
    if wins and generation.get(key) is not None:
      hf[key] = generation[key]
  try:
    return hf_names.config_from_hf(hf, hf_quantized.METHODS)
  except ValueError as error:
    raise ValueError(f'{folder / CONFIG}: {error}') from error


def _read_generation(path):
  """The contents of generation_config.json; nothing where it is absent or empty."""
  return read_json(path) if path.is_file() and path.read_bytes().strip() else {}


def load_tensors(
  config: ModelConfig,
  stored: Mapping[str, Tensor],
  dtype=None,
  names: Family | None = None,
  *,
  say: Say = LOG.warning,
) -> Transformer:
  """Builds the model from the tensors of a checkpoint, as `load_pretrained` describes.

  `names` has the names of the tensors; by default they are those of the config's family.
  """
  family = names or hf_names.find(config.family)
  kept, dropped = hf_names.select_tensors(family, config, stored)
  layout = hf_names.layout_of(family, kept)
  model = transformer.abstract(config, jnp.float32 if dtype is None else dtype)
  coded.give_formats(model, layout)
  forms, fields = native.flatten(model)
  shapes = {path: tuple(form.shape) for path, form in forms.items()}
  entries = hf_names.entries(family, config, shapes, layout)
  idle = kept_codes.idle_biases(entries, kept)
  kept = {name: t for name, t in kept_codes.oriented(entries, kept).items() if name not in idle}
  _check_tensors(entries, kept)
  weights, widened = kept_codes.keep(entries, kept, dtype)
  _say(kept, [*dropped, *idle], widened, say)
  others = [entry for entry in entries if not weights.keys() & set(entry.ours)]
  arrays = _read_arrays(others, kept, forms, dtype)
  for path, param in transformer.parameters(model).items():
    own = weights.get(path)
    param.set_value(native.build(fields[path], path, arrays.pop) if own is None else own)
  return model


def _read_arrays(entries, stored, forms, dtype) -> dict[str, jax.Array]:
  """The arrays of a model by path; `forms` has their shapes, and the dtypes of what is raw.

  Raises ValueError, naming the tensors, where numbers are not finite.
  """
  bad, arrays, experts = [], {}, {}  # path -> the matrices of its experts so far, in order
  for entry in entries:
    finite, raw = True, entry.codec.raw
    for path, part in zip(entry.ours, entry.split(_read(stored[entry.theirs]))):
      part = part.view(forms[path].dtype) if raw else part
      finite &= bool(np.isfinite(part).all())
      if entry.expert is not None:
        experts.setdefault(path, []).append(part)
        if len(experts[path]) < forms[path].shape[0]:
          continue
        part = np.stack(experts.pop(path))
      # A copy: an array that shares the mapped file would change or die with it.
      arrays[path] = jnp.array(part, None if raw else dtype, copy=True)
    if not finite:
      bad.append(f'{entry.theirs} {entry.shape}')
  _raise_listed('the checkpoint has NaN or infinity in', bad)
  return arrays


def _read(tensor: Tensor) -> np.ndarray:
  if tensor.dtype != np.float64:
    return tensor.read()
  with np.errstate(over='ignore'):  # the infinity is reported
    return tensor.read().astype(np.float32)


def _say(kept, dropped, widened, say):
  """Says which tensors are not loaded as they are stored, a line for each kind."""
  if dropped:
    say(f'tensors that are no weights of the model are left out: {_patterns(dropped)}')
  wide = [name for name, tensor in kept.items() if tensor.dtype == np.float64]
  if wide:
    names = 'all of them' if len(wide) == len(kept) else _patterns(wide)
    say(f'tensors of float64 are rounded to float32: {names}')
  for reason, count in widened.items():
    say(f'{count} quantized matrices are widened to floating point: {reason}')


def _patterns(names: list[str]) -> str:
  """Names in one line; those that differ in the layer's number alone are named once and counted."""
  counts = Counter(re.sub(r'(?<=\.)\d+(?=\.)', '*', name) for name in names)
  shown = [name if n == 1 else f'{name} ({n})' for name, n in counts.items()]
  return ', '.join(shown[:MAX_LISTED] + (['...'] if len(shown) > MAX_LISTED else []))


def _check_tensors(entries: list[Entry], stored: Mapping[str, Tensor]) -> None:
  expected = {entry.theirs: entry.shape for entry in entries}
  dtypes = {e.theirs: BYTES if e.codec.raw else hf_names.FLOATS for e in entries}
  problems = [f'missing: {name} {shape}' for name, shape in expected.items() if name not in stored]
  for name, tensor in stored.items():
    if name not in expected:
      problems.append(f'unexpected: {name} {tensor.shape}')
    elif tensor.shape != expected[name]:
      problems.append(f'misshapen: {name} is {tensor.shape}, not {expected[name]}')
    elif tensor.dtype not in dtypes[name]:
      problems.append(f'unsupported dtype: {name} is {tensor.dtype}')
  _raise_listed('the tensors are not those that the config describes', problems)


def _raise_listed(what, problems):
  if problems:
    more = len(problems) - MAX_LISTED
    lines = problems[:MAX_LISTED] + ([f'and {more} more'] if more > 0 else [])
    raise ValueError(f'{what} ({len(problems)}):\n  ' + '\n  '.join(lines))


def save_pretrained(
  model: Transformer,
  tokenizer: Tokenizer | None,
  path: str | Path,
  *,
  recipe: dict | None = None,
  max_shard_bytes: int = hf_folder.SHARD_BYTES,
) -> None:
  """Writes a folder that `load_pretrained` can load.

  transformers can load it too if all weights are plain arrays and config.json can describe the
  model. Other models are written as `model.native` describes, with the recipe that made them; a
  warning is logged if config.json is the only reason, as for layers of different widths.
  The folder appears whole or not at all; an earlier output is replaced.

  Raises:
    ValueError: the folder holds something else; the tokenizer has more tokens than the model; the
      family is unknown.
  """
  hf_folder.check(path, model.config, tokenizer)
  config, layout = _describe(model)
  tensors = native.tensors(model) if layout is None else _in_layout(model, layout)
  others = {native.MANIFEST: native.manifest(model, recipe)} if layout is None else {}
  hf_folder.write(path, config, tensors, tokenizer, others=others, max_shard_bytes=max_shard_bytes)


def _describe(model) -> tuple[dict, Layout | None]:
  """The contents of config.json, and the layout in which they and the tensors are the whole model.

  None: there is none.
  """
  layout = _layout(model)
  config = hf_names.shared_to_hf(model.config)
  try:
    config = hf_names.config_to_hf(model.config)
  except ValueError as error:
    if layout is not None:
      LOG.warning('saved in the format of Lissom, which transformers does not read: %s', error)
    layout = None
  dtypes = hf_folder.dtypes(model.embedding.table.get_value().dtype)
  return {**config, **dtypes, **(native.HF_MARK if layout is None else layout.keys)}, layout


def _layout(model: Transformer) -> Layout | None:
  """The first layout of the family that stores each weight in the type that it has, or None."""
  layouts = hf_names.find(model.config.family).layouts
  return next((layout for layout in layouts if coded.holds(layout, model)), None)


def to_tensors(model: Transformer) -> dict[str, Tensor]:
  """The model under the names of its family, each tensor made when it is read.

  Raises ValueError if the family stores a weight in another type than the model has.
  """
  layout = _layout(model)
  if layout is None:
    parameters = transformer.parameters(model).items()
    weights = {path: type(param.get_value()) for path, param in parameters}
    packed = [f'{p}: {kind.__name__}' for p, kind in weights.items() if issubclass(kind, Weight)]
    _raise_listed('config.json has no way to describe these compressed weights', packed)
  return _in_layout(model, layout)


def _in_layout(model: Transformer, layout: Layout) -> dict[str, Tensor]:
  arrays, _ = native.flatten(model)
  shapes = {path: array.shape for path, array in arrays.items()}
  family = hf_names.find(model.config.family)
  entries = hf_names.entries(family, model.config, shapes, layout)
  return {entry.theirs: _joined(entry, arrays) for entry in entries}


def _joined(entry: Entry, arrays: Mapping[str, jax.Array]) -> Tensor:
  parts = [arrays[path] for path in entry.ours]
  dtype = np.dtype(jnp.result_type(*parts))

  def read():
    own = parts if entry.expert is None else [part[entry.expert] for part in parts]
    return entry.join([np.asarray(part).astype(dtype, copy=False) for part in own])

  return Tensor(entry.shape, BYTES[0] if entry.codec.raw else dtype, read)
