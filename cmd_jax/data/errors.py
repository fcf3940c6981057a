"""What is wrong with data on disk, as opposed to a value of the configuration."""


class DatasetError(ValueError):
    """An archive or a prepared dataset is missing, damaged or not what its name says; the message has path and remedy."""
