"""What type checkers and ``dir()`` see of the package: every public name, and no other."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import hf_packfix

GOOD = """\
# pyright: strict
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import hf_packfix
from hf_packfix import DataCollatorForPackedSequence, Status

hf_packfix.enable(fast_rnn=True)
status: Status = hf_packfix.status()
collator = DataCollatorForPackedSequence(tensor_keys=["labels"])
x: PackedSequence = pack_sequence([torch.ones(2)])
y: PackedSequence = hf_packfix.with_data(x, x.data + 1)
padded: torch.Tensor = hf_packfix.pad(y, -100)
sizes: list[int] = [hf_packfix.batch_size(x), hf_packfix.num_tokens(x)]
"""
#: Line by line, each with a mistake.
BAD = """\
from hf_packfix import DataCollatorForPackedSequnce
import hf_packfix
hf_packfix.enabel()
hf_packfix.enable(forced=True)
name: str = hf_packfix.batch_size(hf_packfix.windows)
"""
CHECKERS = {"mypy": ["mypy", "--strict"], "pyright": ["pyright", "--pythonpath", sys.executable]}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_checkers_accept_what_is_right_and_name_what_is_misspelt(tmp_path, checker):
    pytest.importorskip(checker)
    (tmp_path / "good.py").write_text(GOOD, encoding="utf-8")
    (tmp_path / "bad.py").write_text(BAD, encoding="utf-8")
    command = [sys.executable, "-m", *CHECKERS[checker], "good.py", "bad.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    places = set(re.findall(r"(\w+\.py):(\d+):.*\berror: ", result.stdout))
    assert places == {("bad.py", line) for line in "1345"}, result.stdout + result.stderr


def test_dir_lists_the_public_names():
    assert dir(hf_packfix) == sorted(hf_packfix.__all__)
    for name in dir(hf_packfix):
        assert getattr(hf_packfix, name) is not None
    with pytest.raises(AttributeError, match=r"module 'hf_packfix' has no attribute 'enabel'"):
        hf_packfix.enabel()
