"""The errors of a run, apart from the modules that raise them: a command line that is wrong need not load jax."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable or of another model."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the steps before it are whole."""


class NonFinite(RuntimeError):
    """The loss or its gradient stopped being finite."""


class Collapsed(RuntimeError):
    """The teacher tells images apart no longer."""


class Preempted(RuntimeError):
    """A run that stopped because it was asked to; what it had done is saved."""
