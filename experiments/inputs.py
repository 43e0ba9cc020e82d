"""The inputs of the main job: a model, its texts, and the windows that are cut from them."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import base as embedded
from experiments import common, exams, study
from experiments.costs import Costs
from experiments.lessons import School
from model import corpus
from model.eval import perplexity, records
from model.tokenizer import Tokenizer, window_bos
from model.transformer import Transformer

DEFAULT_SEQ_LEN = 512
CALIBRATION_TOKENS = 32_768
SMOKE_ROWS, SMOKE_WINDOWS, SMOKE_DOCUMENTS = 8, 16, 16
HELD_OUT = 'held_out.txt'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """A model, its tokenizer and the texts."""

  model: Transformer
  tokenizer: Tokenizer
  texts: Mapping[str, corpus.Corpus]  # by name
  name: str
  about: dict  # for the records: how the model was trained here, or the hash of its file
  seq_len: int  # the default length of a window
  said: tuple[str, ...] = ()  # what of the model was not loaded as it is stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How much text is used and how often is timed; None takes the default.

  tasks: names of `model.eval.library_tasks`. task_documents: how many of each; None: all.
  """

  seq_len: int | None = None
  calibration_rows: int | None = None
  max_windows: int | None = None
  prompt_length: int = 128
  rounds: int = 7
  seed: int = 0
  costs: Costs = Costs()
  tasks: tuple[str, ...] = ()
  task_documents: int | None = None


def load(
  model: str | None,
  texts: Sequence[str],
  *,
  seed: int,
  smoke: bool = False,
  plan: embedded.Plan | None = None,
) -> Inputs:
  """Loads a model and texts; without a model, the embedded base model and its corpus.

  `plan` is that of another base model.

  Raises:
    ValueError: the model or a text cannot be read, two texts have the same name, the model has no
      tokenizer, or there is a text without a model.
  """
  if model is None:
    if texts:
      raise ValueError('--text needs a --model; without one the base model brings its own corpus')
    trained = embedded.load_or_train(common.cache_folder(), seed=seed, smoke=smoke, plan=plan)
    return _embedded(trained)
  _check_names(texts)
  said = []
  loaded, tokenizer = common.load_model(model, said=said)
  return Inputs(
    model=loaded,
    tokenizer=tokenizer,
    texts={corpus.name(text): corpus.load(text) for text in texts or [corpus.SOURCE]},
    name=model,
    about=_hash(pathlib.Path(model)),
    seq_len=min(DEFAULT_SEQ_LEN, loaded.config.max_positions),
    said=tuple(said),
  )


def make_study(inputs: Inputs, protocol: Protocol) -> study.Study:
  """Cuts the texts into windows and rows. Raises ValueError if they are too short."""
  seq_len = protocol.seq_len or inputs.seq_len
  bos_id = window_bos(inputs.tokenizer, inputs.model.config, 'auto')
  texts = {}
  for name, text in inputs.texts.items():
    tokens_T, ends_T = _held_out_tokens(inputs.tokenizer, text)
    texts[name] = perplexity.windows(tokens_T, ends_T, seq_len, protocol.max_windows, bos_id)
    perplexity.check(inputs.model, texts[name])
  rows = protocol.calibration_rows or -(-CALIBRATION_TOKENS // seq_len)
  work = study.Study(
    base=inputs.model,
    said=inputs.said,
    calibration_BT=_calibration_rows(inputs, seq_len, rows, bos_id),
    texts=texts,
    settings={},
    environment=records.environment(),
    seed=protocol.seed,
    rounds=protocol.rounds,
    costs=protocol.costs,
    prompt_length=min(protocol.prompt_length, inputs.model.config.max_positions // 2),
    exams=exams.load(protocol.tasks, inputs.tokenizer, protocol.task_documents),
    school=School(
      original=inputs.model,
      tokenizer=inputs.tokenizer,
      texts=[text for part in inputs.texts.values() for text in part.train],
      seq_len=seq_len,
      seed=protocol.seed,
    ),
  )
  return dataclasses.replace(work, settings=_settings(inputs, work))


def write_held_out(
  folder: pathlib.Path, inputs: Inputs, texts: Mapping[str, perplexity.Windows]
) -> None:
  """Writes the text of the windows, so that `evaluate` measures the same tokens.

  The first text becomes `held_out.txt`, another one `held_out_NAME.txt`.
  """
  for i, (name, windows) in enumerate(texts.items()):
    file = folder / (f'held_out_{name}.txt' if i else HELD_OUT)
    file.write_bytes(_held_out(inputs.tokenizer, inputs.texts[name], windows).encode())


def _held_out(tokenizer: Tokenizer, text: corpus.Corpus, windows: perplexity.Windows) -> str:
  """The text of which the tokenizer makes these windows and no other.

  The last word of a text that is cut may become other tokens than it is within the text. So the cut
  moves on until the text gives the same windows, and no more of them.
  """
  held_out = ''.join(text.held_out)
  tokens_T, ends_T = _held_out_tokens(tokenizer, text)
  text_len = windows.text_len
  size = len(windows.tokens_BT) * text_len
  for end in ends_T[size - 1 : size - 1 + text_len]:
    cut = held_out.encode()[:end].decode(errors='ignore')
    again_T = tokenizer.encode(cut)
    if len(again_T) < size + text_len and np.array_equal(again_T[:size], tokens_T[:size]):
      return cut
  return held_out


def _embedded(trained: embedded.Embedded) -> Inputs:
  return Inputs(
    model=trained.model,
    tokenizer=trained.tokenizer,
    texts={corpus.SOURCE: trained.texts},
    name='embedded default',
    about=trained.about,
    seq_len=trained.about['plan']['seq_len'],
  )


def _settings(inputs: Inputs, work: study.Study) -> dict:
  """What the records say of model, text and protocol."""
  return {
    'model': inputs.name,
    **inputs.about,
    'texts': {name: _about_text(inputs.texts[name], work.texts[name]) for name in work.texts},
    'seq_len': work.text.seq_len,
    'bos': work.text.bos,
    'calibration_rows': len(work.calibration_BT),
    'activations': str(inputs.model.dtype),
    'batch': study.BATCH,
    'prompt_length': work.prompt_length,
    'decode_steps': study.DECODE_STEPS,
    **work.costs.settings,
    **({'tasks': exams.about(work.exams)} if work.exams else {}),
  }


def _about_text(text: corpus.Corpus, windows: perplexity.Windows) -> dict:
  return {
    'source': text.source,
    'fingerprint': text.fingerprint,
    'windows': len(windows.tokens_BT),
  }


def _calibration_rows(inputs: Inputs, seq_len: int, count: int, bos_id) -> np.ndarray:
  """Rows of all texts, equally many of each: [rows, seq_len]."""
  texts = list(inputs.texts.values())
  shares = [len(part) for part in np.array_split(np.arange(count), len(texts))]
  return np.concatenate(
    [
      common.calibration_rows(inputs.tokenizer, text, seq_len, share, bos_id=bos_id)
      for text, share in zip(texts, shares)
      if share
    ]
  )


def _check_names(texts: Sequence[str]) -> None:
  counts = collections.Counter(map(corpus.name, texts))
  twice = sorted(name for name, count in counts.items() if count > 1)
  if twice:
    raise ValueError(f'--text names {", ".join(twice)} twice; a text is known by its name')


def _hash(file: pathlib.Path) -> dict:
  """The hash of a checkpoint that is one file."""
  if not file.is_file():
    return {}
  with file.open('rb') as opened:
    return {'model_sha256': hashlib.file_digest(opened, 'sha256').hexdigest()}


def _held_out_tokens(tokenizer: Tokenizer, text: corpus.Corpus):
  return tokenizer.encode_with_bytes(''.join(text.held_out))
