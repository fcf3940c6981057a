"""How pixels are normalised: the values of `data.normalization`."""

import math
from collections.abc import Sequence


def text_of(mean: Sequence[float], std: Sequence[float]) -> str:
    """Mean and standard deviation of the three channels, pixels in 0..1, as `data.normalization` takes them."""
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean {mean} and std {std} are not three numbers each")
    return "/".join(",".join(f"{float(value):.9g}" for value in values) for values in (mean, std))


def statistics_of(normalization: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, standard deviation) of the channels, pixels in 0..1, of a value of `data.normalization`; None of "local_contrast".

    Raises:
        ValueError: it is neither a known word nor MEAN/STD of three finite numbers each, the latter above 0.
    """
    if normalization == "local_contrast":
        return None
    if normalization == "imagenet":
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = (tuple(float(value) for value in part.split(",")) for part in normalization.split("/"))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"{normalization} is not three finite numbers each, standard deviations above 0")
    return mean, std
