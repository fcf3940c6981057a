"""Do the label-free numbers order the checkpoints of a run as k-NN does?"""

import os

from cmd_jax import files

KEYS = ("rankme", "alpha_req", "uniformity", "alignment", "teacher_entropy", "marginal_entropy")
FEWEST = 4  # checkpoints; of three, any order is near another


def rank_correlations(history: list[dict[str, float]], of: str) -> dict[str, float]:
    """Spearman's rho of each label-free number with a labelled one over checkpoints.

    Args:
        history: metrics of each checkpoint; those without both numbers do not count.
        of: key of the labelled number.

    Returns:
        Key -> rho in -1..1, of every number that has FEWEST checkpoints and is not the same in all.
    """
    found = {}
    for key in KEYS:
        pairs = [(metrics[key], metrics[of]) for metrics in history if key in metrics and of in metrics]
        columns = list(zip(*pairs, strict=True))
        if len(pairs) >= FEWEST and all(len(set(column)) > 1 for column in columns):
            from scipy import stats  # imported here: half a second of every start, and few need it

            found[key] = float(stats.spearmanr(*columns).statistic)
    return found


def text(correlations: dict[str, float], of: str) -> str:
    """For people, one line."""
    numbers = ", ".join(f"{key} {rho:+.2f}" for key, rho in correlations.items())
    return f"rank correlation (Spearman) with {of} over the evaluated steps: {numbers}"


def evaluated_steps(workdir: str) -> list[int]:
    """Steps that have a directory under `eval/`, ascending."""
    return sorted(int(name) for name in files.names(os.path.join(workdir, "eval")) if name.isdecimal())
