"""Images that cannot be read: training replaces them, evaluation leaves them out, and too many end either of them."""

import sys
import threading

import numpy as np

from cmd_jax.errors import BadImage

MAX_SHARE = 0.001  # of the images; one is allowed however few there are
MAX_IN_A_ROW = 10


class BadImages:
    """The bad images of a split: each is logged once to the error stream, and counted.

    A share is the sign of a dataset that went wrong, a row of them that of a damaged part of it. One bad image is allowed in
    any folder, so that a single bad photo never ends a small run; two are too many below 2,000 images.

    Args:
        flags: [N], written to: not 0 where an image is bad. It may hold what an earlier process found.
        outcome: what becomes of a bad image, for the message.
    """

    def __init__(self, flags: np.ndarray, outcome: str):
        self._flags, self._logged, self._lock, self.outcome = flags, set(), threading.Lock(), outcome
        self.allowed = max(1, int(len(flags) * MAX_SHARE))

    @property
    def count(self) -> int:
        """Bad images that this process or an earlier one with the same flags has found."""
        return int(np.count_nonzero(self._flags))

    def note(self, index: int, reason: str) -> None:
        """An image turned out to be bad.

        Args:
            index: of the image.
            reason: starts with its path or id.

        Raises:
            BadImage: they are too many.
        """
        with self._lock:
            self._flags[index] = 1
            if index not in self._logged:
                self._logged.add(index)
                print(f"bad image, {self.outcome}: {reason}", file=sys.stderr, flush=True)
            images = len(self._flags)
            self.check(reason)
            if self._in_a_row(index) >= min(MAX_IN_A_ROW, images):
                raise BadImage(f"{reason}; {self._in_a_row(index)} images in a row are bad: repair the data")

    def check(self, reason: str) -> None:
        """Raises BadImage, beginning with the reason, if the bad images are more than is allowed."""
        images, count = len(self._flags), self.count
        if count > self.allowed:
            raise BadImage(
                f"{reason}; {count} bad images of {images:,} are over the limit of {self.allowed} (0.1 %): repair the data"
            )

    def _in_a_row(self, index: int) -> int:
        """Length of the row of bad images around one, which ends at MAX_IN_A_ROW to either side and at the split's ends."""
        first = last = index
        while first > max(0, index - MAX_IN_A_ROW) and self._flags[first - 1]:
            first -= 1
        while last < min(len(self._flags) - 1, index + MAX_IN_A_ROW) and self._flags[last + 1]:
            last += 1
        return last - first + 1
