r"""Shows what each part of distillation is worth, on small models with several seeds.

  python -m experiments.study_distillation --output=experiments/results/distillation_cpu.jsonl
  python -m experiments.study_distillation --output=experiments/results/distillation_cpu.jsonl \
      --arms=layers_forward,layers_reverse,layers_jsd --learning_rates=5e-4,1e-3,4e-3

The teacher has the shape of the embedded base with four layers, and is trained once on the source
of Python's standard library. Students have two layers and see the same number of tokens; each seed
has its own passages, order and initial weights. The arms:

  scratch         random start, labels alone
  all             random start, DistilBERT's loss: soft 5, hard 2, cosine of hidden states 1, T 2
  layers_all      the same from the teacher's first and last layer
  layers_no_soft, layers_no_hard   without one part
  layers_forward, layers_reverse, layers_jsd   from the teacher's layers, one divergence alone
  kd              random start, forward KL alone
  kd_sampled      forward KL to 50 stored draws a token, 100 bytes
  kd_mixed        a stored head of 8 tokens and 34 draws, 116 bytes
  kd_top          a stored head of 25 tokens and no draws, 100 bytes
  more_off_policy, more_on_policy   layers_all goes on, on given text or on its own

Each is measured on held-out text: bits per byte, entropy, divergences to the teacher, calibration
error; and its divergences on texts that it writes itself. The orders that the papers report are
counted over the seeds, each arm at the best of its learning rates. Records that are already in the
output count too, and are not made again:

  D1  a distilled student is better than one from scratch
  D2  the teacher's layers are a better start than random ones
  D3  leaving out the soft targets costs more than leaving out the hard labels
  D5  50 draws come within 0.5 % of the full loss, and are better calibrated than a head alone
  D6  reverse KL: lower entropy and KL(student || teacher), higher cross entropy; JSD in between
  D7  writing itself brings a student nearer to the teacher on its own texts

Device: any. Minutes: not measured yet; an hour or so on two CPU cores with three seeds. Expected,
by the papers: every order in every seed, except that divergences (D6) differ little.
"""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Mapping

import numpy as np
from absl import flags

from experiments import base as embedded
from experiments import common, student_text, training
from model import fingerprint
from model.eval import closeness, perplexity, records
from model.eval.records import Metric, Record
from model.train import loop, students, targets
from model.train.data import PackedDataset, excerpts
from model.train.distill import TEACHER, Distillation
from model.train.features import Hidden
from model.train.loop import FitConfig
from model.train.objectives import CrossEntropy, Objective
from model.train.optimizer import OptimizerConfig
from model.train.step import StepConfig, Task
from model.train.stored import StoredDistillation, TargetDataset
from model.train.targets import StoredTargets, TargetConfig
from model.transformer import Transformer
from ops.divergences import Divergence

TEACHER_PLAN = embedded.Plan(layers=4, steps=1200)
SMOKE_PLAN = dataclasses.replace(embedded.SMOKE, layers=4)
STUDENT_LAYERS = 2
PROMPT, WRITTEN = 32, 96  # tokens of a text that a student writes

ARMS_FLAG = flags.DEFINE_list('arms', None, 'Arms to train. Default: all.')
SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds of each arm.', lower_bound=1)
FIRST_SEED = flags.DEFINE_integer('first_seed', 0, 'The first of the seeds.', lower_bound=0)
STEPS = flags.DEFINE_integer('steps', 200, 'Updates of each arm.', lower_bound=2)
RATES = flags.DEFINE_list('learning_rates', None, 'Peak learning rates. Default: that of the arm.')
OUTPUT = flags.DEFINE_string('output', None, 'A .jsonl file to append records to.')
SMOKE = flags.DEFINE_bool('smoke', False, 'A tiny teacher, four updates and one seed.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One way to make a student. `start` names another arm to go on from, 'random' or 'layers'."""

  start: str
  objective: Objective | None = None
  stored: TargetConfig | None = None  # instead of an objective
  written: float | None = None  # the fraction of on-policy batches
  learning_rate: float = 2e-3


def _kl(start: str, kind: str = 'forward_kl', mix: float | None = None) -> Arm:
  return Arm(start=start, objective=Distillation(divergence=Divergence(kind=kind, mix=mix)))


def _bert(soft: float, hard: float) -> Distillation:
  return Distillation(
    divergence=Divergence(temperature=2.0),
    soft_weight=soft,
    hard_weight=hard,
    features=(Hidden(),),
  )


def _more(written: float) -> Arm:
  objective = Distillation(divergence=Divergence(kind='jsd', mix=0.5))
  return Arm(start='layers_all', objective=objective, written=written, learning_rate=5e-4)


ARMS = {
  'scratch': Arm(start='random', objective=CrossEntropy()),
  'all': Arm(start='random', objective=_bert(5, 2)),
  'layers_all': Arm(start='layers', objective=_bert(5, 2)),
  'layers_no_soft': Arm(start='layers', objective=_bert(0, 2)),
  'layers_no_hard': Arm(start='layers', objective=_bert(5, 0)),
  'layers_forward': _kl('layers'),
  'layers_reverse': _kl('layers', 'reverse_kl'),
  'layers_jsd': _kl('layers', 'normalized_jsd', 0.5),
  'kd': _kl('random'),
  'kd_sampled': Arm(start='random', stored=TargetConfig(head=0, draws=50)),
  'kd_mixed': Arm(start='random', stored=TargetConfig(head=8, draws=34)),
  'kd_top': Arm(start='random', stored=TargetConfig(head=25, draws=0, dtype='float16')),
  'more_off_policy': _more(0.0),
  'more_on_policy': _more(1.0),
}

Results = Mapping[str, Mapping[str, float]]  # arm -> metric -> value, of one seed
Found = Mapping[tuple[int, str, float], Mapping[str, float]]  # seed, arm, learning rate


@dataclasses.dataclass(frozen=True)
class Order:
  """A claim: the metric rises from arm to arm. The first may be `slack` times the second."""

  claim: str
  metric: str
  arms: tuple[str, ...]
  slack: float = 1.0

  def holds(self, results: Results) -> bool:
    values = [results[arm][self.metric] for arm in self.arms]
    return all(a < self.slack * b for a, b in zip(values, values[1:]))


ORDERS = (
  Order('D1', 'bits_per_byte', ('all', 'scratch')),
  Order('D1, soft targets alone', 'bits_per_byte', ('kd', 'scratch')),
  Order('D2', 'bits_per_byte', ('layers_all', 'all')),
  Order('D3', 'bits_per_byte', ('layers_no_hard', 'layers_no_soft')),
  Order('D5, within 0.5 %', 'cross_entropy', ('kd_sampled', 'kd'), slack=1.005),
  Order('D5', 'calibration_error', ('kd_sampled', 'kd_top')),
  Order('D5, loss', 'cross_entropy', ('kd_sampled', 'kd_top')),
  Order('D6', 'entropy', ('layers_reverse', 'layers_jsd', 'layers_forward')),
  Order('D6', 'reverse_kl', ('layers_reverse', 'layers_forward')),
  Order('D6', 'cross_entropy', ('layers_forward', 'layers_reverse')),
  Order('D7', 'own_reverse_kl', ('more_on_policy', 'more_off_policy')),
  Order('D7', 'own_forward_kl', ('more_on_policy', 'more_off_policy')),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What all arms share."""

  base: embedded.Embedded
  plan: embedded.Plan
  windows: perplexity.Windows
  steps: int

  @property
  def teacher(self) -> Transformer:
    return self.base.model

  @property
  def about(self) -> dict:
    """What records of one study share, as JSON values."""
    return {
      'teacher': dataclasses.asdict(self.plan),
      'teacher_fingerprint': fingerprint.of_model(self.teacher),
      'student_layers': STUDENT_LAYERS,
      'steps': self.steps,
      'text_fingerprint': self.base.texts.fingerprint,
    }

  def data(self, seed: int, steps: int) -> PackedDataset:
    """Rows for exactly one epoch of `steps` updates."""
    tokens = steps * self.plan.batch_size * self.plan.seq_len + 1
    whole = PackedDataset.from_texts(
      excerpts(self.base.texts.train, training.CHARACTERS_A_TOKEN * tokens, seed=seed),
      self.base.tokenizer,
      seq_len=self.plan.seq_len,
      batch_size=self.plan.batch_size,
      seed=seed,
    )
    starts = whole.starts[whole.starts < tokens]
    return dataclasses.replace(whole, stream=whole.stream[:tokens], starts=starts)


def main() -> None:
  names = ARMS_FLAG.value or list(ARMS)
  for name in names:
    if name not in ARMS:
      raise ValueError(f'--arms has {name!r}, which is not one of {", ".join(ARMS)}')
  study = _study()
  found = _recorded(study)
  seeds = 1 if SMOKE.value else SEEDS.value
  for seed in range(FIRST_SEED.value, FIRST_SEED.value + seeds):
    for rate in map(float, RATES.value or [0]):
      found |= _run_seed(study, names, seed, rate, found)
  for order in ORDERS:
    runs = [results for results in _by_seed(found).values() if results.keys() >= set(order.arms)]
    if runs:
      held = sum(order.holds(results) for results in runs)
      print(f'{order.claim}: {order.metric}, {" < ".join(order.arms)}: {held} of {len(runs)}')


def _recorded(study: Study) -> Found:
  """What earlier runs of this study have written to the output."""
  if not OUTPUT.value or not pathlib.Path(OUTPUT.value).is_file():
    return {}
  shared = study.about
  return {
    (row.seed, row.recipe, row.config['learning_rate']): _values(row.metrics)
    for row in records.read(OUTPUT.value)
    if {name: row.config.get(name) for name in shared} == shared
  }


def _by_seed(found: Found) -> dict[int, Results]:
  """The results of each seed, of each arm at its best learning rate by cross entropy."""
  seeds = {}
  for (seed, arm, _), values in found.items():
    results = seeds.setdefault(seed, {})
    if arm not in results or values['cross_entropy'] < results[arm]['cross_entropy']:
      results[arm] = values
  return seeds


def _values(metrics: Mapping[str, Metric]) -> dict[str, float]:
  return {name: metric.value for name, metric in metrics.items()}


def _study() -> Study:
  plan = SMOKE_PLAN if SMOKE.value else TEACHER_PLAN
  base = embedded.load_or_train(common.cache_folder(), plan=plan)
  ids_T, ends_T = base.tokenizer.encode_with_bytes('\n'.join(base.texts.held_out))
  windows = perplexity.windows(ids_T, ends_T, plan.seq_len, 8 if SMOKE.value else 256)
  return Study(base=base, plan=plan, windows=windows, steps=4 if SMOKE.value else STEPS.value)


def _run_seed(study: Study, names: list[str], seed: int, rate: float, found: Found) -> Found:
  """Trains and measures the arms of one seed that are not found yet.

  An arm that another one goes on from is trained for it, whether or not it is found.
  """
  arms = {
    name: dataclasses.replace(arm, learning_rate=rate) if rate else arm
    for name, arm in ARMS.items()
  }
  key = lambda name: (seed, name, arms[name].learning_rate)
  wanted = [name for name in names if key(name) not in found]
  needed = {arms[name].start for name in wanted}
  models, new = {}, {}
  for name in [name for name in arms if name in needed.union(wanted)]:
    start = time.perf_counter()
    models[name], about = _train(study, arms[name], models, seed)
    about['train_time'] = Metric(time.perf_counter() - start, 's')
    if key(name) not in found:
      metrics = {**about, **_measure(study, models[name], seed)}
      new[key(name)] = _values(metrics)
      _report(study, name, arms[name], seed, metrics)
  return new


def _train(study, arm, models, seed) -> tuple[Transformer, dict[str, Metric]]:
  more = arm.start in ARMS
  steps = max(2, study.steps // 3) if more else study.steps
  if more:
    student = models[arm.start]
  elif arm.start == 'layers':
    student = students.from_layers(study.teacher, STUDENT_LAYERS)
  else:
    student = students.at_random(study.teacher, STUDENT_LAYERS, seed=seed)
  # A student that goes on reads new text.
  data = study.data(seed + 1000 if more else seed, steps)
  optimizer = OptimizerConfig(
    steps=steps, learning_rate=arm.learning_rate, warmup_steps=min(20, steps // 4)
  )
  config = FitConfig(optimizer=optimizer, step=StepConfig(loss_chunk=256))
  with tempfile.TemporaryDirectory() as folder:
    task, data, about = _task(study, arm, data, pathlib.Path(folder) / 'targets', seed)
    result = loop.fit(student, data, config, task=task, progress=False)
  return result.model, about


def _task(study, arm, data, folder, seed):
  """The task of an arm, its data, and what is to be said of them."""
  if arm.stored is not None:
    config = dataclasses.replace(arm.stored, seed=seed)
    targets.write(folder, study.teacher, data, study.base.tokenizer, config)
    found = StoredTargets(folder)
    data = TargetDataset(data, found, study.base.tokenizer)
    about = {'bytes_per_token': Metric(found.bytes_per_token, 'byte')}
    return Task(objective=StoredDistillation.of(found)), data, about
  if isinstance(arm.objective, CrossEntropy):
    return Task(objective=arm.objective), data, {}
  on_policy = None
  if arm.written is not None:
    on_policy = student_text.on_policy(
      1.0,
      fraction=arm.written,
      prompt_length=_part(study, PROMPT),
      new_tokens=_part(study, WRITTEN),
      seed=seed,
    )
  references = {TEACHER: study.teacher}
  return Task(objective=arm.objective, references=references, on_policy=on_policy), data, {}


def _part(study: Study, tokens: int) -> int:
  """The share of a row of this study's length that so many tokens are of the default length."""
  return tokens * study.plan.seq_len // TEACHER_PLAN.seq_len


def _measure(study: Study, student: Transformer, seed: int) -> dict[str, Metric]:
  text = closeness.measure(student, study.teacher, study.windows.tokens_BT)
  prompts_BT = study.windows.tokens_BT[:64, : _part(study, PROMPT)]
  own = closeness.measure(
    student,
    study.teacher,
    *student_text.sample(student, prompts_BT, _part(study, WRITTEN), seed=seed),
  )
  n = text.tokens
  bits = text.cross_entropy * n / np.log(2) / study.windows.predicted_bytes
  return {
    'bits_per_byte': Metric(bits, 'bit/byte', n),
    'cross_entropy': Metric(text.cross_entropy, 'nat/token', n),
    'entropy': Metric(text.entropy, 'nat/token', n),
    'forward_kl': Metric(text.forward_kl, 'nat/token', n),
    'reverse_kl': Metric(text.reverse_kl, 'nat/token', n),
    'calibration_error': Metric(text.calibration_error, '1', n),
    'own_forward_kl': Metric(own.forward_kl, 'nat/token', own.tokens),
    'own_reverse_kl': Metric(own.reverse_kl, 'nat/token', own.tokens),
    'own_entropy': Metric(own.entropy, 'nat/token', own.tokens),
  }


def _report(study, name, arm, seed, metrics) -> None:
  shown = {metric: f'{found.value:.4f}' for metric, found in metrics.items()}
  print(f'seed {seed} {name} (rate {arm.learning_rate}): {shown}', flush=True)
  if not OUTPUT.value:
    return
  record = Record(
    experiment='study_distillation',
    recipe=name,
    command=common.command(),
    config={
      **study.about,
      'learning_rate': arm.learning_rate,
      'start': arm.start,
      'objective': repr(arm.objective or arm.stored),
      'written': arm.written,
    },
    environment=records.environment(),
    seed=seed,
    metrics=metrics,
  )
  records.append(OUTPUT.value, record)


if __name__ == '__main__':
  common.run(main)
