"""The data collator that packs. Imports torch and ``packing``, not transformers."""

from hf_packfix.collator.collator import DataCollatorForPackedSequence

__all__ = ["DataCollatorForPackedSequence"]
