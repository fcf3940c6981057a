"""The report of a run: one page, `report/index.html`, about its teacher."""

import os
from typing import Any

from cmd_jax import files
from cmd_jax.config import ConfigDict
from cmd_jax.evaluation.evaluate import Evaluation
from cmd_jax.evaluation.splits import Splits, spread
from cmd_jax.inference.patches import Patches
from cmd_jax.metrics import load_all_metrics, load_metrics, outcome
from cmd_jax.models.build import Params
from cmd_jax.models.network import Network
from cmd_jax.report import curves as curves_lib
from cmd_jax.report import facts, panels
from cmd_jax.report.images import ReportImages, overlay_sheet, report_images
from cmd_jax.report.render import render

OVERLAYS = 12  # images in which is shown where the teacher looks


def write_report(
    evaluation: Evaluation, config: ConfigDict, network: Network, teacher: Params, splits: Splits, workdir: str
) -> list[str]:
    """Writes `report/index.html` and `report/mil_overlays.png` and returns their paths.

    Args:
        evaluation: of the teacher.
        config: resolved.
        network: of the teacher.
        teacher: parameters, on every device of this process.
        splits: that were evaluated.
        workdir: of the run; `config.json`, `metrics.jsonl` and what `eval/` holds are read there.
    """
    directory = os.path.join(workdir, "report")
    files.make_directory(directory)
    page, sheet = (os.path.join(directory, name) for name in ("index.html", "mil_overlays.png"))
    images = report_images(evaluation, config, network, teacher, splits)
    rows = spread(images.count(), OVERLAYS)
    patches = images.inspect(images.source, rows)
    files.write(sheet, overlay_sheet(images, rows, patches))
    files.write(page, run_page(evaluation, images, workdir, panels.looks(images, rows, patches), patches))
    return [page, sheet]


def run_page(evaluation: Evaluation, images: ReportImages, workdir: str, looks: dict[str, Any], patches: Patches) -> str:
    """Renders a run's page to HTML; `looks` is of `panels.looks`, `patches` of the images in it."""
    stored = facts.read_config(workdir)  # an evaluation may have been asked for other protocols than the run's
    curves = curves_lib.read_curves(workdir)
    charts = curves_lib.charts([("", curves)])
    metrics = evaluation.metrics.merged(load_metrics(workdir, evaluation.metrics.step))  # those of now may not be on disk yet
    history = load_all_metrics(workdir) | {metrics.step: metrics}
    found = facts.numbers(metrics, load_metrics(workdir, 0) if metrics.step else None)
    feature_map, retrieval = panels.feature_map_panel(images), panels.retrieval(images)
    present = set(feature_map["points"]["class"])
    return render(
        "run.html",
        title=os.path.basename(workdir.rstrip("/")) or workdir,
        step=metrics.step,
        kind=images.kind,
        labelled=bool(images.train.class_names),
        headlines=facts.headlines(found),
        numbers=found,
        facts=facts.run_facts(stored, curves, metrics.step, outcome(history, metrics.step, stored.train.best_metric or "")),
        versions=facts.versions(),
        charts=charts,
        **looks,
        attention=patches.attention is not None,
        map_how=feature_map["how"],
        points=feature_map["points"],
        map_table=feature_map["table"],
        total=images.count(),
        classes=[name for name in images.train.class_names if name in present],
        queries=retrieval["queries"],
        query_table=retrieval["table"],
        confusions=panels.confusion_pairs(images, metrics.confusions, evaluation.predictions),
        per_class=sorted(metrics.per_class.items(), key=lambda item: (item[1], item[0])),
        changed=facts.changed(stored),
        config=list(facts.flat(stored).items()),
        data={
            "charts": [{key: chart[key] for key in ("id", "figure")} for chart in charts],
            "map": {key: feature_map[key] for key in ("figure", "points", "sprite", "columns")},
            # their images are in the page already
            "explorer": {
                **{key: retrieval[key] for key in ("images", "side", "cell")},
                "queries": [{**query, "image": None} for query in retrieval["queries"]],
            },
        },
    )
