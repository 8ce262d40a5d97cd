"""A layer and its params in one file, which is data and runs no code."""

from jlstm.saved.layer import load, save

__all__ = ["load", "save"]
