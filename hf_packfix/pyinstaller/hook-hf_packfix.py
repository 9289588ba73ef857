"""Read by PyInstaller: adds the metadata in which we look up versions; PyInstaller collects none by itself."""

from PyInstaller.utils.hooks import copy_metadata

datas = []
for distribution in ("hf-packfix", "transformers", "accelerate", "torch", "wrapt"):
    try:
        datas += copy_metadata(distribution)
    except Exception:  # not installed under that name: `__version__` is looked up instead
        continue
