"""The inputs of the main job: a model, its texts, and the windows that are cut from them."""

import dataclasses
import pathlib

import numpy as np

from experiments import base as embedded
from experiments import common, study
from model import corpus, hf
from model.eval import perplexity, records
from model.tokenizer import Tokenizer
from model.transformer import Transformer

DEFAULT_SEQ_LEN = 512
CALIBRATION_TOKENS = 32_768
SMOKE_ROWS, SMOKE_WINDOWS = 8, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """A model, its tokenizer and the texts."""

  model: Transformer
  tokenizer: Tokenizer
  texts: corpus.Corpus
  name: str
  trained: dict  # the settings of its training, if it was trained here
  seq_len: int  # the default length of a window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How much text is used and how often is timed; None takes the default."""

  seq_len: int | None = None
  calibration_rows: int | None = None
  max_windows: int | None = None
  prompt_length: int = 128
  rounds: int = 7
  seed: int = 0


def load(model: str | None, text: str | None, *, seed: int, smoke: bool) -> Inputs:
  """Loads a model and a text; without a model, the embedded base model and its corpus.

  Raises:
    ValueError: the model or the text cannot be read, the model has no tokenizer, or there is a text
      without a model.
  """
  if model is None:
    if text is not None:
      raise ValueError('--text needs a --model; without one the base model brings its own corpus')
    return _embedded(embedded.load_or_train(common.cache_folder(), seed=seed, smoke=smoke))
  loaded, tokenizer = hf.load_pretrained(model)
  if tokenizer is None:
    raise ValueError(f'{model} has no tokenizer; put its tokenizer.json into the folder')
  return Inputs(
    model=loaded,
    tokenizer=tokenizer,
    texts=corpus.load(text),
    name=model,
    trained={},
    seq_len=min(DEFAULT_SEQ_LEN, loaded.config.max_positions),
  )


def make_study(inputs: Inputs, protocol: Protocol) -> study.Study:
  """Cuts the texts into windows and rows. Raises ValueError if they are too short."""
  seq_len = protocol.seq_len or inputs.seq_len
  tokens_T, ends_T = _held_out_tokens(inputs)
  text = perplexity.windows(tokens_T, ends_T, seq_len, protocol.max_windows)
  perplexity.check(inputs.model, text)
  rows = protocol.calibration_rows or -(-CALIBRATION_TOKENS // seq_len)
  calibration_BT = common.calibration_rows(inputs.tokenizer, inputs.texts, seq_len, rows)
  work = study.Study(
    base=inputs.model,
    calibration_BT=calibration_BT,
    text=text,
    settings={},
    environment=records.environment(),
    seed=protocol.seed,
    rounds=protocol.rounds,
    prompt_length=min(protocol.prompt_length, inputs.model.config.max_positions // 2),
  )
  return dataclasses.replace(work, settings=_settings(inputs, work))


def write_held_out(path: pathlib.Path, inputs: Inputs, windows: perplexity.Windows) -> None:
  """Writes the text of the windows, so that `evaluate` measures the same tokens.

  The last word of a text that is cut may become other tokens than it is within the text. So the cut
  moves on until the text gives the same windows, and no more of them.
  """
  held_out = ''.join(inputs.texts.held_out)
  tokens_T, ends_T = _held_out_tokens(inputs)
  size, seq_len = windows.tokens_BT.size, windows.seq_len
  for end in ends_T[size - 1 : size - 1 + seq_len]:
    text = held_out.encode()[:end].decode(errors='ignore')
    again_T = inputs.tokenizer.encode(text)
    if len(again_T) < size + seq_len and np.array_equal(again_T[:size], tokens_T[:size]):
      break
  else:
    text = held_out
  path.write_bytes(text.encode())


def _embedded(trained: embedded.Embedded) -> Inputs:
  return Inputs(
    model=trained.model,
    tokenizer=trained.tokenizer,
    texts=trained.texts,
    name='embedded default',
    trained=trained.about,
    seq_len=trained.about['plan']['seq_len'],
  )


def _settings(inputs: Inputs, work: study.Study) -> dict:
  """What the records say of model, text and protocol."""
  return {
    'model': inputs.name,
    **inputs.trained,
    'corpus': inputs.texts.source,
    'corpus_fingerprint': inputs.texts.fingerprint,
    'seq_len': work.text.seq_len,
    'windows': len(work.text.tokens_BT),
    'calibration_rows': len(work.calibration_BT),
    'activations': str(inputs.model.dtype),
    'batch': study.BATCH,
    'prompt_length': work.prompt_length,
    'decode_steps': study.DECODE_STEPS,
  }


def _held_out_tokens(inputs: Inputs):
  return inputs.tokenizer.encode_with_bytes(''.join(inputs.texts.held_out))
