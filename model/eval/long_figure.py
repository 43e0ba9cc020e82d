"""A figure of long texts: costs and quality by context, one line for each mixer and cache."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.eval import needle
from model.eval.records import Record

PANELS = {  # title -> the metric that it needs, and its value in the unit of the title
  'prefill, s': ('prefill_s', 1),
  'decode, tokens/s': ('decode_tokens_per_s', 1),
  'cache, MB': ('cache_bytes', 1e-6),
  'perplexity up to here': ('ppl', 1),
  'needle: probability': ('needle_probability', 1),
}


def write(found: list[Record], path: str) -> None:
  """Draws one panel for each metric over the context, and one of needles over their depth."""
  panels = {title: one for title, one in PANELS.items() if any(one[0] in r.metrics for r in found)}
  by_depth = any('needle_probability' in record.metrics for record in found)
  count = len(panels) + by_depth
  figure = Figure(figsize=(3.3 * count, 3.4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, count, squeeze=False)[0]
  for axis, (title, (metric, factor)) in zip(axes, panels.items()):
    rows = [record for record in found if metric in record.metrics]
    for name, own in _by_name(rows).items():
      contexts = [r.config['context'] for r in own]
      axis.plot(contexts, [factor * r.value(metric) for r in own], marker='o', label=name)
    scale = 'linear' if metric.startswith('needle') else 'log'
    axis.set(title=title, xlabel='context, tokens', xscale='log', yscale=scale)
    contexts = sorted({record.config['context'] for record in rows})
    axis.set_xticks(contexts, [f'{context:,}' for context in contexts])
    axis.minorticks_off()
  if by_depth:
    _draw_depths(axes[-1], [record for record in found if 'needle_probability' in record.metrics])
  axes[-1].legend(fontsize=8)
  figure.savefig(path, dpi=120)


def _draw_depths(axis, rows: list[Record]) -> None:
  """The probability of the right word over the depth of the needle, at the longest context."""
  longest = max(record.config['context'] for record in rows)
  for name, (record,) in _by_name([r for r in rows if r.config['context'] == longest]).items():
    prefix = 'needle_probability:'
    depths = [float(key.removeprefix(prefix)) for key in record.metrics if key.startswith(prefix)]
    axis.plot(depths, [record.value(f'{prefix}{d}') for d in depths], marker='o', label=name)
  axis.axhline(needle.CHANCE, linestyle=':', color='grey')
  axis.set(title=f'needle in {longest:,} tokens', xlabel='depth', ylim=(0, 1))


def _by_name(rows: list[Record]) -> dict[str, list[Record]]:
  return {
    name: [r for r in rows if r.recipe == name] for name in dict.fromkeys(r.recipe for r in rows)
  }
