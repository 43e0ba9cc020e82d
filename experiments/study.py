"""Measures what a recipe does to a model: quality, bytes, speed, and what fell short on the way."""

import collections
import dataclasses
import pathlib
import time

import jax
import numpy as np

from experiments import common
from model.compress import pipeline
from model.compress.ledger import Ledger
from model.compress.recipe import Recipe
from model.eval import cost, perplexity, records, timing
from model.eval.records import Metric, Record
from model.infer import bench
from model.infer.prepare import prepare
from model.transformer import Transformer, matrices, parameters
from ops import linear

BATCH = 1
DECODE_STEPS = 16
ZEROS = 0.2  # a share of zeros above this is pruning, not chance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What all recipes of a study share."""

  base: Transformer
  calibration_BT: np.ndarray
  text: perplexity.Windows
  settings: dict  # what the records say of model, text and protocol
  environment: dict
  seed: int
  rounds: int = 7
  prompt_length: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
  """The base's own measurements, which every recipe is compared with."""

  quality: perplexity.Quality
  bench: bench.Bench
  bandwidth: Metric


def baseline(study: Study) -> Baseline:
  """Measures the base once."""
  return Baseline(
    quality=_evaluate(study, study.base, None, 'base'),
    bench=_bench(study, study.base),
    bandwidth=timing.copy_bandwidth(),
  )


def base_record(study: Study, base: Baseline) -> Record:
  """The row that every ratio refers to."""
  metrics = {**_quality_metrics(base.quality, base.quality), **_bytes(study.base)}
  metrics |= _speed(study, study.base, base.bench, base)
  return _record(study, records.BASE, {'name': records.BASE, 'steps': []}, metrics, Ledger(), ())


def run(
  study: Study, base: Baseline, recipe: Recipe, resume: pathlib.Path | None = None
) -> tuple[Transformer, Record]:
  """Compresses the base by a recipe and measures the result; `resume` as in `pipeline.compress`."""
  start = time.perf_counter()
  progress = common.labelled(f'{recipe.name}: compress')
  model, ledger = pipeline.compress(
    study.base, recipe, study.calibration_BT, progress=progress, resume=resume
  )
  jax.block_until_ready([p.get_value() for p in parameters(model).values()])
  compress_s = time.perf_counter() - start
  quality = _evaluate(study, model, study.base, recipe.name)
  metrics = {**_quality_metrics(quality, base.quality), **_bytes(model)}
  ready = prepare(model)
  metrics |= _speed(study, model, _bench(study, ready), base)
  metrics['compress_s'] = Metric(compress_s, 's')
  if ready is not model:
    # The native products round activations; what is fast has to be as good, so it is measured too.
    fast = _evaluate(study, ready, None, f'{recipe.name}, native')
    metrics['native_ppl_ratio'] = Metric(fast.ppl / quality.ppl, '1', fast.tokens)
  notes = kernel_notes(model, ready)
  return model, _record(study, recipe.name, recipe.to_dict(), metrics, ledger, notes)


def kernel_notes(model: Transformer, ready: Transformer) -> tuple[str, ...]:
  """What no kernel makes faster here, of a model and its prepared form, in sentences."""
  platform = jax.default_backend()
  missing = collections.Counter(
    pipeline.describe(w) for w in _blocks(ready).values() if linear.kernel(w, platform) is None
  )
  pruned = [w for w in _blocks(model).values() if not isinstance(w, linear.Weight)]
  zeros = sum(float((w == 0).mean()) > ZEROS for w in pruned)
  notes = [
    f'no kernel for {what} on {platform} ({count} matrices): it is widened at each use, so no '
    'speed-up is expected'
    for what, count in missing.items()
  ]
  if zeros:
    notes.append(
      f'the zeros of {zeros} pruned matrices are multiplied: no speed-up expected of them'
    )
  return tuple(notes)


def _blocks(model):
  return {path: w for path, w in matrices(model).items() if path.startswith('layers.')}


def _evaluate(study, model, base, name):
  progress = common.labelled(f'{name}: evaluate')
  return perplexity.evaluate(model, study.text, base=base, progress=progress)


def _bench(study, model) -> bench.Bench:
  return bench.prepare(
    model, batch=BATCH, prompt_length=study.prompt_length, steps=DECODE_STEPS, seed=study.seed
  )


def _quality_metrics(quality, base) -> dict[str, Metric]:
  n = quality.tokens
  metrics = {
    'ppl': Metric(quality.ppl, '1', n),
    'ppl_ratio': Metric(quality.ppl / base.ppl, '1', n),
    'nll_sum': Metric(quality.nll_sum, 'nat', n),
    'tokens': Metric(n, 'token', n),
    'seq_len': Metric(quality.seq_len, 'token'),
    'bits_per_byte': Metric(quality.bits_per_byte, 'bit/byte', n),
  }
  if quality.kl_to_base is not None:
    metrics['kl_to_base'] = Metric(quality.kl_to_base, 'nat/token', n)
    metrics['flip_rate'] = Metric(quality.flip_rate, '1', n)
  return metrics


def _bytes(model) -> dict[str, Metric]:
  stored = {path: param.get_value() for path, param in parameters(model).items()}
  return cost.storage_metrics(_blocks(model), stored)


def _speed(study, model, own: bench.Bench, base: Baseline) -> dict[str, Metric]:
  metrics = {}
  for phase, tokens in (('prefill', BATCH * own.prompt_length), ('decode', BATCH * own.steps)):
    calls = {'this': getattr(own, phase)}
    if own is not base.bench:
      calls['base'] = getattr(base.bench, phase)
    timed = timing.time_interleaved(calls, base=list(calls)[-1], rounds=study.rounds)['this']
    metrics[f'{phase}_tokens_per_s'] = timed.rate(tokens, 'token/s')
    metrics[f'{phase}_speedup'] = timed.speedup
  stored = {path: param.get_value() for path, param in parameters(model).items()}
  context = own.prompt_length + own.steps // 2
  read = cost.decode_bytes_per_token(model.config, stored, context, model.dtype)
  rate = metrics['decode_tokens_per_s']
  metrics['decode_bytes_per_token'] = Metric(read, 'byte')
  metrics['decode_bytes_per_s'] = Metric(read * rate.value, 'byte/s', rate.n, read * rate.spread)
  metrics['copy_bandwidth_bytes_per_s'] = base.bandwidth
  metrics['decode_of_copy'] = Metric(read * rate.value / base.bandwidth.value, '1', rate.n)
  metrics['decode_program_peak_bytes'] = Metric(own.decode_peak_bytes, 'byte')
  return metrics


def _record(study, name, recipe, metrics, ledger, notes) -> Record:
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
    recipe=name,
    command=common.command(),
    config={**study.settings, 'recipe': recipe, 'layers': layers},
    environment=study.environment,
    seed=study.seed,
    metrics=metrics,
    ledger=rows,
    notes=notes,
  )
