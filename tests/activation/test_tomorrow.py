"""Some of the names that patches use, renamed upstream; `python -m tests.tools.tomorrow` tries all of them."""

from __future__ import annotations

import pytest

from tests.tools import tomorrow

pytestmark = [pytest.mark.slow, pytest.mark.newest]

#: What a packed program must do, by the name that upstream renames: the uses that are not right, and how they fail.
RENAMED = {
    # The evaluation joins its batches as stock does.
    "get_arrays": {},
    # Only our own models need it.
    "label_smoother": {"models": "raises: "},
    # Without the patch, the number of samples would be wrong silently.
    "find_batch_size": {"dispatch": "a packed batch would give wrong numbers here", "evaluate": "wrong numbers here"},
    # What the targets of patches are called: without the patch, these uses are right all the same.
    "evaluation_loop": {},
    # Of accelerate: no name of ours.
    "TensorInformation": {},
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_renamed_name_breaks_no_ordinary_program_and_no_packed_one_silently(name):
    found = tomorrow.outcome(name)
    assert found.ordinary == "same"
    assert found.is_harmless
    for use, error in RENAMED[name].items():
        assert error in found.packed[use]
    if not RENAMED[name]:
        assert set(found.packed.values()) == {"right"}
    else:
        assert any(name in warning for warning in found.warnings)
