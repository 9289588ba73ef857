"""CTC: read a sequence of digits from a longer signal, without knowing where each digit stands.

Every digit is 2 to 6 noisy steps of 16 channels, with noise of 1 to 3 steps in between. Signals are packed. Digits are
padded, since a signal may have none; `torch.nn.functional.ctc_loss` aligns them.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence
from transformers import Trainer, TrainingArguments, set_seed

from hf_packfix import DataCollatorForPackedSequence, with_data

BLANK = 10  # the digits are 0 to 9


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(16, 64, bidirectional=True)
        self.head = nn.Linear(2 * 64, BLANK + 1)

    def forward(self, signal, labels):
        states, _ = self.gru(signal)
        logits = with_data(states, self.head(states.data))
        # ctc_loss takes padded tensors and lengths; it does not read beyond these.
        scores, steps = pad_packed_sequence(logits)  # [T, B, 11] and [B], in the order of the rows
        numbers = (labels != -100).sum(1)
        loss = nn.functional.ctc_loss(scores.log_softmax(-1), labels, steps, numbers, blank=BLANK)
        return {"loss": loss, "logits": logits}


def row(patterns):
    digits = torch.randint(10, (torch.randint(0, 9, ()),))
    pieces = [torch.zeros(torch.randint(1, 4, ()), 16)]
    for digit in digits:
        pieces += [patterns[digit].expand(torch.randint(2, 7, ()), 16), torch.zeros(torch.randint(1, 4, ()), 16)]
    signal = torch.cat(pieces)
    return {"signal": signal + 0.5 * torch.randn_like(signal), "labels": digits}


def read(scores):
    """Return the digits in scores [T, 11]: the best at every step, repetitions and blanks dropped."""
    best = scores[(scores != -100).all(-1)].argmax(-1).tolist()  # without padding
    return [now for before, now in zip([BLANK, *best], best) if now not in (before, BLANK)]


def compute_metrics(prediction):
    right = [
        read(scores) == [digit for digit in digits if digit != -100]
        for scores, digits in zip(prediction.predictions, prediction.label_ids.tolist())
    ]
    return {"accuracy": sum(right) / len(right)}


torch.set_num_threads(1)  # the steps of small layers are too short to share
set_seed(0)
patterns = torch.randn(10, 16)
arguments = TrainingArguments(
    "ctc_output",
    num_train_epochs=2,
    learning_rate=1e-2,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
    per_device_train_batch_size=32,
    lr_scheduler_type="cosine",
)
train, test = [row(patterns) for _ in range(1600)], [row(patterns) for _ in range(200)]
collate = DataCollatorForPackedSequence(padded_keys=["labels"])
trainer = Trainer(Reader(), arguments, collate, train, test, compute_metrics=compute_metrics)
trainer.train()
print(f"whole sequences that are right: {trainer.evaluate()['eval_accuracy']:.3f}")
