r"""Trains a student to predict as a teacher does, and measures both on unseen text.

With no flags the teacher is the small base model of `experiments.compress`, and the student starts
with half of its layers:

  python -m experiments.distill --out=out/student

On models and a text of yours (a file, a folder, or chats as JSON lines; see experiments.finetune):

  python -m experiments.distill --teacher=DIR --student=layers --layers=6 --data=FILE --out=DIR
  python -m experiments.distill --teacher=DIR --student=random --layers=0,4,8 --data=FILE --out=DIR
  python -m experiments.distill --teacher=DIR --student=DIR --evaluate_every=50 --out=DIR

A student that is a folder may be another model of the same tokenizer, such as a pruned teacher
(OUT/models/NAME of experiments.compress). The record has how much of the gap to the teacher was
closed, and with --evaluate_every the held-out loss along the way. The teacher may be compressed.
DistilBERT's loss is --temperature=2 --soft_weight=5 --hard_weight=2 --hidden=cosine. With
--targets=DIR the teacher runs once, before the training, and its stored distributions are learned
from; the same folder serves other students of the same data. With --on_policy=0.5 the student
writes half of the batches.

OUT/model is a Hugging Face folder. OUT/run holds checkpoints and the losses of every update, which
OUT/loss.png shows; a killed run that is started again with the same flags resumes and ends with the
same bits. OUT/records.jsonl gets one line per run.

Device: any. Minutes: 1 with the defaults on two CPU cores, if the base model is kept. Expect that a
student of two of three layers comes within 10 % of the teacher's held-out loss.
"""

import dataclasses
import math
from typing import get_args

from absl import flags

from experiments import common, student_text, training
from model import hf, shared_vocabulary
from model.eval import loss_figure, records
from model.files import check_replaceable
from model.tokenizer import Tokenizer
from model.train import loop, run_folder, students, targets
from model.train.distill import TEACHER, Distillation
from model.train.features import Hidden, HiddenKind, Relations
from model.train.step import Task
from model.train.stored import StoredDistillation, TargetDataset
from model.train.targets import StoredTargets, TargetConfig
from model.transformer import Transformer, parameters
from ops.divergences import Divergence, Kind

NEW = ('layers', 'random')  # students that are made here
DEFAULTS = training.Settings(
  steps=600, seq_len=128, batch_size=8, learning_rate=1e-3, warmup_steps=30
)
SMOKE_SETTINGS = training.Settings(
  steps=6, seq_len=64, batch_size=4, learning_rate=1e-3, warmup_steps=1
)

MODEL = flags.DEFINE_string(
  'teacher', None, 'Folder, hub id or .gguf file. Default: train a small base model.'
)
STUDENT = flags.DEFINE_string(
  'student', 'layers', "'layers' of the teacher, 'random' weights, or the folder of a model."
)
LAYERS = flags.DEFINE_list(
  'layers', None, "A number of layers, or the teacher's own that are kept. Default: half of them."
)
DATA = flags.DEFINE_string(
  'data',
  'python-source',
  'What to learn from: a text file, a folder, python-source, python-docs, or chats as JSON lines.',
)
OUT = common.define_out('out/student', 'Folder for the model, the run and the record.')
DIVERGENCE = flags.DEFINE_enum('divergence', 'forward_kl', get_args(Kind), 'The soft loss.')
MIX = flags.DEFINE_float('mix', None, 'Beta of a JSD, alpha of a skewed divergence.')
TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Temperature of the soft loss.')
SOFT = flags.DEFINE_float('soft_weight', 1.0, 'Weight of the divergence.')
HARD = flags.DEFINE_float('hard_weight', 0.0, 'Weight of the cross entropy of the text.')
HIDDEN = flags.DEFINE_enum(
  'hidden', 'none', ('none', *get_args(HiddenKind)), 'Distance of the last hidden states.'
)
HIDDEN_WEIGHT = flags.DEFINE_float('hidden_weight', 1.0, 'Weight of that distance.')
HEADS = flags.DEFINE_integer(
  'relation_heads', 0, 'Relation heads of MiniLM v2 in the last layers; 0 for none.', lower_bound=0
)
TARGETS = flags.DEFINE_string('targets', None, 'Folder for stored targets of the teacher.')
HEAD = flags.DEFINE_integer('head', 16, 'Stored exact tokens.', lower_bound=0)
DRAWS = flags.DEFINE_integer('draws', 48, 'Stored draws from the other tokens.', lower_bound=0)
ON_POLICY = flags.DEFINE_float('on_policy', 0.0, 'Fraction of batches that the student writes.')
PROMPT = flags.DEFINE_integer('prompt_length', 32, 'Tokens that it goes on from.', lower_bound=1)
SMOKE = flags.DEFINE_bool('smoke', False, 'The tiny base model and few updates.')
MESH = common.define_mesh()
TRAINING = training.define(DEFAULTS)


def main() -> None:
  settings = training.settings(TRAINING, SMOKE_SETTINGS if SMOKE.value else DEFAULTS)
  config = settings.fit_config()
  _objective(None)  # wrong settings show before anything is loaded
  out = common.out(OUT.value)
  check_replaceable(out / 'model')
  run_folder.check_free(out / 'run')
  teacher, teacher_tokenizer = training.load(MODEL.value, smoke=SMOKE.value)
  student, tokenizer = _student(teacher, teacher_tokenizer, settings.seed)
  objective = _objective(shared_vocabulary.length(teacher_tokenizer, tokenizer))
  objective.check(student.config, {TEACHER: teacher.config})
  text = training.text(DATA.value, tokenizer, settings)
  task, data, about = _task(teacher, teacher_tokenizer, objective, text.train, settings)
  nll = lambda model: loop.mean_nll(model, text.held_out, config.step)
  losses = {'teacher': nll(teacher), 'before': nll(student)}
  result = training.fit(
    student,
    data,
    config,
    task,
    folder=out / 'run',
    mesh=common.mesh(MESH),
    held_out=training.held_out(text, settings),
  )
  losses['student'] = nll(result.model)
  hf.save_pretrained(result.model, tokenizer, out / 'model')
  held_out = {0: losses['before'], **training.curve(result), settings.steps: losses['student']}
  loss_figure.write([r['hard'] for r in result.records], out / 'loss.png', held_out=held_out)
  record = _record(teacher, result, settings, losses, {**about, **text.about})
  records.append(out / 'records.jsonl', record)
  for name, loss in losses.items():
    print(f'held-out loss {name:<8} {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}')
  size = record.value('parameters') / record.value('teacher_parameters')
  gap = '' if math.isnan(won := record.value('recovered')) else f'; {won:.1%} of the gap is closed'
  print(f'{out}: {size:.1%} of the size of the teacher{gap}')


def _objective(vocabulary: int | None) -> Distillation:
  features = []
  if HIDDEN.value != 'none':
    features.append(Hidden(kind=HIDDEN.value, weight=HIDDEN_WEIGHT.value))
  if HEADS.value:
    features.append(Relations(heads=HEADS.value))
  return Distillation(
    divergence=Divergence(kind=DIVERGENCE.value, mix=MIX.value, temperature=TEMPERATURE.value),
    soft_weight=SOFT.value,
    hard_weight=HARD.value,
    features=tuple(features),
    vocabulary=vocabulary,
  )


def _student(teacher: Transformer, tokenizer: Tokenizer, seed: int):
  """The student and its tokenizer."""
  if STUDENT.value not in NEW:
    if LAYERS.value:
      raise ValueError(f'--layers is for a new student, and --student={STUDENT.value} is a model')
    return training.load(STUDENT.value, smoke=SMOKE.value)
  layers = _layers(len(teacher.layers))
  if STUDENT.value == 'layers':
    return students.from_layers(teacher, layers), tokenizer
  return students.at_random(teacher, layers, seed=seed), tokenizer


def _layers(depth: int) -> int | list[int]:
  """What --layers says: a number of layers, or a list of them."""
  if LAYERS.value is None:
    return -(-depth // 2)
  words = ','.join(LAYERS.value)
  try:
    layers = [int(word) for word in LAYERS.value]
  except ValueError:
    raise ValueError(f'--layers={words} is no number and no list of layers') from None
  return layers if len(layers) > 1 else layers[0]


def _task(teacher, tokenizer, objective, data, settings):
  """What the student learns, the data set for it, and what a record says of both."""
  if TARGETS.value:
    return _stored_task(teacher, tokenizer, objective, data, settings)
  on_policy = None
  if ON_POLICY.value:
    on_policy = student_text.on_policy(
      1.0,
      fraction=ON_POLICY.value,
      prompt_length=PROMPT.value,
      new_tokens=data.seq_len + 1 - PROMPT.value,
      seed=settings.seed,
    )
  task = Task(objective=objective, references={TEACHER: teacher}, on_policy=on_policy)
  return task, data, {'objective': repr(objective), 'on_policy': ON_POLICY.value}


def _stored_task(teacher, tokenizer, objective, data, settings):
  if objective.features or ON_POLICY.value or objective.divergence.kind != 'forward_kl':
    raise ValueError(
      '--targets holds distributions over given texts: use it with --divergence=forward_kl, and '
      'without --hidden, --relation_heads and --on_policy'
    )
  config = TargetConfig(
    head=HEAD.value,
    draws=DRAWS.value,
    temperature=TEMPERATURE.value,
    vocabulary=objective.vocabulary,
    compute_dtype=settings.dtype,
    seed=settings.seed,
  )
  wait = common.labelled('the teacher reads the text')
  targets.write(TARGETS.value, teacher, data, tokenizer, config, progress=wait)
  found = StoredTargets(TARGETS.value)
  stored = StoredDistillation.of(found, soft_weight=SOFT.value, hard_weight=HARD.value)
  about = {'objective': repr(stored), 'target_bytes_per_token': found.bytes_per_token}
  return Task(objective=stored), TargetDataset(data, found), about


def _record(teacher, result, settings, losses, about) -> records.Record:
  last = result.records[-1]
  sums = sorted(last.keys() - {'step', 'tokens', 'grad_norm', 'learning_rate', 'held_out_loss'})
  size = lambda model: sum(p.get_value().size for p in parameters(model).values())
  lost, won = losses['before'] - losses['teacher'], losses['before'] - losses['student']
  metrics = {
    **{f'held_out_loss_{name}': records.Metric(loss, 'nats') for name, loss in losses.items()},
    **{f'train_{name}': records.Metric(last[name], 'nats', last['tokens']) for name in sums},
    'recovered': records.Metric(won / lost if lost else math.nan, '1'),
    'parameters': records.Metric(size(result.model), '1'),
    'teacher_parameters': records.Metric(size(teacher), '1'),
    **training.metrics(result, settings),
  }
  return records.Record(
    experiment='distill',
    recipe=STUDENT.value if STUDENT.value in NEW else 'folder',
    command=common.command(),
    config={
      'teacher': MODEL.value or 'embedded default',
      'student': STUDENT.value,
      'layers': LAYERS.value,
      **dataclasses.asdict(settings),
      **about,
    },
    environment=records.environment(),
    seed=settings.seed,
    metrics=metrics,
    notes=['update_time is a median since the last resumption'],
  )


if __name__ == '__main__':
  common.run(main)
