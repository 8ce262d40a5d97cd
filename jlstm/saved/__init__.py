"""Files that hold a layer and its params, as data: reading them runs no code."""

from jlstm.saved.layer import load, save

__all__ = ["load", "save"]
