"""Measures what a recipe does to a model: quality, bytes, speed and fallbacks.

Quality and speed are those of one program: the model as `model.infer.prepare` packs it for this
device, which is also what generation runs. On a CPU its products may round activations, so the
perplexity of the same weights widened to floating point is measured beside it, as
`widened_ppl_ratio`. The price of the fast products is `ppl_vs_widened`, the ratio of both, with
`ppl_vs_widened_se`, its standard error over pairs of windows.

Quality may be measured on several texts. The metrics of the first have plain names; those of
another text end in its name, as in `ppl:python-source`.

With tasks, each record has accuracies (experiments/exams.py).

Of a model with experts, `experts_changed` is the share of tokens that go to other experts than in
the base (model/eval/routing.py).
"""

import collections
import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np

from experiments import common, exams
from experiments.costs import Costs
from experiments.lessons import School
from model.compress import pipeline
from model.compress.ledger import Ledger
from model.compress.recipe import Recipe
from model.eval import cost, perplexity, records, routing, timing
from model.eval.records import Metric, Record
from model.eval.tasks import Exam, Grade
from model.infer import bench
from model.infer.prepare import prepare
from model.transformer import Transformer, matrices, parameters
from ops import linear

BATCH = 1
DECODE_STEPS = 16
MOST_HELD = 10**9  # bytes of the base's hidden states that are kept between recipes
EXPERTS_CHANGED = 'experts_changed'
ZEROS = 0.2  # a share of zeros above this is pruning, not chance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What all recipes of a study share."""

  base: Transformer
  calibration_BT: np.ndarray
  texts: Mapping[str, perplexity.Windows]  # by name; the first decides between recipes
  settings: dict  # model, text and protocol, for the records
  environment: dict
  seed: int
  rounds: int = 7
  prompt_length: int = 128
  school: School | None = None  # what steps that train learn from
  costs: Costs = Costs()
  exams: tuple[Exam, ...] = ()  # tasks that every model has to do
  said: tuple[str, ...] = ()  # what of the base was not loaded as it is stored

  @property
  def text(self) -> perplexity.Windows:
    """The first text."""
    return next(iter(self.texts.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
  """The base, prepared for this device, and its measurements."""

  ready: Transformer
  hidden: Mapping[str, list[np.ndarray] | None]  # by the name of the text; None: not kept
  qualities: Mapping[str, perplexity.Quality]  # likewise
  chosen: Mapping[str, routing.Chosen]  # likewise: the experts of each token
  grades: tuple[Grade, ...]  # one of each exam
  bench: bench.Bench
  bandwidth: Metric


def baseline(study: Study) -> Baseline:
  """Measures the base once."""
  ready = prepare(study.base)
  tokens = sum(text.tokens_BT.size for text in study.texts.values())
  kept = 4 * tokens * study.base.config.width <= MOST_HELD
  hidden = {n: perplexity.hidden_states(ready, t) if kept else None for n, t in study.texts.items()}
  return Baseline(
    ready=ready,
    hidden=hidden,
    qualities=_evaluate_all(study, ready, None, 'base'),
    chosen={name: routing.chosen(ready, text) for name, text in study.texts.items()},
    grades=exams.grade(ready, study.exams, 'base'),
    bench=_bench(study, ready),
    bandwidth=timing.copy_bandwidth(),
  )


def base_record(study: Study, base: Baseline) -> Record:
  """The row that every ratio refers to."""
  metrics = {**_quality_metrics(base.qualities, base), **_bytes(study.base)}
  metrics |= _widened(study, study.base, base.ready, base.qualities, base)
  metrics |= exams.metrics(study.exams, base.grades)
  speed, about = _speed(study, study.base, base.bench, base)
  recipe, missing = {'name': records.BASE, 'steps': []}, missing_kernels(study.base, base.ready)
  ledger = Ledger()
  ledger.add('model', 'loading', dict.fromkeys(study.said, 1))
  return _record(study, recipe, metrics | speed, ledger, missing, about)


def run(
  study: Study, base: Baseline, recipe: Recipe, resume: pathlib.Path | None = None
) -> tuple[Transformer, Record]:
  """Compresses the base by a recipe and measures the result; `resume` as in `pipeline.compress`."""
  start = time.perf_counter()
  progress = common.labelled(f'{recipe.name}: compress')
  model, ledger = pipeline.compress(
    study.base,
    recipe,
    study.calibration_BT,
    progress=progress,
    resume=resume,
    school=study.school,
  )
  jax.block_until_ready([p.get_value() for p in parameters(model).values()])
  compress_s = time.perf_counter() - start
  ready = prepare(model)
  qualities = _evaluate_all(study, ready, base, recipe.name)
  metrics = {**_quality_metrics(qualities, base), **_bytes(model)}
  metrics |= _experts_changed(study, ready, base)
  metrics |= _widened(study, model, ready, qualities, base, recipe.name)
  grades = exams.grade(ready, study.exams, recipe.name)
  metrics |= exams.metrics(study.exams, grades, base.grades)
  speed, about = _speed(study, model, _bench(study, ready), base)
  metrics |= {**speed, 'compress_s': Metric(compress_s, 's')}
  missing = missing_kernels(model, ready)
  return model, _record(study, recipe.to_dict(), metrics, ledger, missing, about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingKernels:
  """How many matrices of the blocks no kernel makes faster, and why, in sentences."""

  count: int
  notes: tuple[str, ...]


def missing_kernels(model: Transformer, ready: Transformer) -> MissingKernels:
  """Finds what no kernel of this device makes faster, in a model and its prepared form.

  That is a matrix that is widened at each use, and one whose zeros are multiplied.
  """
  platform, blocks = jax.default_backend(), _blocks(ready)
  widened = {path for path, w in blocks.items() if linear.kernel(w, platform) is None}
  pruned = {
    path
    for path, w in _blocks(model).items()
    if not isinstance(w, linear.Weight) and float((w == 0).mean()) > ZEROS
  }
  kinds = collections.Counter(pipeline.describe(blocks[path]) for path in sorted(widened))
  notes = [
    f'no kernel for {kind} on {platform} ({count} matrices): it is widened at each use, so no '
    'speed-up is expected'
    for kind, count in kinds.items()
  ]
  if pruned:
    notes.append(
      f'the zeros of {len(pruned)} pruned matrices are multiplied: no speed-up expected of them'
    )
  return MissingKernels(count=len(widened | pruned), notes=tuple(notes))


def _blocks(model):
  return {path: w for path, w in matrices(model).items() if path.startswith('layers.')}


def _evaluate_all(study, model, base: Baseline | None, name) -> dict[str, perplexity.Quality]:
  return {text: _evaluate(study, text, model, base, name) for text in study.texts}


def _evaluate(study, text: str, model, base: Baseline | None, name) -> perplexity.Quality:
  progress = common.labelled(f'{name}: evaluate')
  against = {} if base is None else {'base': base.ready, 'base_hidden': base.hidden[text]}
  return perplexity.evaluate(model, study.texts[text], progress=progress, **against)


def _bench(study, model) -> bench.Bench:
  return bench.prepare(
    model, batch=BATCH, prompt_length=study.prompt_length, steps=DECODE_STEPS, seed=study.seed
  )


def _widened(study, model, ready, qualities, base: Baseline, name=records.BASE):
  """The perplexity of the same weights in floating-point products on the first text, if it differs.

  A dictionary of metrics: against the base, and of the fast products against it.
  """
  if ready is model:
    return {}
  first = next(iter(study.texts))
  quality = _evaluate(study, first, model, None, f'{name}, widened')
  price, n = perplexity.ratio(qualities[first], quality), quality.tokens
  return {
    'widened_ppl_ratio': Metric(quality.ppl / base.qualities[first].ppl, '1', n),
    'ppl_vs_widened': Metric(price.value, '1', n),
    'ppl_vs_widened_se': Metric(price.standard_error, '1', len(quality.nll_B)),
  }


def _quality_metrics(qualities, base: Baseline) -> dict[str, Metric]:
  return _by_text({t: _metrics_of_text(q, base.qualities[t]) for t, q in qualities.items()})


def _by_text(found: Mapping[str, dict[str, Metric]]) -> dict[str, Metric]:
  """The metrics of several texts; those of the first have plain names."""
  return {
    f'{name}:{text}' if i else name: metric
    for i, (text, metrics) in enumerate(found.items())
    for name, metric in metrics.items()
  }


def _experts_changed(study, ready, base: Baseline) -> dict[str, Metric]:
  """The share of tokens with other experts than in the base, where that can be said."""
  found = {}
  for name, text in study.texts.items():
    own = routing.chosen(ready, text)
    share = routing.changed_share(ready, own, base.ready, base.chosen[name])
    tokens = text.tokens_BT.size
    found[name] = {} if share is None else {EXPERTS_CHANGED: Metric(share, '1', tokens)}
  return _by_text(found)


def _metrics_of_text(quality, base) -> dict[str, Metric]:
  n = quality.tokens
  metrics = {
    'ppl': Metric(quality.ppl, '1', n),
    'ppl_ratio': Metric(quality.ppl / base.ppl, '1', n),
    'nll_sum': Metric(quality.nll_sum, 'nat', n),
    'tokens': Metric(n, 'token', n),
    'seq_len': Metric(quality.seq_len, 'token'),
    'bits_per_byte': Metric(quality.bits_per_byte, 'bit/byte', n),
  }
  errors = {
    'ppl_se': (quality.ppl_error, '1'),
    'ppl_ratio_se': (perplexity.ratio(quality, base).standard_error, '1'),
  }
  if quality.kl_to_base is not None:
    metrics['kl_to_base'] = Metric(quality.kl_to_base, 'nat/token', n)
    metrics['flip_rate'] = Metric(quality.flip_rate, '1', n)
    errors['kl_to_base_se'] = quality.kl_error, 'nat/token'
  windows = len(quality.nll_B)
  return metrics | {
    name: Metric(error, unit, windows)
    for name, (error, unit) in errors.items()
    if math.isfinite(error)
  }


def _bytes(model) -> dict[str, Metric]:
  stored = {path: param.get_value() for path, param in parameters(model).items()}
  count = Metric(cost.storage(stored).elements, 'parameter', len(stored))
  return {'parameters': count, **cost.storage_metrics(_blocks(model), stored)}


def _speed(study, model, own: bench.Bench, base: Baseline) -> tuple[dict[str, Metric], dict]:
  """Metrics of speed and costs, and for the config what the energy was measured with."""
  metrics = {}
  for phase, tokens in (('prefill', BATCH * own.prompt_length), ('decode', BATCH * own.steps)):
    calls = {'this': getattr(own, phase)}
    if own is not base.bench:
      calls['base'] = getattr(base.bench, phase)
    timed = timing.time_interleaved(calls, base=list(calls)[-1], rounds=study.rounds)['this']
    metrics[f'{phase}_tokens_per_s'] = timed.rate(tokens, 'token/s')
    metrics[f'{phase}_speedup'] = timed.speedup
  costs, about = study.costs.measure(calls, timed, tokens, study.rounds)  # of decoding
  stored = {path: param.get_value() for path, param in parameters(model).items()}
  context = own.prompt_length + own.steps // 2
  read = cost.decode_bytes_per_token(model.config, stored, context, model.dtype)
  rate = metrics['decode_tokens_per_s']
  metrics['decode_bytes_per_token'] = Metric(read, 'byte')
  metrics['decode_bytes_per_s'] = Metric(read * rate.value, 'byte/s', rate.n, read * rate.spread)
  metrics['copy_bandwidth_bytes_per_s'] = base.bandwidth
  metrics['decode_of_copy'] = Metric(read * rate.value / base.bandwidth.value, '1', rate.n)
  metrics['decode_program_peak_bytes'] = Metric(own.decode_peak_bytes, 'byte')
  return metrics | costs, about


def _record(study, recipe: dict, metrics, ledger, missing: MissingKernels, about: dict) -> Record:
  rows = tuple(
    {
      'layer': event.layer,
      'event': f'{event.technique}: {event.event}',
      'detail': event.detail,
    }
    for event in ledger.events
  )
  layers = [{**dataclasses.asdict(row), 'shape': list(row.shape)} for row in ledger.layers]
  return Record(
    experiment='compress',
    recipe=recipe['name'],
    command=common.command(),
    config={**study.settings, **about, 'recipe': recipe, 'layers': layers},
    environment=study.environment,
    seed=study.seed,
    metrics=metrics,
    ledger=rows,
    without_kernel=missing.count,
    notes=missing.notes,
  )
