r"""Compresses a checkpoint with llm-compressor, in a virtual environment of its own.

  pip install torch==2.13.0 llmcompressor
  python experiments/peers/llm_compressor.py WORK

`experiments.compare_llm_compressor` prepares the folder WORK and calls this script. WORK holds
`model` (a Hugging Face folder), `calibration.npy` and `held_out.npy` (token ids [rows, length]) and
`settings.json`. The script runs one setting. It writes `peer.safetensors` with the matrices that
are multiplied (quantized and widened again) and the scales of the norms, which AWQ changes, and
`peer.json` with the seconds of the `oneshot` call, the processor's seconds of all its threads, and
the perplexity computed by torch.

It imports nothing from this project, because JAX need not be installed in that environment.
"""

import json
import math
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file

EVALUATION_ROWS = 8
# What changes the weights before they are rounded, and what rounds them.
ROUNDING = {
  'rtn': (list, QuantizationModifier),
  'gptq': (list, GPTQModifier),
  'awq': (lambda: [AWQModifier()], QuantizationModifier),
}


def main() -> None:
  work = pathlib.Path(sys.argv[1])
  setting = json.loads((work / 'settings.json').read_text())
  dtype = getattr(torch, setting['dtype'])
  model = transformers.AutoModelForCausalLM.from_pretrained(work / 'model', dtype=dtype)
  tokens_BT = np.load(work / 'calibration.npy').astype(np.int64)
  if not torch.accelerator.is_available():
    # llm-compressor 0.14 pins what AWQ keeps for transfers to an accelerator; torch refuses to.
    IntermediatesCache.pin_memory = lambda *args: None
  rows = [{'input_ids': row, 'attention_mask': [1] * len(row)} for row in tokens_BT.tolist()]
  start, processor_start = time.perf_counter(), time.process_time()
  oneshot(
    model=model,
    dataset=Dataset.from_list(rows),
    recipe=_modifiers(setting),
    num_calibration_samples=len(rows),
    max_seq_length=tokens_BT.shape[1],
    shuffle_calibration_samples=False,
    batch_size=setting['batch'],
  )
  times = {
    'seconds': time.perf_counter() - start,
    'processor_seconds': time.process_time() - processor_start,
  }
  ppl = _perplexity(model, np.load(work / 'held_out.npy').astype(np.int64))
  linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
  names = [n for n in linears if n != 'lm_head']  # no setting compresses the head
  weights = {f'{n}.weight': _as_multiplied(model.get_submodule(n)) for n in names}
  norms = {n: p.detach().clone() for n, p in model.named_parameters() if 'norm' in n}
  save_file(weights | norms, work / 'peer.safetensors')
  (work / 'peer.json').write_text(json.dumps({**times, 'torch_ppl': ppl}))


@torch.inference_mode()
def _as_multiplied(linear) -> torch.Tensor:
  """The matrix of a layer as its forward pass rounds it; rounding to nearest keeps it as it was."""
  scheme, weight = getattr(linear, 'quantization_scheme', None), linear.weight
  if scheme is not None:
    weight = forward_quantize(linear, weight, 'weight', scheme.weights)
  return weight.detach().clone().contiguous()


def _modifiers(setting):
  if setting['method'] in ROUNDING:
    group = setting['group_size']
    weights = QuantizationArgs(
      num_bits=setting['bits'],
      type='int',
      symmetric=setting['symmetric'],
      strategy='channel' if group == -1 else 'group',
      group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=['Linear'], weights=weights)
    before, rounding = ROUNDING[setting['method']]
    return [*before(), rounding(config_groups={'group_0': scheme}, ignore=['lm_head'])]
  kind = {'sparsegpt': SparseGPTModifier, 'wanda': WandaPruningModifier}[setting['method']]
  structure = setting['structure']
  return [kind(sparsity=0.5, mask_structure=structure, targets=['Linear'], ignore=['re:.*lm_head'])]


@torch.inference_mode()
def _perplexity(model, tokens_BT) -> float:
  model = model.float().eval()
  total, count = 0.0, 0
  for i in range(0, len(tokens_BT), EVALUATION_ROWS):
    tokens = torch.from_numpy(tokens_BT[i : i + EVALUATION_ROWS])
    logits = model(tokens).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    total, count = total + float(nll) * tokens[:, 1:].numel(), count + tokens[:, 1:].numel()
  return math.exp(total / count)


if __name__ == '__main__':
  main()
