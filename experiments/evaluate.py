r"""Measures the perplexity of a model on a text, and how far it is from its base.

  python -m experiments.evaluate --model=DIR --text=FILE --seq_len=512
  python -m experiments.evaluate --model=DIR --text=FILE --seq_len=512 --base=DIR --json
  python -m experiments.evaluate --model=DIR --text=FILE --seq_len=512 --kv_cache=int8
  python -m experiments.evaluate --model=DIR --text=FILE --seq_len=512 --widened

The model is a Hugging Face folder or hub id, or a folder that `experiments.compress` saved.
Protocol: the text is tokenized once and cut into consecutive windows of seq_len tokens; the last,
shorter one is dropped. In each window every token but the first is predicted. With --bos=window the
first token of each window is the BOS, which is what Gemma needs and gets by default; with
--bos=none all tokens are text, which is the default of the other families. ppl = exp(sum NLL /
tokens). Sums and the model's arithmetic are in float32 unless --dtype says otherwise. --kv_cache
feeds each window through a cache of that format in pieces of 32 tokens, as generation would; the
base of --base runs without one, so that with --base=DIR of the same model KL and flips are those of
the cache.

Weights are multiplied as in generation, by the fast products of this device, which may round
activations; with --widened they are widened to floating point first.

Device: any. Minutes: below 1 for a small model on two CPU cores.
"""

import json
import math

from absl import flags

from experiments import base as embedded
from experiments import common
from model import corpus, hf, sharding
from model.eval import cost, perplexity, routing
from model.infer.prepare import prepare
from model.tokenizer import window_bos
from model.transformer import parameters

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to measure.')
TEXT = flags.DEFINE_string(
  'text',
  None,
  'Text to measure on, a file or a folder: text, JSON lines or arrays, or .gz of these.',
)
BASE = flags.DEFINE_string('base', None, 'Model to compare with: adds KL divergence and flip rate.')
SEQ_LEN = flags.DEFINE_integer('seq_len', 512, 'Tokens per window.', lower_bound=2)
MAX_WINDOWS = flags.DEFINE_integer(
  'max_windows', 0, 'Only the first so many windows; 0: all.', lower_bound=0
)
DTYPE = common.define_dtype()
JSON = flags.DEFINE_bool('json', False, 'Print one JSON line instead of words.')
SMOKE = flags.DEFINE_bool('smoke', False, 'Measure the tiny base model on a little text.')
KV_CACHE = common.define_kv_cache(
  None, 'Read keys and values from such a cache; without it there is none.'
)
WIDENED = flags.DEFINE_bool(
  'widened', False, 'Multiply by weights widened to floating point, not by the fast products.'
)
BOS = common.define_bos()
MESH = common.define_mesh()
PLUGINS = common.define_plugins()


def main() -> None:
  common.load_plugins(PLUGINS.value)
  model, tokenizer, text = _inputs()
  tokens_T, ends_T = tokenizer.encode_with_bytes(text)
  bos_id = window_bos(tokenizer, model.config, BOS.value)
  limit = MAX_WINDOWS.value or None
  windows = perplexity.windows(tokens_T, ends_T, SEQ_LEN.value, limit, bos_id)
  sharding.shard(model, common.mesh(MESH))
  base = hf.load_pretrained(BASE.value, common.dtype(DTYPE))[0] if BASE.value else None
  if base is not None and base.config.vocab_size != model.config.vocab_size:
    raise ValueError(
      f'--base has a vocabulary of {base.config.vocab_size}, --model one of '
      f'{model.config.vocab_size}; only models with the same tokens can be compared'
    )
  quality = perplexity.evaluate(
    _ready(model),
    windows,
    base=None if base is None else _ready(base),
    cache_format=KV_CACHE.value,
    progress=common.labelled('evaluate'),
  )
  changed = None if base is None else _changed(model, base, windows)
  print(json.dumps(_result(model, quality, changed)) if JSON.value else _words(quality, changed))


def _changed(model, base, windows) -> float | None:
  """The share of tokens whose experts are not those of the base, if both have experts."""
  ready = _ready(model), _ready(base)
  own, others = (routing.chosen(one, windows) for one in ready)
  return routing.changed_share(ready[0], own, ready[1], others)


def _ready(model):
  return model if WIDENED.value else prepare(model)


def _inputs():
  if SMOKE.value and MODEL.value is None:
    trained = embedded.load_or_train(common.cache_folder(), smoke=True)
    return trained.model, trained.tokenizer, ''.join(trained.texts.held_out)[:40_000]
  if MODEL.value is None or TEXT.value is None:
    raise ValueError('evaluate needs --model and --text (or --smoke)')
  text = '\n'.join(corpus.documents(TEXT.value))
  model, tokenizer = common.load_model(MODEL.value, common.dtype(DTYPE))
  return model, tokenizer, text


def _result(model, quality, changed: float | None) -> dict:
  result = {
    'model': MODEL.value,
    'text': TEXT.value,
    'ppl': quality.ppl if math.isfinite(quality.ppl) else None,
    'bits_per_byte': quality.bits_per_byte,
    'nll_sum': quality.nll_sum,
    'tokens': quality.tokens,
    'seq_len': quality.seq_len,
    'bos': quality.bos,
    'activations': str(model.dtype),
    'widened': WIDENED.value,
    'stored_bytes': sum(p.get_value().nbytes for p in parameters(model).values()),
  }
  if KV_CACHE.value is not None:
    result |= {
      'kv_cache': KV_CACHE.value,
      'kv_cache_bytes': cost.kv_cache_bytes(
        model.config, quality.seq_len, model.dtype, KV_CACHE.value
      ),
    }
  if quality.kl_to_base is not None:
    result |= {'kl_to_base': quality.kl_to_base, 'flip_rate': quality.flip_rate}
  return result if changed is None else {**result, 'experts_changed': changed}


def _words(quality, changed: float | None) -> str:
  lines = [
    f'perplexity    {quality.ppl:.4f}',
    f'bits per byte {quality.bits_per_byte:.4f}',
    f'NLL           {quality.nll_sum:.2f} nats over {quality.tokens} predicted tokens, '
    f'windows of {quality.seq_len}' + (' that begin with a BOS' if quality.bos == 'window' else ''),
  ]
  if quality.kl_to_base is not None:
    lines.append(f'KL to base    {quality.kl_to_base:.6f} nats per token')
    lines.append(f'flip rate     {quality.flip_rate:.2%}')
  if changed is not None:
    lines.append(f'other experts {changed:.2%} of the tokens')
  return '\n'.join(lines)


if __name__ == '__main__':
  common.run(main)
