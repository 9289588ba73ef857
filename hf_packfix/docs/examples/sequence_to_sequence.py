"""Sequence to sequence: from the words of a number to its digits, "two thousand five" to 2005.

An encoder-decoder trains in a `Seq2SeqTrainer`, which generates in evaluation (`predict_with_generate`). Sources have
1 to 6 words and targets 1 to 4 digits; both are packed, and no row is padded.
"""

import random

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentEncoderDecoder, RecurrentEncoderDecoderConfig

UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
UNITS += "sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
PAD, START, END = range(3)
TOKENS = ["<pad>", "<s>", "</s>", *"0123456789", *UNITS, *TENS, "hundred", "thousand"]


def say(number):
    """Return the words of a number from 1 to 9,999; none for 0."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            return [UNITS[number // size], name, *say(number % size)]
    if number >= 20:
        return [TENS[number // 10 - 2], *say(number % 10)]
    return [UNITS[number]] if number else []


def row(number):
    source, target = say(number), [*str(number), "</s>"]
    return {"input_ids": [TOKENS.index(word) for word in source], "labels": [TOKENS.index(digit) for digit in target]}


def digits(tokens):
    """Return the digits among tokens that were generated, or among labels padded with -100."""
    return "".join(TOKENS[token] for token in tokens if token > END)


def compute_metrics(prediction):
    found, expected = map(digits, prediction.predictions), map(digits, prediction.label_ids)
    return {"accuracy": sum(map(str.__eq__, found, expected)) / len(prediction.label_ids)}


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
numbers = random.sample(range(1, 10_000), 8_500)
config = RecurrentEncoderDecoderConfig(
    vocab_size=len(TOKENS),
    embedding_size=32,
    hidden_size=128,
    pad_token_id=PAD,
    bos_token_id=START,
    eos_token_id=END,
)
arguments = Seq2SeqTrainingArguments(
    "sequence_to_sequence_output",
    num_train_epochs=3,
    learning_rate=8e-3,
    lr_scheduler_type="cosine",
    warmup_steps=20,
    per_device_train_batch_size=64,
    per_device_eval_batch_size=250,
    predict_with_generate=True,
    logging_steps=50,
    save_strategy="no",
    report_to=[],
)
train, test = [row(number) for number in numbers[500:]], [row(number) for number in numbers[:500]]
model, collator = RecurrentEncoderDecoder(config), DataCollatorForPackedSequence()
trainer = Seq2SeqTrainer(model, arguments, collator, train, test, compute_metrics=compute_metrics)
trainer.train()
print(f"whole numbers that are right: {trainer.evaluate()['eval_accuracy']:.3f}")
