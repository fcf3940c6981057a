"""Errors with a message for the user: value, rule and remedy. `cli` turns each into one line and an exit code."""


class ConfigError(ValueError):
    """A flag or configuration value that cannot work."""


class InUse(ConfigError):
    """Another process trains in the work directory."""


class NoLabels(ConfigError):
    """Labelled images are asked for, and the data has none."""


class DatasetError(ValueError):
    """An archive or a prepared dataset is missing, damaged or not what its name says; the message has path and remedy."""


class BadImage(ValueError):
    """An image that cannot be read; the message starts with its path or id."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable or of another model."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the steps before it are whole."""


class NonFinite(RuntimeError):
    """The loss or its gradient stopped being finite."""


class Collapsed(RuntimeError):
    """The teacher no longer tells images apart."""


class Preempted(RuntimeError):
    """A run that stopped because it was asked to; its progress is saved."""


class WeightsError(RuntimeError):
    """A weights file that is missing, unreadable or of another model; the message names the remedy."""
