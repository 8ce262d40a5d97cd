"""Cells, each of which computes one time step; a file holds one formula."""

from jlstm.cells.cifg import CIFG, CIFGCarry, CIFGParams, cifg_step
from jlstm.cells.constraints import (
    ClipCarry,
    ResidualCell,
    WeightNorm,
    WeightNormParams,
)
from jlstm.cells.conv_lstm import ConvLSTM, ConvLSTMParams, conv_lstm_step
from jlstm.cells.convolution import convolve
from jlstm.cells.dropout import DropConnect, VariationalDropout, Zoneout
from jlstm.cells.elman import Elman, ElmanCarry, ElmanParams, elman_step
from jlstm.cells.gates import (
    activate,
    add_vector,
    affine,
    fresh,
    gates,
    heads_product,
    named,
    normalise,
    positive,
    row,
    sigmoid,
    tanh,
)
from jlstm.cells.gru import (
    GRU,
    GRUCarry,
    GRUParams,
    gru_reset_before_step,
    gru_step,
)
from jlstm.cells.gru_d import GRUD, GRUDCarry, GRUDInput, GRUDParams, gru_d_step
from jlstm.cells.ind_rnn import IndRNN, IndRNNCarry, IndRNNParams, ind_rnn_step
from jlstm.cells.layer_norm_gru import (
    LayerNormGRU,
    LayerNormGRUParams,
    layer_norm_gru_step,
)
from jlstm.cells.layer_norm_lstm import (
    LayerNormLSTM,
    LayerNormLSTMParams,
    layer_norm_lstm_step,
)
from jlstm.cells.lru import LRU, LRUCarry, LRUParams, lru_step
from jlstm.cells.lstm import LSTM, LSTMCarry, LSTMParams, lstm_step
from jlstm.cells.lstmp import LSTMP, LSTMPCarry, LSTMPParams, lstmp_step
from jlstm.cells.mgu import MGU, MGUCarry, MGUParams, mgu_reset_after_step, mgu_step
from jlstm.cells.min_gru import MinGRU, MinGRUCarry, MinGRUParams, min_gru_step
from jlstm.cells.min_lstm import MinLSTM, MinLSTMCarry, MinLSTMParams, min_lstm_step
from jlstm.cells.mlstm import MLSTM, MLSTMCarry, MLSTMParams, mlstm_step
from jlstm.cells.multi_head_gru import (
    MultiHeadGRU,
    MultiHeadGRUParams,
    multi_head_gru_step,
)
from jlstm.cells.multi_head_lstm import (
    MultiHeadLSTM,
    MultiHeadLSTMParams,
    multi_head_lstm_step,
)
from jlstm.cells.peephole import (
    PeepholeLSTM,
    PeepholeLSTMCarry,
    PeepholeLSTMParams,
    peephole_lstm_step,
)
from jlstm.cells.slstm import SLSTM, SLSTMCarry, SLSTMParams, slstm_step
from jlstm.cells.time_lstm import (
    TimeLSTM,
    TimeLSTMInput,
    TimeLSTMParams,
    inverse,
    inverse_log,
    time_lstm_step,
)
from jlstm.cells.wrappers import Precision, Wrapper, prepare

__all__ = [
    "CIFG",
    "GRU",
    "GRUD",
    "LRU",
    "LSTM",
    "LSTMP",
    "MGU",
    "MLSTM",
    "SLSTM",
    "CIFGCarry",
    "CIFGParams",
    "ClipCarry",
    "ConvLSTM",
    "ConvLSTMParams",
    "DropConnect",
    "Elman",
    "ElmanCarry",
    "ElmanParams",
    "GRUCarry",
    "GRUDCarry",
    "GRUDInput",
    "GRUDParams",
    "GRUParams",
    "IndRNN",
    "IndRNNCarry",
    "IndRNNParams",
    "LRUCarry",
    "LRUParams",
    "LSTMCarry",
    "LSTMPCarry",
    "LSTMPParams",
    "LSTMParams",
    "LayerNormGRU",
    "LayerNormGRUParams",
    "LayerNormLSTM",
    "LayerNormLSTMParams",
    "MGUCarry",
    "MGUParams",
    "MLSTMCarry",
    "MLSTMParams",
    "MinGRU",
    "MinGRUCarry",
    "MinGRUParams",
    "MinLSTM",
    "MinLSTMCarry",
    "MinLSTMParams",
    "MultiHeadGRU",
    "MultiHeadGRUParams",
    "MultiHeadLSTM",
    "MultiHeadLSTMParams",
    "PeepholeLSTM",
    "PeepholeLSTMCarry",
    "PeepholeLSTMParams",
    "Precision",
    "ResidualCell",
    "SLSTMCarry",
    "SLSTMParams",
    "TimeLSTM",
    "TimeLSTMInput",
    "TimeLSTMParams",
    "VariationalDropout",
    "WeightNorm",
    "WeightNormParams",
    "Wrapper",
    "Zoneout",
    "activate",
    "add_vector",
    "affine",
    "cifg_step",
    "conv_lstm_step",
    "convolve",
    "elman_step",
    "fresh",
    "gates",
    "gru_d_step",
    "gru_reset_before_step",
    "gru_step",
    "heads_product",
    "ind_rnn_step",
    "inverse",
    "inverse_log",
    "layer_norm_gru_step",
    "layer_norm_lstm_step",
    "lru_step",
    "lstm_step",
    "lstmp_step",
    "mgu_reset_after_step",
    "mgu_step",
    "min_gru_step",
    "min_lstm_step",
    "mlstm_step",
    "multi_head_gru_step",
    "multi_head_lstm_step",
    "named",
    "normalise",
    "peephole_lstm_step",
    "positive",
    "prepare",
    "row",
    "sigmoid",
    "slstm_step",
    "tanh",
    "time_lstm_step",
]
