"""The report: what it shows, that it is well formed and asks for nothing, that labels are apart."""

import html.parser
import itertools
import math

import numpy as np
import pytest
from matplotlib.image import imread

from model.eval import chart, columns, figures, report, select
from model.eval.chart import Box
from model.eval.records import Metric, Record

EVIL = '<script>alert("x")</script> & \'"><img src=x onerror=alert(1)>'
VOID = {'meta', 'br', 'img', 'link', 'input', 'hr'}
ENVIRONMENT = {
  'git_revision': 'abc123',
  'versions': {'jax': '0.0'},
  'date_utc': '2030-01-01T00:00:00+00:00',
}


def _record(recipe, ppl, size, **changes):
  metrics = {
    'ppl': Metric(ppl, '1', 1000),
    'ppl_ratio': Metric(ppl / 10, '1', 1000),
    'kl_to_base': Metric(0.0123, 'nat/token', 1000),
    'flip_rate': Metric(0.0456, '1', 1000),
    'linear_bytes': Metric(size * 20e6, 'byte'),
    'linear_bytes_vs_bf16': Metric(size, '1'),
    'bits_per_weight': Metric(16 * size, 'bit'),
    'stored_bytes': Metric(size * 20e6 + 5e6, 'byte'),
    'decode_tokens_per_s': Metric(1234.5, 'token/s', 7, 12.0),
    'decode_speedup': Metric(1.5, '1', 7, 0.125),
  }
  fields = {'command': f'run {recipe}', 'config': {}, 'environment': ENVIRONMENT, 'seed': 0}
  metrics |= changes.pop('metrics', {})
  return Record(experiment='e', recipe=recipe, metrics=metrics, **(fields | changes))


RECORDS = [
  _record('base', 10.0, 2.0),
  _record('int8', 10.05, 0.53),
  _record('int4', 10.4, 0.27, without_kernel=14),
  _record('int4-worse', 11.0, 0.28, metrics={'plugin_magic': Metric(7.5, 'widget', 3)}),
  _record(EVIL, 13.0, 0.2, ledger=({'layer': EVIL, 'event': 'fallback', 'detail': EVIL},)),
]
BARE = Record(
  experiment='e', recipe='bare', command='c', config={}, environment={}, seed=None, metrics={}
)


class Page(html.parser.HTMLParser):
  """Collects tags, attributes and text, and checks that what opens closes."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.tags, self.text = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f'</{tag}> closes nothing'

  def handle_data(self, data):
    self.text.append(((self.open or [''])[-1], data))

  def words(self):
    return ' '.join(data for tag, data in self.text if tag not in ('style', 'script'))


def test_numbers_that_are_not_finite_are_shown():
  metrics = {'ppl': Metric(math.nan, '1'), 'ppl_ratio': Metric(math.inf, '1')}
  records = [RECORDS[0], _record('diverged', 10, 0.5, metrics=metrics)]
  assert 'NaN' in Page(report.html(records)).words()
  assert len(chart.points(records)) == 1


@pytest.mark.parametrize(
  ('ratio', 'text'), [(1.0, '+0.00%'), (1.0123, '+1.23%'), (0.99, '-1.00%'), (12.345, '×12.35')]
)
def test_changes_of_perplexity(ratio, text):
  assert columns.change(ratio) == text


def test_bars_are_shares_of_the_longest():
  column = next(c for c in columns.COLUMNS if c.metric == 'ppl_ratio')
  ratios = [1.0, 1.1, 1.4, None, math.inf, 0.9]
  bars = [columns.bar_percent(r, column, ratios) for r in ratios]
  assert bars == [0, 25, 100, 0, 0, 0]


def test_the_page_is_well_formed_and_names_every_record():
  page = Page(report.html([*RECORDS, BARE], report.Page(use={EVIL: f'serve {EVIL}'})))
  words = page.words()
  for record in [*RECORDS, BARE]:
    assert words.count(record.recipe) >= 2 and record.command in words
  assert f'serve {EVIL}' in words and 'abc123' in words
  rows = sum(tag == 'th' and attrs.get('scope') == 'row' for tag, attrs in page.tags)
  assert rows == len(RECORDS) + 1


def test_nothing_is_fetched_and_nothing_injected():
  text = report.html(RECORDS, report.Page(title=EVIL, use={EVIL: EVIL}, protocol=(EVIL,)))
  page = Page(text)
  assert '://' not in text and 'url(' not in text and '@import' not in text
  assert sum(tag == 'script' for tag, _ in page.tags) == 1
  assert not {tag for tag, _ in page.tags} & {'img', 'link', 'iframe', 'object', 'embed'}
  for _, attributes in page.tags:
    assert not {'src', 'href', 'srcset', 'action'} & set(attributes)
    assert not any(name.startswith('on') for name in attributes)


def test_the_headline_is_the_choice():
  choice = select.choose(RECORDS, select.Budget(max_megabytes=16))
  assert choice.record.recipe == 'int8'
  page = Page(report.html(RECORDS, report.Page(choice=choice)))
  assert ('h1', choice.reason) in page.text
  assert [a['class'] for t, a in page.tags if t == 'tr' and a.get('class')] == ['reference', 'best']
  default = Page(report.html(RECORDS)).words()
  assert 'int4 is the smallest of the 2 recipes within 1.05 times' in default
  assert 'no kernel here, no speed-up expected' in default


def test_unknown_metrics_and_missing_ones():
  words = Page(report.html(RECORDS)).words()
  assert 'plugin_magic' in words and 'widget' in words
  bare = Page(report.html([BARE]))
  assert 'nothing to draw' in bare.words() and 'There is none' in bare.words()


def test_the_widened_perplexity_has_a_column_of_the_page_where_it_was_measured():
  title = 'perplexity vs base, weights widened'
  assert title not in Page(report.html(RECORDS)).words()
  fast = _record('fast', 10.09, 0.3, metrics={'widened_ppl_ratio': Metric(1.0012, '1', 1000)})
  page = Page(report.html([*RECORDS, fast]))
  assert title in page.words()
  cells = [data for tag, data in page.text if tag == 'td']
  assert '+0.90%' in cells and '+0.12%' in cells  # what was timed, and the same weights widened


def test_every_fallback_is_a_row():
  events = [{'layer': f'layers.{i}', 'event': 'skipped', 'detail': f'why {i}'} for i in range(30)]
  page = Page(report.html([RECORDS[0], _record('x', 11, 0.5, ledger=tuple(events))]))
  cells = [data for tag, data in page.text if tag in ('td', 'code')]
  for event in events:
    assert event['layer'] in cells and event['detail'] in cells


def test_environments_that_differ_are_told_apart():
  other = _record('elsewhere', 11, 0.5, environment=ENVIRONMENT | {'git_revision': 'def456'})
  later = _record('later', 11, 0.5, environment=ENVIRONMENT | {'date_utc': '2031'})
  words = Page(report.html([*RECORDS, other, later])).words()
  assert 'abc123' in words and 'def456' in words and 'elsewhere:' in words
  assert len(report._environments([RECORDS[0], later])) == 1


def test_the_static_picture_has_every_point_where_it_belongs():
  picture = figures.svg(RECORDS)
  assert {p.point.recipe for p in picture.points} == {r.recipe for r in RECORDS}
  kinds = {p.point.recipe: p.point.kind for p in picture.points}
  assert kinds == {
    'base': 'base',
    'int8': 'front',
    'int4': 'front',
    'int4-worse': 'other',
    EVIL: 'front',
  }
  by_size = sorted(picture.points, key=lambda p: p.point.size_ratio)
  by_loss = sorted(picture.points, key=lambda p: -p.point.ppl_ratio)
  assert by_size == sorted(picture.points, key=lambda p: p.x)
  assert by_loss == sorted(picture.points, key=lambda p: p.y)
  page = Page(report.html(RECORDS))
  marks = [a for t, a in page.tags if t == 'g' and 'point' in a.get('class', '')]
  assert len(marks) == len(RECORDS)


def test_the_front_is_a_staircase():
  steps = chart.front_steps(chart.points(RECORDS))
  assert steps[0] == (0.2, 1.3) and steps[-1] == (2.0, 1.0)
  for (x0, y0), (x1, y1) in itertools.pairwise(steps):
    assert (x0 == x1 and y1 < y0) or (y0 == y1 and x1 > x0)


@pytest.mark.parametrize('count', [1, 5, 25])
def test_labels_keep_off_points_and_each_other(rng, count):
  anchors = [tuple(p) for p in rng.uniform([100, 100], [500, 300], (count, 2)).tolist()]
  bounds = Box(0, 0, 800, 420)
  places = chart.place_labels(anchors, [(90.0, 15.0)] * count, bounds)
  assert None not in places
  for place in places:
    assert place.within(bounds)
    assert all(place.distance(anchor) >= chart.POINT_RADIUS for anchor in anchors)
  assert not any(a.overlaps(b) for a, b in itertools.combinations(places, 2))


def test_a_label_without_room_is_left_out():
  assert chart.place_labels([(5, 5)], [(90, 15)], Box(0, 0, 50, 50)) == [None]


@pytest.mark.parametrize(
  ('low', 'high', 'log'), [(0.98, 1.21, False), (0.9, 2.3, True), (1, 3000, True), (0, 1e-3, False)]
)
def test_ticks_are_within_and_legible_in_number(low, high, log):
  ticks = chart.ticks(low, high, log)
  assert 3 <= len(ticks) <= 9 and all(low <= t <= high for t in ticks)
  assert ticks == sorted(ticks)


@pytest.mark.parametrize(
  'records',
  [RECORDS, RECORDS[:1], [BARE], [*RECORDS, _record('$\\bad$ _x^', 300.0, 0.1)]],
  ids=['all', 'one', 'none', 'log axis and mathematics'],
)
def test_both_files_are_written_whole(tmp_path, records):
  page, figure = report.write(records, tmp_path / 'out')
  assert sorted(p.name for p in page.parent.iterdir()) == ['pareto.png', 'report.html']
  Page(page.read_text(encoding='utf-8'))
  pixels = imread(figure)
  assert pixels.shape[:2] == (1000, 1600) and np.unique(pixels[..., 0]).size > 10


def test_no_records_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='no records'):
    report.write([], tmp_path)
