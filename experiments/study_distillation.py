r"""Shows what each part of distillation is worth, on small models with several seeds.

  python -m experiments.study_distillation --output=experiments/results/distillation_cpu.jsonl
  python -m experiments.study_distillation --output=experiments/results/distillation_cpu.jsonl \
      --arms=layers_forward,layers_reverse,layers_jsd --learning_rates=5e-4,1e-3,4e-3

The teacher is the base of `small_models`. Students have two of its four layers and see the same
number of tokens; each seed has its own passages, order and initial weights. The arms:

  teacher         the teacher itself, to compare with
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
error; and its divergences on texts that it writes itself. What the papers report is counted over
the seeds (`arms`):

  D1  a distilled student is better than one from scratch
  D2  the teacher's layers are a better start than random ones
  D3  leaving out the soft targets costs more than leaving out the hard labels
  D5  50 draws come within 0.5 % of the full loss, and are better calibrated than a head alone
  D6  reverse KL: lower entropy and KL(student || teacher), higher cross entropy; JSD in between
  D7  writing itself brings a student nearer to the teacher on its own texts

Device: any. Minutes: 5 on a GPU, in eight processes that share the arms; an hour or so on two CPU
cores.
"""

import dataclasses
import pathlib
import tempfile

import numpy as np

from experiments import arms, small_models, student_text
from experiments.arms import Options, rises
from experiments.small_models import SmallModels
from model.eval import closeness
from model.eval.records import Metric
from model.train import students, targets
from model.train.distill import TEACHER, Distillation
from model.train.features import Hidden
from model.train.objectives import CrossEntropy, Objective
from model.train.step import Task
from model.train.stored import StoredDistillation, TargetDataset
from model.train.targets import StoredTargets, TargetConfig
from model.transformer import Transformer
from ops.divergences import Divergence

STUDENT_LAYERS = 2
STEPS = 200
PROMPT, WRITTEN = 32, 96  # tokens of a text that a student writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(arms.Arm):
  """One way to make a student. `start` names another arm to go on from, 'random' or 'layers'."""

  start: str
  objective: Objective | None = None
  stored: TargetConfig | None = None  # instead of an objective
  written: float | None = None  # the fraction of on-policy batches
  learning_rates: tuple[float, ...] = (2e-3,)


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
  return Arm(start='layers_all', objective=objective, written=written, learning_rates=(5e-4,))


ARMS = {
  'teacher': Arm(start='teacher', learning_rates=()),
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

CLAIMS = (
  rises('D1', 'bits_per_byte', ('all', 'scratch')),
  rises('D1, soft targets alone', 'bits_per_byte', ('kd', 'scratch')),
  rises('D2', 'bits_per_byte', ('layers_all', 'all')),
  rises('D3', 'bits_per_byte', ('layers_no_hard', 'layers_no_soft')),
  rises('D5, within 0.5 %', 'cross_entropy', ('kd_sampled', 'kd'), slack=1.005),
  rises('D5', 'calibration_error', ('kd_sampled', 'kd_top')),
  rises('D5, loss', 'cross_entropy', ('kd_sampled', 'kd_top')),
  rises('D6', 'entropy', ('layers_reverse', 'layers_jsd', 'layers_forward')),
  rises('D6', 'reverse_kl', ('layers_reverse', 'layers_forward')),
  rises('D6', 'cross_entropy', ('layers_forward', 'layers_reverse')),
  rises('D7', 'own_reverse_kl', ('more_on_policy', 'more_off_policy')),
  rises('D7', 'own_forward_kl', ('more_on_policy', 'more_off_policy')),
)


def prepare(options: Options) -> SmallModels:
  return small_models.prepare(options, steps=STEPS, student_layers=STUDENT_LAYERS)


def train(
  setting: SmallModels, arm: Arm, seed: int, rate: float, before: arms.Before
) -> tuple[Transformer, arms.Metrics]:
  """Makes and measures a student."""
  if not arm.learning_rates:
    return setting.base, _measure(setting, setting.base, seed)
  more = arm.start in ARMS
  steps = max(2, setting.steps // 3) if more else setting.steps
  if more:
    student = before(arm.start)
  elif arm.start == 'layers':
    student = students.from_layers(setting.base, STUDENT_LAYERS)
  else:
    student = students.at_random(setting.base, STUDENT_LAYERS, seed=seed)
  # A student that goes on reads new text.
  data = setting.data(seed + 1000 if more else seed, steps)
  with tempfile.TemporaryDirectory() as folder:
    task, data, about = _task(setting, arm, data, pathlib.Path(folder) / 'targets', seed)
    student, trained = small_models.fit(student, data, small_models.fit_config(steps, rate), task)
  return student, {**about, **trained, **_measure(setting, student, seed)}


def describe(arm: Arm) -> dict:
  objective = repr(arm.objective or arm.stored)
  return {'start': arm.start, 'objective': objective, 'written': arm.written}


def _task(setting, arm, data, folder, seed):
  """The task of an arm, its data, and what is to be said of them."""
  if arm.stored is not None:
    config = dataclasses.replace(arm.stored, seed=seed)
    targets.write(folder, setting.base, data, setting.tokenizer, config)
    found = StoredTargets(folder)
    data = TargetDataset(data, found, setting.tokenizer)
    about = {'bytes_per_token': Metric(found.bytes_per_token, 'byte')}
    return Task(objective=StoredDistillation.of(found)), data, about
  if isinstance(arm.objective, CrossEntropy):
    return Task(objective=arm.objective), data, {}
  on_policy = None
  if arm.written is not None:
    on_policy = student_text.on_policy(
      1.0,
      fraction=arm.written,
      prompt_length=_part(setting, PROMPT),
      new_tokens=_part(setting, WRITTEN),
      seed=seed,
    )
  references = {TEACHER: setting.base}
  return Task(objective=arm.objective, references=references, on_policy=on_policy), data, {}


def _part(setting: SmallModels, tokens: int) -> int:
  """The share of a row of this study's length that so many tokens are of the default length."""
  return tokens * setting.plan.seq_len // small_models.PLAN.seq_len


def _measure(setting: SmallModels, student: Transformer, seed: int) -> dict[str, Metric]:
  text = closeness.measure(student, setting.base, setting.windows.tokens_BT)
  prompts_BT = setting.windows.tokens_BT[:64, : _part(setting, PROMPT)]
  own = closeness.measure(
    student,
    setting.base,
    *student_text.sample(student, prompts_BT, _part(setting, WRITTEN), seed=seed),
  )
  n = text.tokens
  bits = text.cross_entropy * n / np.log(2) / setting.windows.predicted_bytes
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


STUDY = arms.Study(
  name='study_distillation',
  arms=ARMS,
  claims=CLAIMS,
  smoke=('kd', 'kd_sampled'),
  prepare=prepare,
  train=train,
  describe=describe,
)

if __name__ == '__main__':
  arms.main(STUDY)
