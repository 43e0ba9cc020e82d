r"""Measures the prefill and decode speed of Hugging Face transformers.

  python -m experiments.peers.transformers_speed --dtypes=float32,bfloat16
  python -m experiments.peers.transformers_speed --model=model.gguf

The model has random weights in the shape of a preset, or is a checkpoint. It runs in torch's eager
mode, on all cores or on one GPU (--device=cuda). The prefill computes the logits of all prompt
tokens, as the forward pass does by default. One JSON line per dtype has the tokens per second of
the prefill (median of 3) and of decoding at batch 1 (median of the steps).

Device: CPU, or with --device any that torch has. Minutes: 1 on two cores. Needs the extra `test`,
for torch and transformers.
"""

import inspect
import json
import pathlib
import statistics
import time

from absl import flags

from experiments import common, shapes
from model.hf_names import config_to_hf

DTYPES = flags.DEFINE_list('dtypes', ['float32'], 'Of float32, bfloat16 and float16.')
PROMPT = flags.DEFINE_integer('prompt', 512, 'Tokens of the prompt.', lower_bound=1)
TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens to decode.', lower_bound=1)
DEVICE = flags.DEFINE_string('device', 'cpu', 'The device that torch runs on.')
MODEL = flags.DEFINE_string('model', None, 'A folder or .gguf file, instead of a preset.')
SHAPE = shapes.define()
PREFILLS = 3


def main() -> None:
  import torch  # not a dependency of the rest

  for name in DTYPES.value:
    torch.manual_seed(0)
    with torch.device(DEVICE.value):
      model = _model().to(device=DEVICE.value, dtype=getattr(torch, name)).eval()
      tokens = torch.randint(0, model.config.vocab_size, (1, PROMPT.value))
    with torch.inference_mode():
      prefill_s, cache = _prefill(model, tokens)
      decode_s = _decode(model, tokens[:, -1:], cache)
    line = {
      'peer': 'transformers',
      'weights': name,
      'prefill_tokens_per_s': PROMPT.value / prefill_s,
      'decode_tokens_per_s': 1 / decode_s,
    }
    print(json.dumps(line), flush=True)


def _model():
  import transformers

  factory = transformers.AutoModelForCausalLM
  if MODEL.value is None:
    hf = config_to_hf(shapes.config(SHAPE))
    return factory.from_config(transformers.AutoConfig.for_model(**hf))
  path = pathlib.Path(MODEL.value)
  if path.suffix == '.gguf':
    return factory.from_pretrained(path.parent, gguf_file=path.name)
  return factory.from_pretrained(path)


def _prefill(model, tokens):
  model(tokens)
  times = []
  for _ in range(PREFILLS):
    start = time.perf_counter()
    out = model(tokens, use_cache=True)
    _finish()
    times.append(time.perf_counter() - start)
  return statistics.median(times), out[_cache_name(model)]


def _decode(model, token, cache):
  times = []
  for _ in range(TOKENS.value):
    start = time.perf_counter()
    out = model(token, use_cache=True, **{_cache_name(model): cache})
    token = out.logits[:, -1:].argmax(-1)
    _finish()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def _finish() -> None:
  """Waits for the device, which runs behind Python."""
  import torch

  if torch.device(DEVICE.value).type == 'cuda':
    torch.cuda.synchronize()


def _cache_name(model) -> str:
  # transformers 5.24 renamed the argument.
  named = 'cache' in inspect.signature(model.forward).parameters
  return 'cache' if named else 'past_key_values'


if __name__ == '__main__':
  common.run(main)
