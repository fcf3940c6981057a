"""Clustering, few-shot and class-disjoint retrieval against plain loops."""

import itertools

import numpy as np

from cmd_jax.evaluation import clustering, disjoint_retrieval, few_shot
from cmd_jax.evaluation.labelling_effort import chosen_images
from cmd_jax.labelling.fill import fill_in
from cmd_jax.labelling.select import choose_images, worth


def _unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_assignment_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for clusters in (3, 4, 5):  # fewer, as many, more than classes
        found, labels = rng.integers(0, clusters, 40), rng.integers(0, 4, 40)
        names = [*range(4), *[-1] * clusters]  # a cluster may stand for no class
        best = max(sum(np.array(match)[found] == labels) for match in itertools.permutations(names, clusters))
        assert clustering.assigned(found, labels).sum() == best
    np.testing.assert_array_equal(clustering.assigned(np.array([1, 1, 0]), np.array([0, 0, 0])), [True, True, False])


def test_kmeans_finds_groups_and_ends_at_a_fixed_point():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 8
    rows = _unit(np.eye(8, 10)[labels] + 0.05 * rng.normal(size=(200, 10)))
    assert clustering.assigned(clustering.kmeans(rows, 8, seed=0), labels).all()
    rows = _unit(rng.normal(size=(200, 10)))
    found = clustering.kmeans(rows, 8, seed=0)
    centers = np.stack([rows[found == cluster].mean(axis=0) for cluster in range(8)])
    distances = np.sum(np.square(rows[:, None] - centers), axis=-1)
    np.testing.assert_array_equal(np.argmin(distances, axis=1), found)
    assert len(set(clustering.kmeans(np.ones((200, 10)), 8, seed=0))) == 1  # the others are empty


def test_few_shot_equals_a_loop_over_queries():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 20)
    labels[-1] = 0  # the last class has too few images for five shots
    rows = _unit(np.eye(8, 12)[labels] + 0.5 * rng.normal(size=(160, 12)))
    episodes = few_shot.draw_episodes(labels, 5, seed=0)
    assert episodes.shape == (600, 5, 20)
    of = labels[episodes]
    assert np.all(of == of[:, :, :1])
    assert all(len(set(classes)) == 5 for classes in of[:, :, 0])
    assert all(len(set(episode.ravel())) == 100 for episode in episodes)
    assert set(of.ravel()) == set(range(7))
    accuracy = few_shot.episode_accuracy(rows, episodes, 5)
    for episode in (0, 599):
        means = rows[episodes[episode, :, :5]].mean(axis=1)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        right = [np.argmax(means @ rows[image]) == way for way in range(5) for image in episodes[episode, way, 5:]]
        assert accuracy[episode] == np.mean(right)
    assert np.all(few_shot.episode_accuracy(np.ones_like(rows), episodes[:2], 5) == 0)
    np.testing.assert_array_equal(few_shot.draw_episodes(labels, 5, seed=0), episodes)
    assert few_shot.draw_episodes(labels[labels < 4], 1, seed=0) is None


def test_disjoint_retrieval_leaves_each_image_out():
    rng = np.random.default_rng(0)
    rows, labels = _unit(rng.normal(size=(50, 6))), rng.integers(3, 7, 50)
    found = disjoint_retrieval.recalls(rows, labels)
    for image in range(50):
        order = [other for other in np.argsort(-(rows @ rows[image])) if other != image]
        expected = [np.any(labels[order[:rank]] == labels[image]) for rank in (1, 2, 4, 8)]
        np.testing.assert_array_equal(found[image], expected)
    np.testing.assert_array_equal(disjoint_retrieval.second_half(np.arange(7), 7), np.arange(7) >= 3)


def test_rounds_ask_where_answers_are_uncertain():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 6
    rows = _unit(np.eye(6, 8)[labels] + 0.4 * rng.normal(size=(120, 8)))
    first, second = chosen_images(rows, labels, [6, 30])
    np.testing.assert_array_equal(first, choose_images(rows, 6))
    weights = worth(fill_in(rows, first, labels[first]).probability)
    np.testing.assert_array_equal(second, [*first, *choose_images(rows, 24, first, weights)])
    np.testing.assert_allclose(worth(np.array([0, 0.5, 1])), [1, 0.9375, 0])
