"""The page of a `DetectionReport`: one HTML file that needs neither network nor script."""

import base64
import html
import io
import os
import pathlib
import re
import urllib.parse

import numpy as np

from keras_resnest import visualization
from keras_resnest.evaluation.errors import DESCRIPTIONS, KINDS

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1c2430;
  --faint: #5d6878; --line: #dfe3e8; --accent: #1360c4; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --text: #e4e8ee;
  --faint: #9aa6b6; --line: #333c48; --accent: #7ab3ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 20px 16px 60px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 6px; } p { margin: 6px 0 12px; }
.faint, figcaption, nav { color: var(--faint); font-size: .88rem; }
a { color: var(--accent); } nav a { margin-right: 12px; white-space: nowrap; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 16px; margin-top: 16px; } .tile { padding: 8px 12px; }
.tile b { display: block; font-size: 1.25rem; } .grid { display: grid; gap: 14px; }
.grid > * { min-width: 0; } .tiles { gap: 8px; margin: 14px 0;
  grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); }
.plots { columns: 3 320px; column-gap: 14px; }
.plots > * { break-inside: avoid; padding-bottom: 14px; }
.images { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.crops { grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 8px; }
.crops img { aspect-ratio: 1; object-fit: contain; } .crops figcaption { font-size: .8rem; }
td .faint { font-size: .9em; } figure { margin: 0; }
svg, img { display: block; width: 100%; height: auto; }
svg { fill: currentColor; } img { border-radius: 6px; }
table { width: 100%; border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; } td, th { padding: 4px 6px; text-align: right;
  border-bottom: 1px solid var(--line); font-weight: normal; } th { color: var(--faint); }
td, th { white-space: nowrap; } td:first-child { white-space: normal; }
td:first-child, th:first-child { text-align: left; }
i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }
pre { white-space: pre-wrap; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 8px 10px; font-size: .85rem; margin: 8px 0 0; }
@media (max-width: 480px) { body { padding: 12px 8px 40px; } section { padding: 12px 10px; }
  table { font-size: .8rem; } td, th { padding: 4px 3px; } }
"""

SECTIONS = {
    "precision": "Average precision",
    "errors": "What the errors cost",
    "confidence": "Confidence",
    "worst": "Worst images",
    "examples": "False positives and misses",
    "labels": "Suspicious labels",
}


def render(report, title: str, folder: str | None) -> str:
    """Returns the page; the links to images are relative to its `folder`, or absolute."""
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in SECTIONS.items())
    parts = {
        "precision": _precision(report),
        "errors": _errors(report),
        "confidence": _confidence(report),
        "worst": _worst(report, folder),
        "examples": _examples(report, folder),
        "labels": _labels(report, folder),
    }
    sections = "".join(
        f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{content}</section>'
        for name, content in parts.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_text(title)}</title><style>{STYLE}</style>'
        f"</head><body><h1>{_text(title)}</h1>{_summary(report)}<nav>{links}</nav>{sections}"
        "</body></html>\n"
    )


# === Sections ===


def _summary(report) -> str:
    metrics, speed = report.metrics, report.speed
    height, width = speed["image_shape"][:2]
    tiles = {name: _number(metrics[name]) for name in ("AP", "AP50", "AP75")}
    tiles |= {
        "calibration error": _number(report.calibration_error),
        f"for an image of {width} x {height}": f"{speed['milliseconds']:.0f} ms",
        "parameters": f"{speed['parameters'] / 1e6:.1f} M",
        "weights": f"{speed['megabytes']:.1f} MB",
    }
    boxes = "".join(f'<div class="tile"><b>{v}</b>{_text(k)}</div>' for k, v in tiles.items())
    counts = (
        f"{len(report.images):,} images, {np.sum(~report.objects.iscrowd):,} objects, "
        f"{len(report.detections.labels):,} detections. Time measured on {speed['devices']}."
    )
    return f'<p class="faint">{_text(counts)}</p><div class="grid tiles">{boxes}</div>'


def _precision(report) -> str:
    classes = report.per_class()
    main = [
        (_swatch(report, label), row["objects"], *(_number(row[k]) for k in ("AP", "AP50", "AP75")))
        for label, row in enumerate(classes.values())
    ]
    sizes = [
        (_swatch(report, label), *(_number(row[f"AP{k}"]) for k in ("small", "medium", "large")))
        for label, row in enumerate(classes.values())
    ]
    sides = {}
    for row in report.side_precision:
        upper = f"to {row['to']:g}" if row["to"] < 1e4 else "or more"
        sides[f"{row['from']:g} {upper} ({row['objects']})"] = row["AP50"]
    return (
        "<p>AP is the mean over IoU thresholds from 0.5 to 0.95. Small objects are below 32 x 32 "
        'pixels, large ones above 96 x 96.</p><div class="plots">'
        + _table(("class", "objects", "AP", "AP50", "AP75"), main)
        + _table(("class", "small", "medium", "large"), sizes)
        + _plot(visualization.plot_bars(sides, "AP50 by side of the object in pixels"))
        + _plot(visualization.plot_class_curves(report, "precision over recall"))
        + "</div>"
    )


def _errors(report) -> str:
    errors = report.errors
    worst = max(KINDS, key=errors.costs.get)
    text_of_worst = "There are no errors that cost anything."
    if errors.costs[worst] > 0:
        now = errors.average_precision
        text_of_worst = (
            f"The most expensive kind is <b>{worst}</b>: without these errors, AP50 would be "
            f"{now + errors.costs[worst]:.3f} instead of {now:.3f}."
        )
    texts = dict(zip(KINDS, DESCRIPTIONS, strict=True))
    texts |= {name: f"all {name} together" for name in ("false positives", "false negatives")}
    rows = [
        (
            f'{kind}<br><span class="faint">{text}</span>',
            f"{errors.counts[kind]:,}" if kind in KINDS else "",
            f"{errors.costs[kind]:.3f}",
        )
        for kind, text in texts.items()
    ]
    costs = {kind: errors.costs[kind] for kind in KINDS}
    thresholds = ", ".join(f"{n} {v:.2f}" for n, v in report.confidence_threshold.items())
    matrix = visualization.plot_confusion_matrix(report.confusion, report.class_names)
    return (
        f'<p>{text_of_worst}</p><div class="plots"><div>'
        + _plot(visualization.plot_bars(costs, "AP50 lost"))
        + f"</div>{_table(('kind', 'number', 'cost'), rows)}<div>{_plot(matrix)}"
        + '<p class="faint">Confusion matrix, with the detections of at least these confidences: '
        + f"{_text(thresholds)}.</p></div></div>"
    )


def _confidence(report) -> str:
    rows = [
        (
            _swatch(report, i),
            *(_number(r[k]) for k in ("best_threshold", "precision", "recall", "f1")),
        )
        for i, r in enumerate(report.per_class().values())
    ]
    best = {name: round(value, 4) for name, value in report.best_thresholds.items()}
    plots = "".join(
        _plot(visualization.plot_class_curves(report, kind))
        for kind in ("f1", "precision", "recall")
    )
    plots += _plot(visualization.plot_calibration(report.calibration))
    return (
        "<p>The best threshold of a class is the confidence with the highest F1; dots mark it. The "
        "bars show the precision of detections of similar confidence, with their number above; "
        "ideally, they end at the dashed line. The mean distance from it, the expected calibration "
        f"error, is {_number(report.calibration_error)}.</p>"
        f'<div class="plots">{plots}'
        + _table(("class", "best", "precision", "recall", "F1"), rows)
        + f"</div><pre>model.detect(images, confidence_threshold={_text(best)})</pre>"
    )


def _worst(report, folder) -> str:
    costs = report.image_costs
    cards = [
        _figure(
            report,
            view,
            _kept_rows(report, image),
            _objects_of(report, image),
            folder,
            f"cost {costs[image]:.1f}",
        )
        for view, image in report.views.get("worst", ())
    ]
    intro = (
        "<p>An image costs one for each missed object, plus the confidence of each false positive. "
        "Solid: detections; dashed: ground truth.</p>"
    )
    return _gallery(intro, "images", cards, "No image has an error.")


def _examples(report, folder) -> str:
    content = []
    groups = {}
    for kind in ("false", "missed"):
        for view, (label, row) in report.views.get(kind, ()):
            groups.setdefault((label, kind), []).append((view, row))
    for (label, kind), views in sorted(groups.items()):
        cards = []
        for view, row in views:
            if kind == "false":
                found, text = np.array([row]), f"{report.detections.confidence[row]:.2f}"
                objects = _objects_of(report, view.image)
                text += (
                    f", {KINDS[report.errors.kind[row]]}" if report.errors.kind[row] >= 0 else ""
                )
            else:
                found, objects, text = _kept_rows(report, view.image), np.array([row]), ""
            cards.append(_figure(report, view, found, objects, folder, text))
        title = "false positives" if kind == "false" else "missed"
        heading = f"<h3>{_swatch(report, label)}: {title}</h3>"
        content.append(f'{heading}<div class="grid crops">{"".join(cards)}</div>')
    if not content:
        return "<p>None at these confidences.</p>"
    shown = len({label for label, _ in groups})
    rest = f" The {shown} classes with most errors." if shown < len(report.class_names) else ""
    return (
        "<p>The most confident false positives and missed objects of each class. Solid: "
        f"detections; dashed: ground truth.{rest}</p>" + "".join(content)
    )


def _labels(report, folder) -> str:
    cards, names = [], report.class_names
    for view, suspicion in report.views.get("labels", ()):
        found = names[report.detections.labels[suspicion.detection]]
        objects = _objects_of(report, suspicion.image)
        text = f"<b>{suspicion.kind}</b> {suspicion.score:.2f}: "
        if suspicion.kind == "missing":
            text += f"no label, looks like {_text(found)}"
        elif suspicion.kind == "wrong class":
            label = names[report.objects.labels[suspicion.object]]
            text += f"label {_text(label)}, looks like {_text(found)}"
        else:
            text += f"box of {_text(found)}"
        cards.append(_figure(report, view, np.array([suspicion.detection]), objects, folder, text))
    intro = (
        f"<p>{len(report.suspicions):,} labels contradict confident detections; the most "
        "suspicious first. Solid: detection; dashed: labels. All of them are in the JSON file.</p>"
    )
    return _gallery(intro, "crops", cards, "No label contradicts a confident detection.")


def _gallery(intro: str, kind: str, cards: list[str], otherwise: str) -> str:
    if not cards:
        return f"<p>{otherwise}</p>"
    return f'{intro}<div class="grid {kind}">{"".join(cards)}</div>'


# === Elements ===


def _kept_rows(report, image: int) -> np.ndarray:
    """Detections of an image from the thresholds on."""
    return np.flatnonzero(report.kept() & (report.detections.image == image))


def _objects_of(report, image: int) -> np.ndarray:
    return np.flatnonzero(report.objects.image == image)


def _figure(report, view, found: np.ndarray, objects: np.ndarray, folder, text: str) -> str:
    """A view with these detections and objects, linked to its file."""
    name = report.images[view.image]
    short = _text(os.path.basename(name) if report.files else name)
    link = short
    if report.files:
        link = f'<a href="{_text(_address(name, folder))}">{short}</a>'
    caption = f"{text}<br>{link}" if text else link
    source = _draw(report, view, found, objects)
    return (
        f'<figure><img loading="lazy" alt="{short}" src="{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _draw(report, view, found: np.ndarray, objects: np.ndarray) -> str:
    """The view with boxes, as the address of a JPEG."""
    from matplotlib.figure import Figure

    height, width = view.pixels.shape[:2]
    figure = Figure(figsize=((width + 0.01) / 100, (height + 0.01) / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    boxes = {}
    for name, table, rows in (
        ("found", report.detections, found),
        ("true", report.objects, objects),
    ):
        moved = (table.boxes[rows] - np.tile(view.corner, 2)) * view.scale
        inside = (moved[:, :2] < (width, height)).all(axis=1) & (moved[:, 2:] > 0).all(axis=1)
        rows, moved = rows[inside], moved[inside]
        boxes[name] = {"boxes": moved, "labels": table.labels[rows]}
        if name == "found":
            boxes[name]["confidence"] = table.confidence[rows]
    visualization.plot_detections(
        view.pixels,
        boxes["found"],
        report.class_names,
        ground_truth=boxes["true"],
        confidence_threshold=0.0,
        ax=axes,
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    stream = io.BytesIO()
    figure.savefig(stream, format="jpg", dpi=100, pil_kwargs={"quality": 85})
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _address(name: str, folder: str | None) -> str:
    if folder is None:
        return pathlib.Path(os.path.abspath(name)).as_uri()
    return urllib.parse.quote(os.path.relpath(name, folder).replace(os.sep, "/"))


def _plot(figure) -> str:
    """A figure as SVG whose black, gray and white follow the colors of the page."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text)
    text = text.replace("stroke: #000000", "stroke: currentColor")
    text = text.replace("stroke: #e6e6e6", "stroke: var(--line)")
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _table(head: tuple, rows: list[tuple]) -> str:
    def line(cells, tag):
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<div><table><tr>{line(head, 'th')}</tr>{body}</table></div>"


def _swatch(report, label: int) -> str:
    red, green, blue = (round(255 * value) for value in visualization.class_color(label))
    name = _text(report.class_names[label])
    return f'<i style="background: rgb({red}, {green}, {blue})"></i>{name}'


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _text(value) -> str:
    return html.escape(str(value))
