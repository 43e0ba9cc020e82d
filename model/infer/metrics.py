"""The counts of an engine: plain numbers, to be read between its steps."""

import dataclasses


@dataclasses.dataclass(kw_only=True)
class Metrics:
  """Counts since the engine was made; `running`, `waiting` and `cache_usage` are current."""

  running: int = 0
  waiting: int = 0
  cache_usage: float = 0.0  # the share of all slots of the cache that hold a token
  prompt_tokens: int = 0  # of prompts that were read, the cached ones too
  generated_tokens: int = 0
  prefix_queries: int = 0  # tokens of prompts that were looked up among the kept ones
  prefix_hits: int = 0  # tokens that were found there
  preemptions: int = 0
  drafted: int = 0  # tokens that a draft proposed
  accepted: int = 0  # of these, the ones that were taken

  def with_those_of(self, other: 'Metrics') -> 'Metrics':
    """The counts of two engines together, with the cache usage of the fuller one."""
    total = {
      f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)
    }
    return Metrics(**{**total, 'cache_usage': max(self.cache_usage, other.cache_usage)})
