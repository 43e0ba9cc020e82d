r"""Makes the same updates with torch: transformers' model, peft's adapters, bitsandbytes' NF4.

  pip install torch transformers peft bitsandbytes
  echo '{"method": "lora", ...}' | python experiments/peers/torch_training.py

`experiments.benchmark_training` starts this script and asks for rounds; experiments/children.py
says how they talk, and experiments/training_updates.py what the fields of a job mean. `hf_config`
is a config.json, for a model with random weights; `modes` are eager, compiled or both.

Both sides minimize the mean cross entropy of all tokens but the first of each row, of the same
rows, with AdamW and gradients clipped to a norm of 1. What is trained is float32. With bfloat16
activations the forward pass runs under autocast. The optimizer is fused, and attention is torch's
`scaled_dot_product_attention`, which needs no mask here.

It imports nothing from this project, because JAX need not be installed in that environment.

Device: a CUDA GPU if torch finds one, else the CPU.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers

METHODS = ('full', 'lora', 'dora', 'qlora')
WARMUP = 3  # updates of each mode
BETAS = (0.9, 0.95)
PROCESS = pathlib.Path('/proc/self')


class Unavailable(Exception):
  """These updates cannot be made in this environment; the message says why."""


class Training:
  """A model, its optimizer and a batch; `update` makes one update."""

  def __init__(self, job: dict, device: str):
    torch.manual_seed(job['seed'])
    self.model = _model(job, device).train()
    self.parameters = [p for p in self.model.parameters() if p.requires_grad]
    decayed = [p for p in self.parameters if p.ndim >= 2]
    others = [p for p in self.parameters if p.ndim < 2]
    groups = [{'params': decayed}, {'params': others, 'weight_decay': 0.0}]
    self.optimizer = torch.optim.AdamW(
      [group for group in groups if group['params']],
      lr=job['learning_rate'],
      betas=BETAS,
      weight_decay=job['weight_decay'],
      fused=True,
    )
    rng = np.random.default_rng(job['seed'])
    shape = (job['batch_size'], job['seq_len'])
    vocab_size = self.model.config.vocab_size
    self.tokens = torch.from_numpy(rng.integers(0, vocab_size, shape, np.int64)).to(device)
    self.forwards = {'eager': self.model, 'compiled': torch.compile(self.model, dynamic=False)}
    half = job['dtype'] == 'bfloat16'
    self.casting = lambda: (
      torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
    )

  def update(self, mode: str) -> torch.Tensor:
    """Makes one update; returns the loss before it."""
    self.optimizer.zero_grad(set_to_none=True)
    with self.casting():
      # The model shifts the labels: position t predicts token t + 1.
      loss = self.forwards[mode](input_ids=self.tokens, labels=self.tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
    self.optimizer.step()
    return loss.detach()


class Memory:
  """The most memory that was held since `reset`: of the GPU, else of this process."""

  def __init__(self, device: str):
    self.on_gpu = device == 'cuda'
    torch.ones(1, device=device) + 1  # the runtime has started
    self.reset()
    self.before = 0 if self.on_gpu else _resident_peak()

  def reset(self) -> None:
    if self.on_gpu:
      torch.cuda.reset_peak_memory_stats()
    elif (PROCESS / 'clear_refs').exists():
      (PROCESS / 'clear_refs').write_text('5')

  def peak(self) -> dict[str, int]:
    if self.on_gpu:
      return {'device_peak_bytes': torch.cuda.max_memory_allocated()}
    peak = _resident_peak()
    return {'resident_growth_bytes': peak - self.before} if peak else {}


def main() -> None:
  job = json.loads(sys.stdin.readline())
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does for float32 on a GPU
  memory = Memory(device)
  try:
    training = Training(job, device)
  except Unavailable as error:
    _say({'unavailable': str(error)})
    return
  modes, missing = {}, {}
  for mode in job['modes']:
    try:
      modes[mode] = _warm_up(training, mode)
    except Exception as error:  # a compiler that is not installed, operations that it does not know
      if mode == 'eager':
        raise
      missing[mode] = f'{type(error).__name__}: {error}'[:300]
  _say(
    {
      'device': device,
      'name': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
      'versions': _versions(),
      'modes': modes,
      'missing': missing,
      'trained_parameters': sum(p.numel() for p in training.parameters),
    }
  )
  for line in sys.stdin:
    _say(_round(training, memory, line.strip(), job['updates'], device))


def _warm_up(training: Training, mode: str) -> dict[str, float]:
  """Makes the first updates. The first one compiles, where the mode does; all end with a loss."""
  start = time.perf_counter()
  loss = training.update(mode).item()
  first_s = time.perf_counter() - start
  for _ in range(WARMUP - 1):
    training.update(mode).item()
  return {'first_update_s': first_s, 'loss': loss}


def _round(training: Training, memory: Memory, mode: str, updates: int, device: str) -> dict:
  memory.reset()
  _wait(device)
  start = time.perf_counter()
  for _ in range(updates):
    loss = training.update(mode)
  _wait(device)
  seconds = time.perf_counter() - start
  return {'seconds': seconds, 'loss': loss.item(), **memory.peak()}


def _model(job: dict, device: str) -> torch.nn.Module:
  """The model of a job, ready to be trained. Raises Unavailable."""
  method = job['method']
  if method not in METHODS:
    raise Unavailable(f'{method} has no counterpart here, only {", ".join(METHODS)}')
  if method != 'full' and importlib.util.find_spec('peft') is None:
    raise Unavailable(f'{method} needs peft, which is not installed')
  dtype = torch.float32 if method == 'full' else getattr(torch, job['param_dtype'])
  if method == 'qlora' and importlib.util.find_spec('bitsandbytes') is None:
    raise Unavailable('qlora needs bitsandbytes, which is not installed')
  model = _base(job, device, dtype)
  if method == 'qlora':
    _quantize(model, getattr(torch, job['dtype']), device)
  if job['remat'] != 'none':
    model.gradient_checkpointing_enable({'use_reentrant': False})
  return model if method == 'full' else _with_adapters(model, job)


def _base(job: dict, device: str, dtype: torch.dtype) -> torch.nn.Module:
  factory = transformers.AutoModelForCausalLM
  options = {'dtype': dtype, 'attn_implementation': 'sdpa', 'use_cache': False}
  if job['model'] is None:
    config = transformers.AutoConfig.for_model(**job['hf_config'])
    config.use_cache = options.pop('use_cache')
    for name, value in vars(config).items():
      if 'drop' in name and isinstance(value, float):
        setattr(config, name, 0.0)
    with torch.device(device):
      return factory.from_config(config, **options)
  path = pathlib.Path(job['model'])
  if path.suffix == '.gguf':
    return factory.from_pretrained(path.parent, gguf_file=path.name, **options).to(device)
  return factory.from_pretrained(path, **options).to(device)


def _quantize(model: torch.nn.Module, dtype: torch.dtype, device: str) -> None:
  """Puts NF4 with double quantization in the place of each matrix of the blocks, one by one."""
  import bitsandbytes

  head = model.get_output_embeddings()
  found = [
    (name, module)
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and module is not head
  ]
  for name, old in found:
    new = bitsandbytes.nn.Linear4bit(
      old.in_features,
      old.out_features,
      bias=old.bias is not None,
      compute_dtype=dtype,
      compress_statistics=True,
      quant_type='nf4',
      device='meta',
    )
    new.weight = bitsandbytes.nn.Params4bit(
      old.weight.data, requires_grad=False, compress_statistics=True, quant_type='nf4'
    )
    new.bias = old.bias
    parent, _, own = name.rpartition('.')
    setattr(model.get_submodule(parent), own, new.to(device))
  model.is_loaded_in_4bit = True  # peft looks here
  model.requires_grad_(False)


def _with_adapters(model: torch.nn.Module, job: dict) -> torch.nn.Module:
  import peft

  config = peft.LoraConfig(
    r=job['rank'],
    lora_alpha=job['alpha'],
    target_modules='all-linear',
    use_dora=job['method'] == 'dora',
    task_type='CAUSAL_LM',
  )
  return peft.get_peft_model(model, config)


def _wait(device: str) -> None:
  if device == 'cuda':
    torch.cuda.synchronize()


def _resident_peak() -> int | None:
  """The largest resident memory since the last reset, where Linux says it."""
  try:
    lines = (PROCESS / 'status').read_text().splitlines()
  except OSError:
    return None
  return next((1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM:')), None)


def _versions() -> dict[str, str]:
  found = {}
  for name in ('torch', 'transformers', 'peft', 'bitsandbytes'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def _say(answer: dict) -> None:
  print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
