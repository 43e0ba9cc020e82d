"""Metrics in Prometheus' form, by the names that vLLM gives them.

See https://docs.vllm.ai/en/stable/usage/metrics/. Counters and gauges of the engine are read when
they are asked for.
"""

import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from experiments.serving.choice import Choice

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
LONG_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
# name -> what, the engine's own name
GAUGES = {
  'vllm:num_requests_running': ('Requests that have a slot.', 'running'),
  'vllm:num_requests_waiting': ('Requests that wait for a slot.', 'waiting'),
  'vllm:kv_cache_usage_perc': ('Share of the cache that is in use, 1 for all.', 'cache_usage'),
}
COUNTERS = {
  'vllm:prompt_tokens': ('Tokens of prompts.', 'prompt_tokens'),
  'vllm:generation_tokens': ('Tokens that were generated.', 'generated_tokens'),
  'vllm:prefix_cache_queries': ('Tokens that were looked for in the cache.', 'prefix_queries'),
  'vllm:prefix_cache_hits': ('Tokens that were found in the cache.', 'prefix_hits'),
  'vllm:num_preemptions': ('Requests that lost their slot for a while.', 'preemptions'),
  'vllm:spec_decode_num_draft_tokens': ('Tokens that were drafted.', 'drafted'),
  'vllm:spec_decode_num_accepted_tokens': ('Drafted tokens that were accepted.', 'accepted'),
}
HISTOGRAMS = {
  'vllm:time_to_first_token_seconds': ('From arrival to the first token.', SECONDS),
  'vllm:inter_token_latency_seconds': ('Between tokens of a choice.', SECONDS),
  'vllm:request_time_per_output_token_seconds': ('Mean per token after the first.', SECONDS),
  'vllm:e2e_request_latency_seconds': ('From arrival to the end.', LONG_SECONDS),
  'vllm:request_prompt_tokens': ('Tokens of a prompt.', TOKENS),
  'vllm:request_generation_tokens': ('Tokens of a continuation.', TOKENS),
}


class _OfEngine(Collector):
  """The engine's counters at the time of the question."""

  def __init__(self, engine, model: str):
    self._engine, self._model = engine, model

  def collect(self) -> Iterator[Metric]:
    for families, rows in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
      for name, (what, own) in rows.items():
        family = families(name, what, labels=['model_name'])
        family.add_metric([self._model], float(getattr(self._engine.metrics, own)))
        yield family


class Metrics:
  """The metrics of one server."""

  def __init__(self, engine, model: str):
    self.registry = prometheus_client.CollectorRegistry()
    self.registry.register(_OfEngine(engine, model))
    prometheus_client.ProcessCollector(registry=self.registry)  # memory, processor time, files
    labels = {'labelnames': ['model_name'], 'registry': self.registry}
    self._histograms = {
      name: prometheus_client.Histogram(name, what, buckets=buckets, **labels).labels(model)
      for name, (what, buckets) in HISTOGRAMS.items()
    }
    labels['labelnames'] = ['model_name', 'finished_reason']
    ended = prometheus_client.Counter('vllm:request_success', 'Choices that have ended.', **labels)
    self._ended = {reason: ended.labels(model, reason) for reason in ('stop', 'length', 'abort')}

  def text(self) -> bytes:
    return prometheus_client.generate_latest(self.registry)

  def watch(self) -> 'Watch':
    return Watch(self)

  def observe(self, name: str, value: float) -> None:
    self._histograms[f'vllm:{name}'].observe(value)

  def ended(self, reason: str) -> None:
    self._ended[reason].inc()


class Watch:
  """The times of one choice."""

  def __init__(self, metrics: Metrics):
    self._metrics, self._start = metrics, time.perf_counter()
    self._first = self._last = None

  def tokens(self, count: int) -> None:
    """So many tokens have come now."""
    now = time.perf_counter()
    if self._first is None:
      self._first = now
      self._metrics.observe('time_to_first_token_seconds', now - self._start)
    else:
      for _ in range(count):
        self._metrics.observe('inter_token_latency_seconds', (now - self._last) / count)
    self._last = now

  def end(self, choice: Choice) -> None:
    """The choice has ended, or nobody waits for it any more."""
    self._metrics.ended(choice.finish or 'abort')
    self._metrics.observe('e2e_request_latency_seconds', time.perf_counter() - self._start)
    self._metrics.observe('request_prompt_tokens', len(choice.request.prompt))
    self._metrics.observe('request_generation_tokens', choice.tokens)
    if choice.tokens > 1:
      each = (self._last - self._first) / (choice.tokens - 1)
      self._metrics.observe('request_time_per_output_token_seconds', each)
