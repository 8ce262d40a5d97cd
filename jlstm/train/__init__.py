"""Training: compiled steps, a loop with hooks, losses, optimisers and checkpoints.

You write a loss function ``loss_fn(params, batch, *, key, carry) -> (loss, Aux)``.
:func:`make_train_step` compiles it to a step, :func:`fit` calls the step for each
batch, and hooks do the rest: they evaluate, log, and stop the run. Nothing here knows
of recurrence, so any JAX model can be trained.
"""

from jlstm.train.checkpoint import load, save
from jlstm.train.checkpoints import Checkpoints
from jlstm.train.files import Damaged, InUse
from jlstm.train.fingerprint import fingerprint, hash_tree
from jlstm.train.hooks import (
    Best,
    early_stopping,
    evaluate_every,
    every,
    keep_best,
    show_progress,
    write_jsonl,
    write_tensorboard,
)
from jlstm.train.loop import Hook, Report, fit
from jlstm.train.losses import (
    Mean,
    absolute_error,
    accuracy,
    average,
    bits,
    quantile_loss,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
)
from jlstm.train.optimizers import (
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Linear,
    Schedule,
    Steps,
    adamw,
    make_schedule,
    sgd,
)
from jlstm.train.parallel import data_parallel
from jlstm.train.plots import plot_metrics, read_jsonl
from jlstm.train.projected import projected_cross_entropy
from jlstm.train.script import (
    Options,
    describe,
    indifferent,
    run,
)
from jlstm.train.signals import Interrupted
from jlstm.train.state import LossScale, NonFiniteError, TrainState, create_state
from jlstm.train.step import (
    Aux,
    LossFn,
    evaluate,
    make_eval_step,
    make_train_step,
)
from jlstm.train.workdir import Workdir, environment
from jlstm.weights import load_weights, save_weights

__all__ = [
    "Aux",
    "Best",
    "Checkpoints",
    "Constant",
    "Cosine",
    "Damaged",
    "Exponential",
    "Hook",
    "InUse",
    "Interrupted",
    "InverseSqrt",
    "Linear",
    "LossFn",
    "LossScale",
    "Mean",
    "NonFiniteError",
    "Options",
    "Report",
    "Schedule",
    "Steps",
    "TrainState",
    "Workdir",
    "absolute_error",
    "accuracy",
    "adamw",
    "average",
    "bits",
    "create_state",
    "data_parallel",
    "describe",
    "early_stopping",
    "environment",
    "evaluate",
    "evaluate_every",
    "every",
    "fingerprint",
    "fit",
    "hash_tree",
    "indifferent",
    "keep_best",
    "load",
    "load_weights",
    "make_eval_step",
    "make_schedule",
    "make_train_step",
    "plot_metrics",
    "projected_cross_entropy",
    "quantile_loss",
    "read_jsonl",
    "run",
    "save",
    "save_weights",
    "sgd",
    "show_progress",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "write_jsonl",
    "write_tensorboard",
]
