"""Adapter folders in the format of the library PEFT, in and out.

  model, config = peft.load('adapter', base_model)
  peft.save(model, 'adapter')

A folder holds adapter_config.json and adapter_model.safetensors. https://github.com/huggingface/peft
(docs/source/developer_guides/checkpoint.md) describes both.
"""

from model.peft.fields import PeftConfig
from model.peft.folder import load, save

__all__ = ['PeftConfig', 'load', 'save']
