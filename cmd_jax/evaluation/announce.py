"""What long parts of an evaluation say: their cost before they start, and how far they are."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from cmd_jax.config import ConfigDict, token_px
from cmd_jax.evaluation.protocol import Cost
from cmd_jax.models.build import Params
from cmd_jax.progress import Progress
from cmd_jax.training import processes

ANNOUNCED_FLOPS = 2e11  # a few seconds on two CPU cores


def forward_flops(config: ConfigDict, teacher: Params, images: int, px: int) -> float:
    """A teacher's operations for some images, roughly: every parameter meets every patch once."""
    numbers = sum(leaf.size for leaf in jax.tree.leaves(teacher["backbone"]))
    return 2.0 * images * numbers * (-(-px // token_px(config))) ** 2


@contextlib.contextmanager
def announced(name: str, cost: Cost, between: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Prints the cost of a part that takes more than some seconds, its progress, and in the end how long it took.

    Args:
        name: of the part.
        cost: of the part; below ANNOUNCED_FLOPS nothing is printed, as in all processes but the first.
        between: called before each unit of work.

    Yields:
        `between` for the part, which counts.
    """
    if cost.flops < ANNOUNCED_FLOPS or not processes.is_first():
        yield between
        return
    print(f"{name}: {cost.work}", flush=True)
    progress, started = Progress(name, cost.calls, cost.unit), False

    def counting() -> None:
        nonlocal started
        if started:
            progress.advance()
        started = True
        between()

    yield counting
    progress.advance()
    progress.close()
