"""Language model with `generate`: count in English words, across tens and hundreds.

The model reads pieces such as "thirty nine forty forty one", and then goes on from a number of its own: after "one
hundred nine" it must say "one hundred ten". Pieces have 2 to 24 words; no row is padded.
"""

import random

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentConfig, RecurrentForCausalLM

UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
UNITS += "sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = [*UNITS, *TENS, "hundred"]


def say(number):
    """Return the words of a number from 1 to 999; none for 0."""
    if number >= 100:
        return [UNITS[number // 100], "hundred", *say(number % 100)]
    if number >= 20:
        return [TENS[number // 10 - 2], *say(number % 10)]
    return [UNITS[number]] if number else []


def count(start, numbers):
    """Return the token ids of so many numbers from a start on."""
    return [WORDS.index(word) for number in range(start, start + numbers) for word in say(number)]


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
starts = random.sample(range(1, 990), 989)
held_out, learned = starts[:100], starts[100:]
pieces = [count(random.choice(learned), random.randint(2, 6)) for _ in range(6000)]
config = RecurrentConfig(cell_type="gru", vocab_size=len(WORDS), embedding_size=32, hidden_size=128, pad_token_id=0)
arguments = TrainingArguments(
    "language_model_output",
    num_train_epochs=3,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=64,
    logging_steps=50,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(
    model=RecurrentForCausalLM(config),
    args=arguments,
    data_collator=DataCollatorForPackedSequence(),
    train_dataset=[{"input_ids": piece, "labels": piece} for piece in pieces],
)
trainer.train()

model, right = trainer.model.eval(), 0
for start in held_out:  # two numbers as a prompt, three to be found
    prompt, expected = count(start, 2), count(start, 5)
    found = model.generate(torch.tensor([prompt]), max_new_tokens=len(expected) - len(prompt), do_sample=False)
    right += found[0].tolist() == expected
print(" ".join(WORDS[token] for token in found[0]))
print(f"counted on without a mistake: {right / len(held_out):.2f}")
