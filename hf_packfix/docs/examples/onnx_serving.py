"""Train packed, export to ONNX, serve with onnxruntime: does a word end with the letter that it begins with?

The exported program takes padded batches with a mask, of any number of rows and any length. The script is tested with
torch 2.13 and 2.15, and needs onnx, onnxscript and onnxruntime; a process that only serves needs onnxruntime, NumPy.
"""

import random

import numpy as np
import onnxruntime
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence
from hf_packfix.models import RecurrentConfig, RecurrentForSequenceClassification

LETTERS = "_abcdef"  # the first one is padding


def row():
    word = random.choices(LETTERS[1:], k=random.randint(2, 12))
    if random.random() < 0.5:
        word[-1] = word[0]
    return {"input_ids": [LETTERS.index(letter) for letter in word], "labels": int(word[0] == word[-1])}


def export(model, path):
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("steps")}
    example = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    program = torch.onnx.export(
        model.cpu().eval(),
        kwargs=example,
        dynamic_shapes=dict.fromkeys(example, axes),
        output_names=["logits"],
        dynamo=True,
    )
    program.save(path)


def serve(session, words):
    """Return the predicted class of each word, a list of ids."""
    ids = np.zeros((len(words), max(map(len, words))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, word in enumerate(words):
        ids[number, : len(word)], mask[number, : len(word)] = word, 1
    (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})
    return logits.argmax(-1)


set_seed(0)
train, test = [row() for _ in range(8000)], [row() for _ in range(500)]
config = RecurrentConfig("lstm", vocab_size=len(LETTERS), hidden_size=48, num_labels=2, pad_token_id=0)
arguments = TrainingArguments(
    "onnx_serving_output",
    num_train_epochs=5,
    learning_rate=1e-2,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=64,
    logging_steps=125,
    save_strategy="no",
    report_to=[],
)
model = RecurrentForSequenceClassification(config)
trainer = Trainer(model, arguments, DataCollatorForPackedSequence(), train_dataset=train)
trainer.train()
packed = trainer.predict(test).predictions.argmax(-1)

export(model, "words.onnx")
session = onnxruntime.InferenceSession("words.onnx")
served = np.concatenate([serve(session, [row["input_ids"] for row in test[n : n + 50]]) for n in range(0, 500, 50)])
print(f"same predictions as the packed model: {(served == packed).mean():.3f}")
print(f"accuracy in onnxruntime: {(served == [row['labels'] for row in test]).mean():.3f}")  # a guess: 0.58
