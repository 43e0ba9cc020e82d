"""Times transformers' generate on a batch of prompts: one JSON line a dtype.

  python experiments/peers/measure_transformers_batch.py MODEL.gguf [rows] [prompt] [new]

The prompts are random tokens of one length, so nothing is padded; every row gets all new tokens.
"""

import json
import os
import sys
import time

import torch
import transformers


def main(path: str, rows: int = 32, prompt: int = 128, new: int = 128) -> None:
  torch.set_num_threads(os.cpu_count())
  folder, file = os.path.split(os.path.abspath(path))
  for dtype in (torch.float32, torch.bfloat16):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    tokens = torch.randint(5, 40_000, (rows, prompt))
    options = {'do_sample': False, 'min_new_tokens': new, 'max_new_tokens': new}
    model.generate(tokens, **{**options, 'min_new_tokens': 2, 'max_new_tokens': 2})
    times = []
    for _ in range(2):
      start = time.perf_counter()
      model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
      times.append(time.perf_counter() - start)
    found = {'dtype': str(dtype), 'rows': rows, 'output_tokens_per_s': rows * new / min(times)}
    print(json.dumps(found), flush=True)


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:]))
