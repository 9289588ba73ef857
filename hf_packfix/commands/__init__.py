"""``hf-packfix``: run, doctor, docs and demo."""


class CommandError(Exception):
    """Why a command cannot run, which the user can mend: shown below its usage, with exit status 2."""
