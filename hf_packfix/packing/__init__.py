"""What a PackedSequence means: one leaf that stands for B sequences. Imports torch alone.

``packed.py`` is about one of them, ``jagged.py`` about its values and lengths, ``windows.py`` about windows of its
steps, ``trees.py`` about those in a nested batch, ``steps.py`` about padded tensors with a mask, ``evaluation.py``
about what an evaluation keeps.
"""
