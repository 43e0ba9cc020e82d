r"""Measures the prefill and decode speed of llama.cpp.

  python -m experiments.peers.llama_cpp_speed --formats=f16,q8_0,q4_0
  python -m experiments.peers.llama_cpp_speed --model=model.gguf
  python -m experiments.peers.llama_cpp_speed --preset=olmoe-1b-7b --layers=4
  python -m experiments.peers.llama_cpp_speed --model=model.gguf --formats=q8_0 --prompt=16384 \
      --read=1024 --kv_cache=q8_0

The model has random weights in the shape of a preset of the Llama family or of OLMoE and is written
as a GGUF file in float16, or it is a GGUF file. It is converted by llama.cpp itself, and run on all
cores. One JSON line per format has the tokens per second of the prefill (median of --prefills, the
last token's logits only) and of decoding after it at batch 1 (median of the steps). A quantized
cache needs llama.cpp's flash attention. With --read the beginning of the prompt is read, and copies
of its keys and values fill the cache up to --prompt tokens: the speed of decoding depends on their
number alone, and a long prompt takes llama.cpp minutes.

Device: CPU. Minutes: 1 on two cores. Needs the packages llama-cpp-python and gguf. llama.cpp should
be compiled for the machine at hand: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf
"""

import ctypes
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from experiments import common, shapes
from model.config import ModelConfig
from model.layers.routed import RoutedConfig
from model.layers.sublayer import FfnConfig

FILE_TYPES = {'f16': 1, 'q8_0': 7, 'q4_0': 2}  # llama.cpp's numbers
CACHES = {'f16': 1, 'q8_0': 8, 'q4_0': 2}  # and of its tensors
BATCH = 2048  # tokens that are read at once, at most
BYTE_TOKENS = 256
SPECIAL_TOKENS = (b'<unk>', b'<s>', b'</s>')
ARCHITECTURES = ('llama', 'olmoe')
FLOAT32 = 'ffn_gate_inp.weight'  # routers stay in float32, as in files that llama.cpp converts

FORMATS = flags.DEFINE_list('formats', list(FILE_TYPES), f'Of {", ".join(FILE_TYPES)}.')
PROMPT = flags.DEFINE_integer('prompt', 512, 'Tokens of the prompt.', lower_bound=1)
READ = flags.DEFINE_integer(
  'read', None, 'Tokens that are read; copies fill the prompt. Default: all.', lower_bound=1
)
TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens to decode.', lower_bound=1)
MODEL = flags.DEFINE_string('model', None, 'A .gguf file, instead of a preset.')
FLASH = flags.DEFINE_bool('flash_attention', False, 'Attention without its scores.')
SHAPE = shapes.define()
PREFILLS = flags.DEFINE_integer('prefills', 3, 'How often the prompt is timed.', lower_bound=1)
KV_CACHE = flags.DEFINE_enum('kv_cache', 'f16', list(CACHES), 'Type of keys and values.')


def main() -> None:
  for name in FORMATS.value:
    if name not in FILE_TYPES:
      raise ValueError(f'--formats has {name!r}, which is not one of {", ".join(FILE_TYPES)}')
  if READ.value and PROMPT.value % READ.value:
    raise ValueError(f'--prompt={PROMPT.value} is no multiple of --read={READ.value}')
  if MODEL.value and not pathlib.Path(MODEL.value).is_file():
    raise ValueError(f'there is no file {MODEL.value}')
  with tempfile.TemporaryDirectory() as folder:
    source = MODEL.value or _write(shapes.config(SHAPE), pathlib.Path(folder, 'source.gguf'))
    for name in FORMATS.value:
      path = _converted(source, name, pathlib.Path(folder, f'{name}.gguf'))
      print(json.dumps(_time(path, name)), flush=True)
      path.unlink()


def _architecture(config: ModelConfig) -> str:
  """The name of a config's architecture in GGUF files. Raises ValueError for any other."""
  if config.family not in ARCHITECTURES or len(set(config.layers)) != 1:
    raise ValueError(f'--preset {SHAPE["preset"].value!r} is neither a plain Llama nor an OLMoE')
  least = BYTE_TOKENS + len(SPECIAL_TOKENS) + 1
  if config.vocab_size < least:
    raise ValueError(f'the vocabulary needs at least {least} tokens, not {config.vocab_size}')
  return config.family


def _write(config: ModelConfig, path: pathlib.Path) -> pathlib.Path:
  import gguf  # not a dependency of the rest

  layer, rng = config.layers[0], np.random.default_rng(0)
  writer = gguf.GGUFWriter(str(path), _architecture(config))
  writer.add_context_length(PROMPT.value + TOKENS.value)
  writer.add_embedding_length(config.width)
  writer.add_block_count(len(config.layers))
  writer.add_feed_forward_length(layer.ffn.width)
  writer.add_head_count(layer.mixer.query_heads)
  writer.add_head_count_kv(layer.mixer.kv_heads)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_dimension_count(layer.mixer.head_width)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_vocab_size(config.vocab_size)
  writer.add_file_type(FILE_TYPES['f16'])
  if config.family == 'olmoe':
    writer.add_expert_count(layer.ffn.experts)
    writer.add_expert_used_count(layer.ffn.router.choices)
  _add_tokens(writer, config.vocab_size)
  for name, shape in tensors(config).items():
    values = 0.02 * rng.standard_normal(shape, np.float32)
    if len(shape) == 1:
      values += 1
    elif not name.endswith(FLOAT32):
      values = values.astype(np.float16)
    writer.add_tensor(name, values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add_tokens(writer, vocab_size: int) -> None:
  """Adds a placeholder vocabulary: special tokens, bytes, and numbered words."""
  words = vocab_size - BYTE_TOKENS - len(SPECIAL_TOKENS)
  as_bytes = [f'<0x{i:02X}>'.encode() for i in range(BYTE_TOKENS)]
  writer.add_tokenizer_model('llama')
  writer.add_token_list([*SPECIAL_TOKENS, *as_bytes, *(f't{i}'.encode() for i in range(words))])
  writer.add_token_scores([0.0] * vocab_size)
  writer.add_token_types([2, 3, 3] + [6] * BYTE_TOKENS + [1] * words)


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the names and shapes, ([experts,] outputs, inputs), of the tensors in the GGUF file."""
  found = {
    'token_embd.weight': (config.vocab_size, config.width),
    'output_norm.weight': (config.width,),
  }
  if not config.tied:
    found['output.weight'] = (config.vocab_size, config.width)
  for i, layer in enumerate(config.layers):
    heads = layer.mixer
    queries, keys = heads.query_heads * heads.head_width, heads.kv_heads * heads.head_width
    block = {
      'attn_norm': (config.width,),
      'ffn_norm': (config.width,),
      'attn_q': (queries, config.width),
      'attn_k': (keys, config.width),
      'attn_v': (keys, config.width),
      'attn_output': (config.width, queries),
      **_feed_forward(config.width, layer.ffn),
    }
    if heads.qk_norm:
      block |= {'attn_q_norm': (queries,), 'attn_k_norm': (keys,)}
    found |= {f'blk.{i}.{name}.weight': shape for name, shape in block.items()}
  return found


def _feed_forward(width: int, ffn: FfnConfig) -> dict[str, tuple[int, ...]]:
  inner, outer = (ffn.width, width), (width, ffn.width)
  if not isinstance(ffn, RoutedConfig):
    return {'ffn_gate': inner, 'ffn_up': inner, 'ffn_down': outer}
  return {
    'ffn_gate_inp': (ffn.experts, width),
    'ffn_gate_exps': (ffn.experts, *inner),
    'ffn_up_exps': (ffn.experts, *inner),
    'ffn_down_exps': (ffn.experts, *outer),
  }


def _converted(source: str | pathlib.Path, name: str, target: pathlib.Path) -> pathlib.Path:
  import llama_cpp  # not a dependency of the rest

  params = llama_cpp.llama_model_quantize_default_params()
  params.ftype, params.nthread = FILE_TYPES[name], os.cpu_count()
  params.allow_requantize = True
  if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
    raise ValueError(f'llama.cpp could not convert {source} to {name}')
  return target


def _time(path: pathlib.Path, name: str) -> dict:
  read = READ.value or PROMPT.value
  context = _Context(path, read)
  first = BYTE_TOKENS + len(SPECIAL_TOKENS)
  tokens = np.random.default_rng(0).integers(first, context.vocab_size, read).tolist()
  context.run(tokens[:512])
  prefills = []
  for _ in range(PREFILLS.value):
    context.clear()
    prefills.append(context.run(tokens))
  context.repeat(PROMPT.value // read)
  steps = [context.run([tokens[i % len(tokens)]]) for i in range(TOKENS.value)]
  return {
    'peer': 'llama.cpp',
    'weights': name,
    'kv_cache': KV_CACHE.value,
    'prompt': PROMPT.value,
    'read': read,
    'prefill_tokens_per_s': read / statistics.median(prefills),
    'decode_tokens_per_s': 1 / statistics.median(steps),
  }


class _Context:
  """A model of llama.cpp with one text in its cache, on all cores.

  A second sequence is there for copies: what it holds has to be removed before the next.
  """

  def __init__(self, path: pathlib.Path, read: int):
    import llama_cpp

    self.api, threads = llama_cpp, os.cpu_count()
    self.batch = min(read, BATCH)
    # The wrapper's own context is small; it sets up the parameters of the one that is used.
    self.model = llama_cpp.Llama(
      str(path),
      n_ctx=self.batch,
      n_batch=self.batch,
      type_k=CACHES[KV_CACHE.value],
      type_v=CACHES[KV_CACHE.value],
      flash_attn=FLASH.value or KV_CACHE.value != 'f16',
      n_threads=threads,
      n_threads_batch=threads,
      verbose=False,
    )
    params = self.model.context_params
    params.n_ctx = PROMPT.value + read + TOKENS.value
    params.n_seq_max, params.kv_unified = 2, True
    self.context = llama_cpp.llama_init_from_model(self.model._model.model, params)
    self.memory = llama_cpp.llama_get_memory(self.context)
    self.vocab_size = self.model.n_vocab()

  def run(self, tokens: Sequence[int]) -> float:
    """Reads tokens after those that are in the cache. Returns the seconds."""
    start = time.perf_counter()
    for i in range(0, len(tokens), self.batch):
      part = tokens[i : i + self.batch]
      ids = (self.api.llama_token * len(part))(*part)  # has to outlive the batch
      if self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(part))):
        raise ValueError(f'llama.cpp could not read {len(part)} tokens')
    self.api.llama_synchronize(self.context)
    return time.perf_counter() - start

  def clear(self) -> None:
    self.api.llama_memory_clear(self.memory, True)

  def repeat(self, times: int) -> None:
    """Fills the cache with copies of what is in it, each at the positions after the last."""
    size = self.api.llama_state_seq_get_size(self.context, 0)
    state = (ctypes.c_uint8 * size)()
    length = 1 + self.api.llama_memory_seq_pos_max(self.memory, 0)
    if self.api.llama_state_seq_get_data(self.context, state, size, 0) != size:
      raise ValueError('llama.cpp could not copy its cache')
    for i in range(1, times):
      if not self.api.llama_state_seq_set_data(self.context, state, size, 1):
        raise ValueError(f'llama.cpp has no room for {times} copies of its cache')
      self.api.llama_memory_seq_add(self.memory, 1, -1, -1, i * length)
      self.api.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
      self.api.llama_memory_seq_rm(self.memory, 1, -1, -1)


if __name__ == '__main__':
  common.run(main)
