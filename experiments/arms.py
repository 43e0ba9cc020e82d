"""Studies: arms that are trained with several seeds, and claims that are counted over the seeds.

A study is a table of arms, a function that trains one of them, and a table of claims. Its script
trains each arm with each seed and each of the arm's learning rates, and appends a record to
--output. Records of the same study that are there already count, and are not made again; so a
study can be killed, and several processes can share its seeds. A claim looks at one seed at a time,
and at each arm at its learning rate of the lowest cross entropy on held-out text.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from absl import flags

from experiments import common
from model.eval import records
from model.eval.records import Metric, Record
from model.transformer import Transformer

BEST_BY = 'cross_entropy'
TEACHER = 'teacher_fingerprint'  # in the config of every record of a study
Values = Mapping[str, float]  # metric -> value
Runs = Mapping[str, Mapping[float, Values]]  # of one seed: arm -> learning rate -> values
Found = dict[int, dict[str, dict[float, Values]]]  # seed -> arm -> learning rate -> values
Metrics = dict[str, Metric]
Before = Callable[[str], Transformer]  # the model of another arm of the same seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One way to make a model, with the peak rates to try. Without any, nothing is trained."""

  learning_rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Claim:
  """What a paper reports, as a test of the runs of some arms with one seed."""

  name: str
  text: str
  arms: tuple[str, ...]
  holds: Callable[[Runs], bool]


def at_best(runs: Runs, arm: str) -> Values:
  """The values of an arm at its best learning rate, which is among them as `learning_rate`."""
  rate, values = min(runs[arm].items(), key=lambda item: item[1][BEST_BY])
  return {**values, 'learning_rate': rate}


def rises(name: str, metric: str, arms: tuple[str, ...], slack: float = 1.0) -> Claim:
  """The metric rises from arm to arm; each may be below `slack` times the next."""

  def holds(runs):
    values = [at_best(runs, arm)[metric] for arm in arms]
    return all(a < slack * b for a, b in zip(values, values[1:]))

  times = '' if slack == 1.0 else f'{slack} x '
  return Claim(name, f'{metric}, {f" < {times}".join(arms)}', arms, holds)


def at_least(name: str, metric: str, arm: str, bound: float) -> Claim:
  """The metric of an arm is no lower than a bound."""
  holds = lambda runs: at_best(runs, arm)[metric] >= bound
  return Claim(name, f'{metric} of {arm} >= {bound}', (arm,), holds)


def ratio(name: str, metric: str, arms: tuple[str, str], low: float, high: float) -> Claim:
  """The metric of the first arm in times that of the second lies within two bounds."""

  def holds(runs):
    first, second = (at_best(runs, arm)[metric] for arm in arms)
    return low <= first / second <= high

  text = f'{metric}, {arms[0]} / {arms[1]} within {low} and {high}'
  return Claim(name, text, arms, holds)


@dataclasses.dataclass(frozen=True)
class Count:
  """In how many seeds a claim holds, of those that have all of its arms."""

  claim: Claim
  held: int
  seeds: int

  def __str__(self):
    return f'{self.claim.name}: {self.claim.text}: held {self.held} of {self.seeds} seeds'


def count(claims: Iterable[Claim], seeds: Iterable[Runs]) -> list[Count]:
  """Counts each claim over the seeds; claims that no seed has the arms for are left out."""
  seeds, counts = list(seeds), []
  for claim in claims:
    runs = [runs for runs in seeds if runs.keys() >= set(claim.arms)]
    if runs:
      counts.append(Count(claim, sum(claim.holds(one) for one in runs), len(runs)))
  return counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the flags of a study say. Without arms or steps it has its own: all, and its updates."""

  arms: tuple[str, ...] = ()
  seeds: int = 3
  first_seed: int = 0
  learning_rates: tuple[float, ...] = ()
  steps: int | None = None
  output: str | None = None
  smoke: bool = False


class Setting(Protocol):
  """What all arms of a study share. `about` is said in each record, as JSON values."""

  @property
  def about(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """A table of arms and what is claimed of them.

  prepare: makes the setting from the options.
  train: (setting, arm, seed, learning rate, before) -> the model and its metrics, among them the
    cross entropy. `before` gives the models of other arms with this seed.
  smoke: the arms of --smoke, each at its first learning rate.
  describe: an arm as JSON values for the record.
  """

  name: str
  arms: Mapping[str, Arm]
  claims: tuple[Claim, ...]
  smoke: tuple[str, ...]
  prepare: Callable[[Options], Setting]
  train: Callable[[Any, Any, int, float, Before], tuple[Transformer, Metrics]]
  describe: Callable[[Any], dict[str, Any]] = dataclasses.asdict


def main(study: Study) -> None:
  """Runs a study as a script."""
  holders = define()
  common.run(lambda: run(study, options(holders)))


def define(values: flags.FlagValues = flags.FLAGS) -> dict[str, flags.FlagHolder]:
  """The flags of a study; `options` reads them."""
  shared = {'flag_values': values}
  text = {
    'arms': 'Arms to train. Default: all.',
    'rates': 'Peak learning rates, instead of those of each arm.',
    'output': 'A .jsonl file to append records to.',
    'smoke': 'A tiny base, few arms and updates, one seed.',
  }
  integer = lambda name, default, help, low: flags.DEFINE_integer(
    name, default, help, lower_bound=low, **shared
  )
  return {
    'arms': flags.DEFINE_list('arms', None, text['arms'], **shared),
    'seeds': integer('seeds', 3, 'Seeds of each arm.', 1),
    'first_seed': integer('first_seed', 0, 'The first of the seeds.', 0),
    'learning_rates': flags.DEFINE_list('learning_rates', None, text['rates'], **shared),
    'steps': integer('steps', None, 'Updates. Default: those of the study.', 2),
    'output': flags.DEFINE_string('output', None, text['output'], **shared),
    'smoke': flags.DEFINE_bool('smoke', False, text['smoke'], **shared),
  }


def options(holders: Mapping[str, flags.FlagHolder]) -> Options:
  """The options that the flags give."""
  given = {name: holder.value for name, holder in holders.items()}
  return Options(
    **{
      **given,
      'arms': tuple(given['arms'] or ()),
      'learning_rates': tuple(float(rate) for rate in given['learning_rates'] or ()),
    }
  )


def run(study: Study, options: Options) -> None:
  """Trains what is not recorded yet, and counts the claims.

  Raises ValueError if there is no such arm.
  """
  names = options.arms or (study.smoke if options.smoke else tuple(study.arms))
  for name in names:
    if name not in study.arms:
      raise ValueError(f'--arms has {name!r}, which is not one of {", ".join(study.arms)}')
  setting = study.prepare(options)
  found = _recorded(setting.about, options.output)
  seeds = 1 if options.smoke else options.seeds
  for seed in range(options.first_seed, options.first_seed + seeds):
    one = _Seed(study, setting, options, seed, found.setdefault(seed, {}))
    for name in names:
      for rate in one.rates(name):
        one.measure(name, rate)
  for counted in count(study.claims, found.values()):
    print(counted)


class _Seed:
  """The runs of one seed. `found` has their values, and gets those of new ones."""

  def __init__(self, study: Study, setting, options: Options, seed: int, found: dict):
    self._study, self._setting, self._options = study, setting, options
    self._seed, self._found = seed, found
    self._models = {}

  def rates(self, name: str) -> tuple[float, ...]:
    """The learning rates of an arm, 0 if it trains nothing."""
    own = self._study.arms[name].learning_rates or (0.0,)
    if self._options.learning_rates and own != (0.0,):
      return self._options.learning_rates
    return own[:1] if self._options.smoke else own

  def measure(self, name: str, rate: float) -> None:
    """Trains an arm if it is not found."""
    if rate not in self._found.get(name, {}):
      self._train(name, rate)

  def before(self, name: str) -> Transformer:
    """The model of an arm at its first learning rate, which is trained if it is not here."""
    if name not in self._models:
      self._models[name] = self._train(name, self.rates(name)[0])
    return self._models[name]

  def _train(self, name, rate) -> Transformer:
    arm, rates = self._study.arms[name], self._found.setdefault(name, {})
    model, metrics = self._study.train(self._setting, arm, self._seed, rate, self.before)
    if rate == self.rates(name)[0]:
      self._models[name] = model
    if rate not in rates:
      rates[rate] = _values(metrics)
      self._report(name, rate, metrics)
    return model

  def _report(self, name, rate, metrics) -> None:
    shown = {metric: f'{found.value:.4f}' for metric, found in metrics.items()}
    print(f'seed {self._seed} {name} (rate {rate}): {shown}', flush=True)
    if self._options.output is None:
      return
    arm = self._study.describe(self._study.arms[name])
    record = Record(
      experiment=self._study.name,
      recipe=name,
      command=common.command(),
      config={**self._setting.about, 'learning_rate': rate, **arm},
      environment=records.environment(),
      seed=self._seed,
      metrics=metrics,
    )
    records.append(self._options.output, record)


def _recorded(about: Mapping[str, Any], output: str | None) -> Found:
  """What earlier runs of this study have written to the output."""
  if output is None or not pathlib.Path(output).is_file():
    return {}
  rows = records.read(output)
  return _nested(row for row in rows if {n: row.config.get(n) for n in about} == about)


def by_seed(rows: Iterable[Record]) -> Iterator[Runs]:
  """The runs of each seed in the records of a study. Other teachers make other runs."""
  teachers = {}
  for row in rows:
    teachers.setdefault(row.config[TEACHER], []).append(row)
  for of_one in teachers.values():
    yield from _nested(of_one).values()


def _nested(rows: Iterable[Record]) -> Found:
  found = {}
  for row in rows:
    rates = found.setdefault(row.seed, {}).setdefault(row.recipe, {})
    rates[row.config['learning_rate']] = _values(row.metrics)
  return found


def _values(metrics: Mapping[str, Metric]) -> dict[str, float]:
  return {name: metric.value for name, metric in metrics.items()}
