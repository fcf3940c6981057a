"""A measured teacher with all that a report is made of, and a reader of pages."""

import copy
import json
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from cmd_jax.evaluation import restore

VOID = {"meta", "img", "input", "br", "wbr", "link", "hr"}


@pytest.fixture(scope="session")
def measured(finished):
    """What `write_report` gets of the finished run: (evaluation, config, network, teacher, splits, workdir)."""
    given = []
    restore.evaluate_run(str(finished[0]), None, write_report=lambda *arguments: given.append(arguments) or [])
    return given[0]


def renamed(measured, names):
    """The same with other names of the three classes."""
    evaluation, config, network, teacher, splits, workdir = measured
    new = dict(zip(splits.train.class_names, names, strict=True))
    sources = [copy.copy(source) for source in splits]
    for source in sources:
        source.class_names = tuple(names)
    metrics = evaluation.metrics
    metrics = metrics._replace(
        per_class={new[name]: value for name, value in metrics.per_class.items()},
        confusions=[pair._replace(true=new[pair.true], predicted=new[pair.predicted]) for pair in metrics.confusions],
    )
    evaluation = evaluation._replace(metrics=metrics)
    return evaluation, config, network, teacher, splits._replace(train=sources[0], test=sources[1]), workdir


def unlabelled(measured):
    """The same images without labels: training images alone."""
    evaluation, config, network, teacher, splits, workdir = measured
    train = copy.copy(splits.train)
    train.class_names, train.labels = (), [-1] * len(train)
    number = evaluation.metrics.numbers[0]._replace(key="spread", title="Spread", value=1.25, protocol="24 images", unit="")
    gallery = evaluation.gallery._replace(labels=evaluation.gallery.labels * 0 - 1)
    empty = SimpleNamespace(class_names=(), __len__=lambda: 0)
    metrics = evaluation.metrics._replace(numbers=[number], per_class={}, confusions=[])
    evaluation = evaluation._replace(metrics=metrics, gallery=gallery, queries=None, predictions=None)
    return evaluation, config, network, teacher, splits._replace(train=train, test=empty), workdir


class Page(HTMLParser):
    """A page as tests read it.

    Attributes:
        tags: (name, attributes) of every element in order.
        texts: (name of the element, its attributes, the text inside it) of every element, in order.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open
        self.texts = [(name, attributes, "".join(parts)) for name, attributes, parts in self.texts]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs), []))
            self.texts.append(self._open[-1])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open[-1][0] == tag
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text_of(self, tag):
        return [text.strip() for name, _, text in self.texts if name == tag]

    def data(self):
        return json.loads(next(text for name, attributes, text in self.texts if attributes.get("id") == "data"))
