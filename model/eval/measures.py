"""What a metric of a record tells: which way is better, how sure it is, and what it depends on.

Two numbers are compared only if what their kind depends on is the same in both records: the text,
its windows and tokens for quality, the machine and the load for speed. `differences` names what is
not.
"""

import dataclasses
import enum
import math
from typing import Any

from model.eval.records import Metric, Record


class Kind(enum.Enum):
  """What is measured, which says what it depends on and what its noise is."""

  QUALITY = 'quality'
  SPEED = 'speed'
  ENERGY = 'energy'
  MONEY = 'price'
  BYTES = 'size'
  OTHER = 'other'


@dataclasses.dataclass(frozen=True)
class Measure:
  """`lower` and `higher` is better; None: neither, so it is shown and not judged."""

  kind: Kind
  better: str | None


LOWER, HIGHER = 'lower', 'higher'
PERPLEXITIES = {'ppl', 'ppl_ratio', 'widened_ppl_ratio', 'ppl_vs_widened', 'kl_to_base'}
ACCURACY = 'accuracy'  # accuracy:TASK, and accuracy_change:TASK against the base
SHARES = {'flip_rate', 'experts_changed'}  # of tokens, and so binomial
# Other metrics or the machine say the same: a change of theirs is no news.
FOLLOWING = {'bits_per_byte', 'nll_sum', 'copy_bandwidth_bytes_per_s', 'decode_bytes_per_s'}
LOAD = (
  'batch',
  'prompt_length',
  'decode_steps',
  'prompt_tokens',
  'shared_tokens',
  'new_tokens',
  'load',
  'amount',
  'requests',
  'context',
)
SIZES = {'byte', 'bit'}


def measure(name: str, metric: Metric) -> Measure:
  """What the metric of this name is; a text may follow the name after a colon."""
  root, unit = name.partition(':')[0], metric.unit
  if root in PERPLEXITIES | SHARES:
    return Measure(Kind.QUALITY, LOWER)
  if root.startswith(ACCURACY):
    return Measure(Kind.QUALITY, None if root.endswith('_se') else HIGHER)
  if root.endswith('_se') or root in FOLLOWING:
    return Measure(
      Kind.QUALITY if unit in {'1', 'nat', 'nat/token', 'bit/byte'} else Kind.SPEED, None
    )
  if root in {'energy_j_per_token', 'energy_ratio'}:
    return Measure(Kind.ENERGY, LOWER)
  if root == 'money_per_million_tokens':
    return Measure(Kind.MONEY, LOWER)
  if unit.endswith('/s') or root.endswith('_speedup'):
    return Measure(Kind.SPEED, HIGHER)
  if unit == 's':
    return Measure(Kind.SPEED, LOWER)
  if unit in SIZES or root.endswith('_bytes_vs_bf16'):
    return Measure(Kind.BYTES, LOWER)
  return Measure(Kind.OTHER, None)


def noise(record: Record, name: str) -> tuple[float | None, str]:
  """How far the metric may be off, and in words what that is: a standard error or a spread.

  None where the record does not tell.
  """
  metric = record.metrics[name]
  kind = measure(name, metric).kind
  if kind is Kind.BYTES:
    return 0.0, 'exact'
  if kind is not Kind.QUALITY:
    if metric.spread is None or metric.n < 2:
      return None, 'measured once, so without a spread'
    return metric.spread, 'interquartile range'
  root, colon, text = name.partition(':')
  error = record.metrics.get(f'{root}_se{colon}{text}')
  if error is not None:
    return error.value, 'standard error'
  if root in SHARES and metric.n > 1 and 0 <= metric.value <= 1:
    return math.sqrt(metric.value * (1 - metric.value) / metric.n), 'standard error'
  return None, 'without a standard error'


def differences(name: str, record: Record, other: Record) -> list[str]:
  """What the metric depends on and differs between records, in words: 'bos: none against window'.

  The value of `other` stands first.
  """
  metric, others = record.metrics[name], other.metrics[name]
  kind = measure(name, metric).kind
  own, theirs = _conditions(name, kind, record), _conditions(name, kind, other)
  own['unit'], theirs['unit'] = metric.unit, others.unit
  needs_text = name.partition(':')[0] in PERPLEXITIES | SHARES
  if needs_text and own['text'] is None and theirs['text'] is None:
    return ['no record names the text']
  return [
    f'{what}: {_named(theirs.get(what))} against {_named(own.get(what))}'
    for what in dict.fromkeys([*own, *theirs])
    if own.get(what) != theirs.get(what)
  ]


def _conditions(name: str, kind: Kind, record: Record) -> dict[str, Any]:
  """What the metric depends on, by words for it."""
  if name.startswith(ACCURACY):
    return _task(name.partition(':')[2], record)
  if kind is Kind.QUALITY:
    return _text(name.partition(':')[2], record)
  load = {name.replace('_', ' '): record.config.get(name) for name in LOAD}
  if kind is Kind.MONEY:
    return load
  if kind is Kind.SPEED:
    return load | {'machine': machine(record)}
  if kind is Kind.ENERGY:
    return load | {'machine': machine(record), 'counters': record.config.get('energy')}
  return {}


def machine(record: Record) -> str | None:
  """What speed depends on, in words: the devices, and where they are CPUs, which and the cores."""
  about = record.environment
  device, count = about.get('device'), about.get('device_count')
  words = [str(device)] if device is not None else []
  words += [f'{count} devices'] if count is not None and count > 1 else []
  if about.get('platform') in {'cpu', None}:
    words += [str(about['cpu'])] if about.get('cpu') else []
    words += [f'{about["cpu_cores"]} cores'] if about.get('cpu_cores') else []
  return ', '.join(words) or None


def _named(condition: Any) -> str:
  return 'not named' if condition is None else str(condition)


def _task(name: str, record: Record) -> dict[str, Any]:
  about = (record.config.get('tasks') or {}).get(name, {})
  return {'task': f'{str(about.get("fingerprint"))[:12]}, {about.get("documents")} documents'}


def _text(name: str, record: Record) -> dict[str, Any]:
  """The text of this name (the first one: ''), and how it is cut and tokenized."""
  config, texts = record.config, record.config.get('texts')
  text = config.get('text')
  if isinstance(texts, dict) and texts:
    about = texts.get(name) if name else next(iter(texts.values()))
    text = None
    if isinstance(about, dict):
      text = f'{str(about.get("fingerprint"))[:12]}, {about.get("windows")} windows'
  return {
    'text': text,
    'window length': config.get('seq_len'),
    'bos': config.get('bos'),
    'bytes of the predicted tokens': _predicted_bytes(name, record),
  }


def _predicted_bytes(name: str, record: Record) -> int | None:
  """Another tokenizer cuts the same text into other tokens, whose bytes tell."""
  suffix = f':{name}' if name else ''
  total, bits = record.value(f'nll_sum{suffix}'), record.value(f'bits_per_byte{suffix}')
  if total is None or not bits or not math.isfinite(total / bits):
    return None
  return round(total / math.log(2) / bits)
