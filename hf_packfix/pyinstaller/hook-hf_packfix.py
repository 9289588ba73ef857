"""Read by PyInstaller: adds modules that are imported by name, and the metadata in which we look up versions."""

from PyInstaller.utils.hooks import collect_submodules, copy_metadata

hiddenimports = ["hf_packfix.models", *collect_submodules("hf_packfix.patches")]
datas = []
for distribution in ("hf-packfix", "transformers", "accelerate", "torch", "wrapt"):
    try:
        datas += copy_metadata(distribution)
    except Exception:  # not installed under that name
        continue
