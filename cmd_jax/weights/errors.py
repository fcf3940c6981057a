"""The error of everything that reads or writes weights of other projects."""


class WeightsError(RuntimeError):
    """A file of weights that is missing, unreadable or of another model; the message names the remedy."""
