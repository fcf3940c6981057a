"""The PyTorch side of `benchmarks.region_loss`: value and gradient of the field's loss, served by `benchmarks.timing`.

Imports neither JAX nor cmd_jax, so that any python with PyTorch and NumPy will do.
"""

import argparse

import psutil
import torch
from torch import Tensor

from benchmarks import region_problem, timing
from benchmarks.torch_loss import Encoded, Levels, TermWeights, cmd_loss


def encoded(problem: dict[str, Tensor], groups: tuple[str, ...]) -> Encoded:
    """Batch-major groups of views -> the packed crop-major views of the loss."""
    views = lambda field: [view for group in groups for view in problem[f"{group}.{field}"].transpose(0, 1)]
    regions = torch.cat([view.flatten(0, 1) for view in views("region_z")])
    return Encoded(torch.cat(views("image_z")), regions, tuple(views("features")), tuple(views("mil_weights")))


def loss_of(problem: dict[str, Tensor], weights: TermWeights) -> Tensor:
    """The loss of the inputs of `region_problem`; the new centers are computed too, as in training."""
    levels = lambda name: Levels(*(problem[f"{name}.{level}"] for level in region_problem.LEVELS))
    loss, _, _ = cmd_loss(
        encoded(problem, region_problem.GROUPS),
        levels("student_rows"),
        encoded(problem, ("teacher",)),
        levels("teacher_rows"),
        tuple(problem["inter_teacher_weights.teacher"].transpose(0, 1)),
        levels("centers"),
        weights=weights,
        student_temp=region_problem.STUDENT_TEMP,
        teacher_temp=region_problem.TEACHER_TEMP,
        center_momentum=region_problem.CENTER_MOMENTUM,
    )
    return loss


def main() -> None:
    """Serves steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_region_loss", description=__doc__)
    parser.add_argument("--objective", choices=list(region_problem.OBJECTIVES), required=True)
    parser.add_argument("--prototypes", type=int, required=True, help="K")
    region_problem.add_size_options(parser)
    args = parser.parse_args()
    replies = timing.claim_stdout()
    torch.set_num_threads(1)
    problem = {name: torch.from_numpy(array) for name, array in region_problem.make(args, args.prototypes).items()}
    leaves = [problem[name].requires_grad_() for name in region_problem.trained(args.objective)]
    weights = TermWeights(*region_problem.OBJECTIVES[args.objective])

    def step() -> float:
        for leaf in leaves:
            leaf.grad = None
        loss = loss_of(problem, weights)
        loss.backward()
        return loss.item()

    before = psutil.Process().memory_info().rss
    loss = step()
    norm = sum(float(leaf.grad.square().sum()) for leaf in leaves) ** 0.5
    info = {"loss": loss, "gradient_norm": norm, "rss_before_bytes": before, "torch": torch.__version__}
    timing.serve(step, info, replies)


if __name__ == "__main__":
    main()
