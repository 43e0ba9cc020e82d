r"""Fine-tunes a model on a text or on chats: all of it, or adapters over what it is.

  python -m experiments.finetune --model=DIR --data=FILE --method=lora --rank=16 --out=out/tuned
  python -m experiments.finetune --model=DIR --data=FILE --method=qlora --out=out/tuned

Methods (docs/training.md says more):
  full    all parameters
  lora    low-rank adapters of all linear layers; rslora, dora and pissa are forms of it
  qlora   LoRA over the model in NF4 with double quantization; loftq starts with what NF4 lost
  qat     all parameters, of which the linear layers round to int4 in every product

Chats are JSON lines, {"messages": [{"role": "user", "content": "..."}, ...]}; the model's own
template renders them, and only the assistant's tokens are learned.

OUT/adapter is a PEFT folder, for the methods with adapters. OUT/model is the whole model: merged in
float32, or quantized for qat. OUT/run holds checkpoints and the loss of every update; a killed run
that is started again with the same flags resumes and ends with the same bits. OUT/records.jsonl
gets a line, OUT/loss.png the picture. Held-out documents of the data measure the loss before and
after, with --evaluate_every along the way too, and what merging and quantizing again cost.

Without --model, the small base model of `experiments.compress` is tuned on Python's documentation.

Device: any. Minutes: 1 without flags on two CPU cores, if the base model is kept.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from absl import flags

from experiments import common, methods, training
from experiments.methods import LORA_RATE, METHODS, Method, Ready
from model import adapters, hf, learned, peft
from model.eval import loss_figure, records
from model.files import check_replaceable
from model.peft_config import PeftConfig
from model.train import loop, memory, optimizer, run_folder
from model.train.loop import FitConfig
from model.train.partition import partition
from model.train.step import StepConfig
from model.transformer import Transformer, parameters

DEFAULTS = training.Settings(steps=200, seq_len=256, batch_size=8, learning_rate=LORA_RATE)
SMOKE_SETTINGS = training.Settings(steps=6, seq_len=32, batch_size=4, learning_rate=LORA_RATE)

MODEL = flags.DEFINE_string('model', None, 'Folder, hub id or .gguf file to tune.')
DATA = flags.DEFINE_string(
  'data',
  'python-docs',
  'What to learn: a text file, a folder, python-docs, python-source, or chats as JSON lines.',
)
METHOD = flags.DEFINE_enum('method', 'lora', list(METHODS), 'What is trained.')
RANK = flags.DEFINE_integer('rank', 16, 'Rank of the adapters.', lower_bound=1)
ALPHA = flags.DEFINE_float('alpha', 32.0, 'Adapters are scaled by alpha / rank.', lower_bound=0.0)
B_RATE = flags.DEFINE_float(
  'b_rate', 1.0, 'Learning rate of B in times that of A; LoRA+ has 16.', lower_bound=0.0
)
TARGETS = flags.DEFINE_list(
  'targets', ['layers.*'], 'Patterns of the linear layers that are adapted or quantized.'
)
FORMAT = flags.DEFINE_string('format', 'int4', 'What weights learn to be, for --method=qat.')
GROUP_SIZE = flags.DEFINE_integer('group_size', None, 'Inputs that share a scale, for qat.')
SMOKE = flags.DEFINE_bool('smoke', False, 'The tiny base model and few updates.')
OUT = common.define_out('out/finetune', 'Folder for the adapter, the model, the run, the record.')
MESH = common.define_mesh()
TRAINING = training.define(DEFAULTS)


def main() -> None:
  method = METHODS[METHOD.value]
  defaults = SMOKE_SETTINGS if SMOKE.value else DEFAULTS
  settings = training.settings(TRAINING, defaults, learning_rate=method.rate)
  config = settings.fit_config(_rates(method))
  out = common.out(OUT.value)
  check_replaceable(out / 'model')
  check_replaceable(out / 'adapter', kind='adapter')
  run_folder.check_free(out / 'run')
  base, tokenizer = training.load(MODEL.value, smoke=SMOKE.value)
  text = training.text(DATA.value, tokenizer, settings)
  ready = methods.prepare(base, method, _options(), settings.seed)
  _say_sizes(ready, text, config)
  held_out = {0: _nll(ready.model, text, config.step)}
  result = training.fit(
    ready.model,
    text.train,
    config,
    ready.task,
    folder=out / 'run',
    mesh=common.mesh(MESH),
    held_out=training.held_out(text, settings),
  )
  found = {'unmerged': _nll(result.model, text, config.step)}
  held_out |= {**training.curve(result), settings.steps: found['unmerged']}
  found |= _save(result.model, base, ready, method, tokenizer, text, out, config.step)
  loss_figure.write([r['loss'] for r in result.records], out / 'loss.png', held_out=held_out)
  losses = {'before': held_out[0], **found}
  record = _record(ready, settings, text, result, losses)
  records.append(out / 'records.jsonl', record)
  _print(record, losses, out)


def _options() -> methods.Options:
  return methods.Options(
    rank=RANK.value,
    alpha=ALPHA.value,
    targets=tuple(TARGETS.value),
    format=FORMAT.value,
    group_size=GROUP_SIZE.value,
  )


def _nll(model: Transformer, text: training.Text, step: StepConfig) -> float:
  return loop.mean_nll(model, text.held_out, step)


def _save(model, base, ready, method, tokenizer, text, out, step) -> dict[str, float]:
  """Writes what was learned; returns the held-out losses of its forms."""
  if method.kind == 'full':
    hf.save_pretrained(model, tokenizer, out / 'model')
    return {}
  if method.kind == 'qat':
    final = learned.finish(model)
    hf.save_pretrained(final, tokenizer, out / 'model')
    return {'stored': _nll(final, text, step)}
  _save_adapter(model, base, ready, out)
  merged = adapters.merge(model)
  hf.save_pretrained(merged, tokenizer, out / 'model')
  found = {'merged': _nll(merged, text, step)}
  if method.quantized:
    found['requantized'] = _nll(adapters.merge(model, 'base'), text, step)
  return found


def _save_adapter(model, base, ready, out):
  """Writes the PEFT folder. Where the start changed the base, the adapter is for the original."""
  if ready.adapter.start == 'pissa':
    model = adapters.for_original(model, ready.model, base)
  name = MODEL.value or ''
  config = PeftConfig(rslora=ready.adapter.rslora, base=name)
  peft.save(model, out / 'adapter', config=config)


def _rates(method: Method) -> tuple[tuple[str, float], ...]:
  """The multipliers of LoRA+, which trains B faster than A."""
  if B_RATE.value == 1.0:
    return ()
  if method.kind != 'adapter':
    raise ValueError(f'--b_rate is for adapters, and --method={METHOD.value} trains none')
  return (('*.b_RO', B_RATE.value),)


def _say_sizes(ready: Ready, text: training.Text, config: FitConfig) -> None:
  _, trained, frozen = partition(ready.model, ready.task.selection)
  floats = {n: jax.ShapeDtypeStruct(a.shape, jnp.float32) for n, a in trained.items()}
  plan = memory.plan(
    trained=floats,
    frozen=frozen,
    opt_state=memory.optimizer_state(optimizer.make(config.optimizer), floats),
    batch=text.train.batch(0),
  )
  print(
    f'{METHOD.value}: {sum(a.size for a in trained.values()):,} parameters are trained, on '
    f'{text.train.rows:,} rows of {text.train.seq_len} tokens. Memory without activations: {plan}',
    flush=True,
  )


def _record(ready, settings, text, result, losses) -> records.Record:
  _, trained, _ = partition(ready.model, ready.task.selection)
  metrics = {
    **{f'held_out_loss_{name}': records.Metric(nll, 'nats') for name, nll in losses.items()},
    'train_loss': records.Metric(result.records[-1]['loss'], 'nats'),
    'trained_parameters': records.Metric(sum(a.size for a in trained.values()), '1'),
    'stored_bytes': records.Metric(
      sum(p.get_value().nbytes for p in parameters(ready.model).values()), 'B'
    ),
    **training.metrics(result, settings),
  }
  return records.Record(
    experiment='finetune',
    recipe=METHOD.value,
    command=common.command(),
    config={
      'model': MODEL.value or 'embedded default',
      **dataclasses.asdict(settings),
      'adapter': dataclasses.asdict(ready.adapter) if ready.adapter else None,
      **text.about,
    },
    environment=records.environment(),
    seed=settings.seed,
    metrics=metrics,
    notes=['update_time is a median since the last resumption; padding counts as tokens'],
  )


def _print(record, losses, out) -> None:
  for name, nll in losses.items():
    print(f'held-out loss {name:<12} {nll:.4f} nats per token, perplexity {math.exp(nll):.3f}')
  if 'tokens_per_s' in record.metrics:
    print(
      f'{out}: {record.value("tokens_per_s"):,.0f} tokens/s; the compiled update holds '
      f'{record.value("program_peak_bytes") / 1e6:,.0f} MB'
    )


if __name__ == '__main__':
  common.run(main)
