"""Train and evaluate beside an import hook of another package; print what was logged, and where the patches stand.

    python tests/support/third_party_hooks.py packed|padded first|last [PACKAGE]

``tests/tools/third_parties.py`` runs this in environments of their own. With ``first``, the other package puts its
hook in before anything else is imported, and the variable ``HF_PACKFIX`` turns hf_packfix on, or not. With ``last``,
``import hf_packfix`` comes before the hook, which then stands in front.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

#: What the import hooks of typeguard and jaxtyping are asked to instrument.
INSTRUMENTED = "transformers.trainer"


def put_in(package: str, directory: str) -> None:
    """Put in the import hook of a package, as its users do; what it writes goes to a directory."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the small package of mlflow has no other store
    module = importlib.import_module(package)  # for comet_ml, that is all
    if package == "mlflow":
        module.set_tracking_uri(Path(directory, "tracked").as_uri())
        module.autolog()
    elif package == "typeguard":
        # The Trainer's annotations are not meant to be checked: count only that they are.
        module.config.typecheck_fail_callback = lambda error, memo: None
        module.install_import_hook(INSTRUMENTED)
    elif package == "jaxtyping":
        module.install_import_hook(INSTRUMENTED, None)


def train(packed: bool, directory: str) -> list[dict[str, float]]:
    """Train and evaluate a tagger; return what was logged."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind the installed hf_packfix
    from tests.support import oracle

    collate = oracle.packed_batch if packed else oracle.padded_batch
    options = {"compute_metrics": oracle.accuracy}
    data = oracle.rows(12)
    trainer = oracle.new_trainer(Path(directory), oracle.PlainTagger, data, collate, options=options, max_steps=4)
    trainer.train()
    trainer.evaluate()
    return oracle.logged(trainer)


def main() -> None:
    """Run what the command line names; the last line printed is the outcome."""
    layout, order, *packages = sys.argv[1:]
    if order == "last":
        import hf_packfix
    with tempfile.TemporaryDirectory() as directory:
        for package in packages:
            put_in(package, directory)
        finders = [type(finder).__module__.partition(".")[0] for finder in sys.meta_path]
        logged = train(layout == "packed", directory)
    import hf_packfix

    states = {patch.target: patch.state for patch in hf_packfix.status().patches}
    loaded = {target: state for target, state in states.items() if target.partition(":")[0] in sys.modules}
    print(json.dumps({"logged": logged, "finders": finders, "patches": loaded}))


if __name__ == "__main__":
    main()
