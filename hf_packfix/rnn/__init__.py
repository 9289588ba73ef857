"""Recurrent layers over packed sequences at full speed, on a CPU and on a GPU.

``LSTM``, ``GRU`` and ``RNN`` make torch's layers with operators of ours; ``run`` runs one of torch's own with them.
For models and the patch: ``call``, the same with hooks, and ``faster``, which makes such a ``forward``. What is
covered, and what is left to torch, is listed in ``hf_packfix/rnn/coverage.py``.
"""

from hf_packfix.rnn.layers import GRU, LSTM, RNN, run
from hf_packfix.rnn.layers import call as call
from hf_packfix.rnn.layers import faster as faster

__all__ = ["GRU", "LSTM", "RNN", "run"]
