"""What the plugin costs, side by side with what users would have otherwise.

    python -m tests.benchmarks [NAME ...] [--quick]

Nothing here asserts: a bar stands in the table beside what was measured. Not part of the timed tests.
"""

import os

# Before torch is imported, and for the processes that are started: one thread, no network, the plugin off
# unless a benchmark turns it on.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
os.environ.pop("HF_PACKFIX", None)
os.environ.pop("HF_PACKFIX_FAST_RNN", None)
