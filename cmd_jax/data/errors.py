"""What is wrong with data on disk, as opposed to a value of the configuration."""


class DatasetError(ValueError):
    """An archive or a prepared dataset is missing, damaged or not what its name says; the message has path and remedy."""


class BadImage(ValueError):
    """A picture that cannot be read; the message starts with its path or id."""
