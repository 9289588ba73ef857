"""Tagging: the kind of every character of Python code, learned from Python's own standard library.

A character belongs to a keyword, a name, a number, a string, a comment or an operator, or is a space; `tokenize`
knows. A bidirectional LSTM reads lines of 1 to 100 characters, and is tested on modules it has not seen.
"""

import argparse
import calendar
import csv
import inspect
import io
import keyword
import shelve
import textwrap
import tokenize

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentConfig, RecurrentForTokenClassification

SPACE, KEYWORD, NAME, NUMBER, STRING, COMMENT, OPERATOR = range(7)
KINDS = {tokenize.NAME: NAME, tokenize.NUMBER: NUMBER, tokenize.COMMENT: COMMENT, tokenize.OP: OPERATOR}
KINDS |= {number: STRING for number, name in tokenize.tok_name.items() if "STRING" in name}


def rows(*modules):
    """Return a row for every line of code, without those that a string of several lines reaches."""
    for source in map(inspect.getsource, modules):
        lines = source.splitlines()
        labels = [[SPACE] * len(line) for line in lines]
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            (line, start), (last_line, end) = token.start, token.end
            kind = KEYWORD if keyword.iskeyword(token.string) else KINDS.get(token.type)
            if kind is not None and line == last_line:
                labels[line - 1][start:end] = [kind] * (end - start)
            elif kind is not None:
                labels[line - 1 : last_line] = [[]] * (last_line - line + 1)
        for line, kinds in zip(lines, labels):
            if line and len(kinds) == len(line) <= 100:
                yield {"input_ids": [min(ord(character), 127) for character in line], "labels": kinds}


def compute_metrics(prediction):
    real = prediction.label_ids != -100  # labels [N, T]: shorter lines are padded with -100
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids)[real].mean()}


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
arguments = TrainingArguments(
    "tagging_output",
    num_train_epochs=1,
    learning_rate=1e-2,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=128,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(
    model=RecurrentForTokenClassification(
        RecurrentConfig("lstm", vocab_size=128, embedding_size=32, hidden_size=64, bidirectional=True, num_labels=7)
    ),
    args=arguments,
    data_collator=DataCollatorForPackedSequence(),
    train_dataset=list(rows(argparse, calendar, tokenize, inspect)),
    eval_dataset=list(rows(csv, shelve, textwrap)),
    compute_metrics=compute_metrics,
)
trainer.train()
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")  # if everything was a name: 0.5
