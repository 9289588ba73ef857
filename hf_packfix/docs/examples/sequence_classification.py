"""Sequence classification: does a review praise more than it blames?

A "not" turns the word behind it around, so counting words is no better than a guess. A GRU that reads the words in
order gets nearly all of them right. Reviews have one to five judgements; no row is padded.
"""

import random

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification

SUBJECTS = ["plot", "cast", "music", "ending", "dialogue"]
PRAISE, BLAME = ["great", "funny", "moving", "clever"], ["dull", "weak", "silly", "boring"]
WORDS = ["the", "is", "not", "and", *SUBJECTS, *PRAISE, *BLAME]


def review():
    """Return the words of a review, and 1 if it praises more than it blames."""
    clauses, score = [], 0
    for _ in range(random.choice([1, 3, 5])):
        praises, negated = random.random() < 0.5, random.random() < 0.5
        verdict = random.choice(PRAISE if praises else BLAME)
        clauses.append(f"the {random.choice(SUBJECTS)} is {'not ' if negated else ''}{verdict}")
        score += 1 if praises != negated else -1
    return " and ".join(clauses).split(), int(score > 0)


def row():
    words, label = review()
    return {"input_ids": [WORDS.index(word) for word in words], "labels": label}


def compute_metrics(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
train, test = [row() for _ in range(4000)], [row() for _ in range(1000)]
model = RecurrentForSequenceClassification(
    RecurrentConfig(cell_type="gru", vocab_size=len(WORDS), hidden_size=64, num_labels=2)
)
arguments = TrainingArguments(
    "sequence_classification_output",
    num_train_epochs=4,
    learning_rate=5e-3,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=128,
    logging_steps=125,
    save_strategy="no",
    report_to=[],
)
trainer = Trainer(
    model=model,
    args=arguments,
    data_collator=DataCollatorForPackedSequence(),
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=compute_metrics,
)
trainer.train()
print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")  # a guess: 0.5
