"""Weights as libraries have them, of an LSTM of 8 units with 3 inputs, made up."""

from __future__ import annotations

from typing import Any

import numpy as np


def lstm_weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A state_dict of PyTorch."""
    rng = np.random.default_rng(0)
    shapes = {"weight_ih_l0": (32, 3), "weight_hh_l0": (32, 8)}
    shapes |= {"bias_ih_l0": (32,), "bias_hh_l0": (32,)}
    return {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}


def keras_weights(gates: int = 4, inputs: int = 3) -> list[np.ndarray]:
    """What ``get_weights`` of Keras returns."""
    rng = np.random.default_rng(0)
    shapes = [(inputs, gates * 8), (8, gates * 8), (gates * 8,)]
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


class Keras:
    """A layer of Keras, as it describes itself."""

    def __init__(self, weights: list[np.ndarray], **config: Any) -> None:
        self.weights, self.config = weights, config

    def get_config(self) -> dict[str, Any]:
        """Describes the layer."""
        return self.config

    def get_weights(self) -> list[np.ndarray]:
        """Returns the weights."""
        return self.weights


def keras_layer(kind: str, weights: list[np.ndarray], **config: Any) -> Keras:
    """Makes a layer whose class has a name."""
    config = {"activation": "tanh", "recurrent_activation": "sigmoid"} | config
    config = {"units": 8, "use_bias": True, "reset_after": True} | config
    return type(kind, (Keras,), {})(weights, **config)


def nested(kind: str, **config: Any) -> dict[str, Any]:
    """Describes a layer inside another one."""
    return {"class_name": kind, "config": keras_layer(kind, [], **config).config}
