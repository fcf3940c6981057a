"""Errors with a message for the user: value, rule and remedy. `cli` prints it as one line and ends with the exit code."""

# 0 is success; launchers retry on any code that is not here, after a crash of the machine for example.
BAD_CONFIG, BAD_DATA, FAILED_RUN, PREEMPTED, INTERRUPTED = 64, 65, 70, 75, 130


class ConfigError(ValueError):
    """A flag or configuration value that cannot work."""

    exit_code = BAD_CONFIG


class InUse(ConfigError):
    """Another process trains in the work directory."""


class NoLabels(ConfigError):
    """Labelled images are asked for, and the data has none."""


class DatasetError(ValueError):
    """An archive or a prepared dataset is missing, damaged or not what its name says; the message has path and remedy."""

    exit_code = BAD_DATA


class BadImage(ValueError):
    """An image that cannot be read; the message starts with its path or id."""

    exit_code = BAD_DATA


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unreadable or of another model."""

    exit_code = BAD_DATA


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the steps before it are whole."""

    exit_code = BAD_DATA


class NonFinite(RuntimeError):
    """The loss or its gradient stopped being finite."""

    exit_code = FAILED_RUN


class Collapsed(RuntimeError):
    """The teacher no longer tells images apart."""

    exit_code = FAILED_RUN


class Preempted(RuntimeError):
    """A run that stopped because it was asked to; its progress is saved."""

    exit_code = PREEMPTED


class WeightsError(RuntimeError):
    """A weights file that is missing, unreadable or of another model; the message names the remedy."""

    exit_code = BAD_DATA
