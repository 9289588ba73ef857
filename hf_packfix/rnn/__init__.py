"""Recurrent layers over packed sequences at full speed on a CPU."""

from hf_packfix.rnn.run import run

__all__ = ["run"]
