"""The errors of checkpoints, apart from the library that writes them: a command line that is wrong need not load it."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable or of another model."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the steps before it are whole."""
