"""The PyTorch step of the benchmarks: its objective equals ours, and it trains and serves."""

import copy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import torch_step
from benchmarks.timing import Worker
from benchmarks.torch_loss import Encoded, Levels, TermWeights, cmd_loss
from cmd_jax.method import objective

BATCH, PATCHES, LOCAL, WIDTH, BOTTLENECK, PROTOTYPES = 2, (4, 3), 3, 5, 6, 17
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04, "center_momentum": 0.9}
TINY = ["--model=vit_micro", "--global_px=32", "--local_px=16", "--local_count=2", "--batch_size=2", "--prototypes=24"]
OPTIONS = [*TINY, "--method=cmd", "--dtype=float32"]


def _problem(local):
    """Arguments of `cmd_objective`: student groups, rows, teacher, rows, L_T weights, centers."""
    rng = np.random.default_rng(0)

    def unit(*shape):
        x = rng.normal(size=shape)
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    def weights(*shape):
        x = rng.uniform(0.1, 1.0, size=shape)
        return (x / x.sum(-1, keepdims=True)).astype(np.float32)

    def views(count, n):
        features = rng.normal(size=(BATCH, count, n, WIDTH)).astype(np.float32)
        return objective.Views(
            unit(BATCH, count, BOTTLENECK), unit(BATCH, count, n, BOTTLENECK), features, weights(BATCH, count, n)
        )

    student = (views(2, PATCHES[0]), views(local, PATCHES[1]))[: 2 if local else 1]
    rows = lambda: objective.PrototypePair(unit(PROTOTYPES, BOTTLENECK), unit(PROTOTYPES, BOTTLENECK))
    centers = objective.Centers(*(0.1 * rng.normal(size=PROTOTYPES).astype(np.float32) for _ in range(2)))
    return student, rows(), views(2, PATCHES[0]), rows(), weights(BATCH, 2, PATCHES[0]), centers


def _crop_major(views):
    """[B, V, ...] -> V tensors [B, ...]."""
    return tuple(views.transpose(0, 1))


def _encoded(groups):
    """Groups of batch-major tensors, as the objective has them -> the packed crop-major views of the loss."""
    image = [z for group in groups for z in _crop_major(group.image_z)]
    region = [z.flatten(0, 1) for group in groups for z in _crop_major(group.region_z)]
    features = tuple(x for group in groups for x in _crop_major(group.features))
    mil_weights = tuple(x for group in groups for x in _crop_major(group.mil_weights))
    return Encoded(torch.cat(image), torch.cat(region), features, mil_weights)


def _torch_loss(leaves, weights):
    student, rows, teacher, teacher_rows, inter_weights, centers = leaves
    return cmd_loss(
        _encoded(student),
        Levels(*rows),
        _encoded([teacher]),
        Levels(*teacher_rows),
        _crop_major(inter_weights),
        Levels(*centers),
        weights=TermWeights(*weights),
        **TEMPS,
    )


def _ours(problem, weights):
    return objective.cmd_objective(*problem, weights=objective.TermWeights(*weights), region_weights="teacher_mil", **TEMPS)


def _leaves(problem):
    return jax.tree.map(lambda array: torch.tensor(array, requires_grad=True), problem)


@pytest.mark.parametrize("local", [0, LOCAL])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0, 0.0), (0.5, 0.5, 1.0, 1.0)], ids=["dino", "cmd"])
def test_the_loss_is_ours(weights, local):
    problem = _problem(local)
    expected = _ours(problem, weights)
    loss, terms, centers = _torch_loss(_leaves(problem), weights)
    np.testing.assert_allclose(loss.item(), expected.loss, rtol=1e-5)
    for name, value in terms.items():
        assert value.item() > 0.01
        np.testing.assert_allclose(value.item(), expected.terms[name], rtol=1e-5, err_msg=name)
    assert sum(weight > 0 for weight in weights) == len(terms)
    np.testing.assert_allclose(centers.image.detach(), expected.centers.image, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(centers.region.detach(), expected.centers.region, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("term", range(5), ids=["L_I", "L_R", "L_S", "L_T", "cmd"])
def test_gradients_are_ours(term):
    weights = (0.5, 0.5, 1.0, 1.0) if term == 4 else tuple(float(index == term) for index in range(4))
    problem, leaves = _problem(LOCAL), _leaves(_problem(LOCAL))
    expected = jax.tree.leaves(jax.grad(lambda problem: _ours(problem, weights).loss)(jax.tree.map(jnp.asarray, problem)))
    _torch_loss(leaves, weights)[0].backward()
    moved = 0
    for ours, leaf in zip(expected, jax.tree.leaves(leaves), strict=True):
        theirs = np.zeros(ours.shape) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4 * np.abs(ours).max())
        moved += np.any(theirs)
    # z of two groups and rows of a level each; L_S both levels and the weights; L_T the scorer's weights alone
    assert moved == {"L_I": 3, "L_R": 3, "L_S": 8, "L_T": 1, "cmd": 9}[["L_I", "L_R", "L_S", "L_T", "cmd"][term]]


def _training(*arguments):
    return torch_step.Training(torch_step.parser().parse_args([*OPTIONS, *arguments]))


def test_the_inter_teacher_term_trains_the_scorer_alone():
    training = _training()
    groups = training._loss.keywords["groups"]
    arguments = {"batch": 2, "centers": training.centers, "autocast": training._loss.keywords["autocast"]}
    loss, _ = torch_step.loss_of(
        training.student, training.teacher, groups, weights=TermWeights(0.0, 0.0, 0.0, 1.0), **arguments
    )
    loss.backward()
    for name, parameter in training.student.named_parameters():
        moved = parameter.grad is not None and bool(torch.any(parameter.grad != 0))
        assert moved == name.startswith("scorer"), name


@pytest.mark.parametrize(("method", "dtype"), [("dino", "float32"), ("cmd", "bfloat16")])
def test_a_step_moves_both_networks(method, dtype):
    training = _training(f"--method={method}", f"--dtype={dtype}")
    before, centers = copy.deepcopy((training.student, training.teacher)), training.centers
    first = training.step()
    assert np.isfinite(first)
    for (name, old), teacher_old, student, teacher in zip(
        before[0].named_parameters(),
        before[1].parameters(),
        training.student.parameters(),
        training.teacher.parameters(),
        strict=True,
    ):
        assert not torch.equal(old, student), name
        torch.testing.assert_close(teacher, 0.996 * teacher_old + 0.004 * student)
        assert teacher.grad is None
    assert not torch.equal(centers.image, training.centers.image)
    assert (training.centers.region is None) == (method == "dino")
    for _ in range(20):
        last = training.step()
    assert last < first


def test_clipping_is_per_parameter():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    torch_step.clip_per_parameter(parameters, 3.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.8, 2.4]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.3, 0.4]))


def test_a_worker_serves_steps():
    worker = Worker([sys.executable, "-m", "benchmarks.torch_step", *OPTIONS])
    assert worker.info["parameters"] == sum(p.numel() for p in _training().parameters)
    assert worker.info["loss"] == pytest.approx(_training().step(), rel=1e-4)
    for count in (1, 3):
        reply = worker.run(count)
        assert len(reply["wall_s"]) == len(reply["cpu_s"]) == count
        assert min(reply["wall_s"] + reply["cpu_s"]) > 0
        assert reply["peak_rss_bytes"] > 2**26
    worker.close()
    worker.close()
