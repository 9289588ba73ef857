"""Recurrent layers that train over packed sequences at full speed on a CPU.

``LSTM``, ``GRU`` and ``RNN`` are torch's layers with another backward; ``run`` does the same for a layer of torch's
own. What is covered, and what is left to torch, is listed in ``hf_packfix/rnn/coverage.py``.
"""

from hf_packfix.rnn.layers import GRU, LSTM, RNN
from hf_packfix.rnn.stack import run

__all__ = ["GRU", "LSTM", "RNN", "run"]
