"""Packages that are there only where an extra was installed."""

from __future__ import annotations

import importlib
from typing import Any


def import_optional(name: str, extra: str = "train") -> Any:
    """Imports a module of an extra.

    Raises:
      ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f'{package} is not installed; run pip install "jlstm[{extra}]"'
        ) from None
