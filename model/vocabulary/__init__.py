"""Changing the vocabulary of a model: fewer tokens, other tokens, and a smaller table of them.

Each change is a function (model, tokenizer, ...) -> (model, tokenizer, report). It is no step of a
recipe: the pipeline is given calibration text that is cut into tokens already, and compares models
token by token, both of which need one tokenizer from beginning to end.
"""
