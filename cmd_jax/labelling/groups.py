"""Images in groups of one kind, what to ask first at the front: a tree of mergers, cut where it is highest.

Ward's criterion on unit features merges only along the graph of nearest neighbours, so that memory grows with the number of
images and not with its square. The leaves in the tree's order, and the height of the merger between any two that lie side by
side, are all that cutting, and splitting a group again, needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from cmd_jax.labelling.features import directions, nearest
from cmd_jax.labelling.select import choose_images
from cmd_jax.labelling.suggest import Suggestions

NEIGHBOURS = 15
GROUP_IMAGES, UNSURE_IMAGES = 4, 2  # mean size of a group without a suggested class: before there are labels, and after
ALIKE = 0.7  # of the others in such a group: how many are supposed to be of one class with the first
LIKELY = 0.5  # probability from which images are grouped by their suggested class


class Tree(NamedTuple):
    """The leaves of a tree of mergers, side by side.

    Attributes:
        order: [N] int64, rows; each group of any cut lies side by side.
        heights: [N - 1] float64, the merger that first joins a leaf to the next one.
    """

    order: np.ndarray
    heights: np.ndarray


class Group(NamedTuple):
    """Images that are likely to be of one class.

    Attributes:
        rows: [n] int64; those of a suggested class by falling probability, else side by side as in the tree.
        name: suggested class; "" where there is none.
    """

    rows: np.ndarray
    name: str


def grow(features: np.ndarray) -> Tree:
    """Merges images [N, F] into one tree; N is at least 1."""
    count = len(features)
    if count < 3:
        return Tree(np.arange(count), np.ones(count - 1))
    from sklearn.cluster import ward_tree  # half a second to import

    rows = directions(features)
    children, _, _, _, distances = ward_tree(rows, connectivity=_connected(rows), return_distance=True)
    order, heights = np.zeros(count, np.int64), np.zeros(count - 1)
    sizes = np.ones(2 * count - 1, np.int64)
    for merger, (left, right) in enumerate(children):
        sizes[count + merger] = sizes[left] + sizes[right]
    starts = np.zeros(2 * count - 1, np.int64)
    for merger in range(count - 2, -1, -1):
        left, right = children[merger]
        starts[left] = starts[count + merger]
        starts[right] = starts[left] + sizes[left]
        heights[starts[right] - 1] = distances[merger]
    order[starts[:count]] = np.arange(count)
    return Tree(order, heights)


def _connected(rows: np.ndarray) -> sparse.csr_array:
    """The graph of nearest neighbours, with a chain through its parts where it has several."""
    index, _ = nearest(rows, NEIGHBOURS + 1)
    count = len(rows)
    edges = np.stack([np.repeat(np.arange(count), index.shape[1]), index.ravel()])
    graph = sparse.csr_array((np.ones(edges.shape[1]), edges), shape=(count, count))
    _, parts = sparse.csgraph.connected_components(graph, directed=False)
    firsts = np.unique(parts, return_index=True)[1]
    chain = sparse.csr_array((np.ones(len(firsts) - 1), (firsts[:-1], firsts[1:])), shape=(count, count))
    whole = graph + chain
    return (whole + whole.T).tocsr()


def cut(tree: Tree, groups: int) -> list[np.ndarray]:
    """The rows of each group of a tree, as it lies: the `groups - 1` highest mergers are undone."""
    ends = np.sort(np.argsort(-tree.heights, kind="stable")[: max(groups - 1, 0)]) + 1
    return np.split(tree.order, ends)


def group_images(
    features: np.ndarray, tree: Tree, done: Sequence[int] | np.ndarray = (), suggested: Suggestions | None = None
) -> list[Group]:
    """Groups the images that are not done, in the order in which to ask.

    Without labels groups are those of a cut, and first comes the one with the image that `choose_images` would ask for first:
    it stands for many images. With labels they are the suggested classes of images that are likely to be of them, and small
    groups of all others; first comes the one where an action is expected to put most suggestions right. What is almost surely
    right already comes last: it counts without being asked.

    Args:
        features: [N, F] float.
        tree: of all of them.
        done: rows that are not grouped: labelled, or struck.
        suggested: of all N images; None where nothing is labelled.
    """
    done = np.asarray(done, np.int64)
    plain = np.ones(len(features), bool)
    plain[done] = False
    if not plain.any():
        return []
    groups = []
    if suggested is not None:
        known = np.nonzero(plain & (suggested.probability >= LIKELY))[0]
        plain[known] = False
        for name in np.unique(suggested.classes[known]):
            rows = known[suggested.classes[known] == name]
            groups.append(Group(rows[np.argsort(-suggested.probability[rows], kind="stable")], str(name)))
    size = GROUP_IMAGES if suggested is None else UNSURE_IMAGES
    parts = cut(tree, max(1, len(features) // size))
    groups += [Group(part[plain[part]], "") for part in parts if plain[part].any()]
    if suggested is not None:
        return sorted(groups, key=lambda group: -put_right(group, suggested.probability))
    rank = np.zeros(len(features), np.int64)
    chosen = choose_images(features, len(features), done)
    rank[chosen] = np.arange(len(chosen))
    return sorted(groups, key=lambda group: rank[group.rows].min())


def put_right(group: Group, probability: np.ndarray) -> float:
    """Wrong suggestions that naming a group is expected to put right, for each action.

    One action is the name, a wrong image takes two (to select it, and to move it), and no group takes more than one an image.

    Args:
        group: of N images.
        probability: [N] that the suggestions are right.
    """
    doubt = float(np.sum(1 - probability[group.rows]))
    wrong = doubt if group.name else (1 - ALIKE) * (len(group.rows) - 1)
    return doubt / min(len(group.rows), 1 + 2 * wrong)
