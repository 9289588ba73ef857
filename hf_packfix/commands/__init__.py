"""``hf-packfix``: run, doctor, docs and demo."""
