"""What a PackedSequence means: one leaf that stands for B sequences. Imports only torch.

``packed.py`` is about one of them, ``jagged.py`` about its values and lengths, ``windows.py`` about windows of its
steps, ``trees.py`` about those in a nested batch.
"""

from hf_packfix.packing.jagged import concatenate, from_jagged, take, to_jagged
from hf_packfix.packing.packed import (
    PackedSequence,
    batch_size,
    check,
    dtype_with,
    lengths,
    num_tokens,
    pad,
    pad_left,
    same_packing,
    with_data,
)
from hf_packfix.packing.trees import (
    LEAVES,
    check_alike,
    check_batch,
    contains,
    is_namedtuple,
    is_packed,
    leaves,
    map_data,
    map_leaves,
    map_packed,
    merge_packed,
    named_items,
    packed_in,
    rebuild,
    rows_of_keys,
)
from hf_packfix.packing.windows import Window, windows
