"""One self-contained HTML page of a report: opens from a file, without a network."""

import base64
import html
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from src.files import replacing


class Figures(NamedTuple):
    """Pictures as uint8 [H, W, 3], in rows, and the distances that the memory histogram shows."""

    samples: dict[int, list[np.ndarray]]  # by NFE, from the same noise
    trajectory: list[list[np.ndarray]]
    interpolated: list[list[np.ndarray]]
    closest: list[list[np.ndarray]]  # samples above their nearest training images, by features
    closest_by_pixel: list[list[np.ndarray]]
    farthest: list[list[np.ndarray]]
    distances: np.ndarray  # from samples to their nearest training images, by features
    unseen_distances: np.ndarray  # the same from validation images


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; image-rendering: pixelated; }
img.plot { image-rendering: auto; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; opacity: .8; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
input[type=range] { width: min(20rem, 100%); }
button { font: inherit; padding: .3rem .8rem; }
"""

SCRIPT = """
const slider = document.getElementById('nfe');
const show = () => document.querySelectorAll('[data-nfe]').forEach(
  (e, i) => { e.hidden = i !== Number(slider.value); });
slider.addEventListener('input', show); show();
document.getElementById('copy').addEventListener('click', async (event) => {
  const rows = [...document.querySelectorAll('#scores tr')];
  const text = rows.map(row => [...row.cells].map(cell => cell.innerText).join('\\t')).join('\\n');
  try { await navigator.clipboard.writeText(text); event.target.textContent = 'Copied'; }
  catch { const range = document.createRange(); range.selectNode(document.getElementById('scores'));
          getSelection().removeAllRanges(); getSelection().addRange(range); event.target.textContent = 'Selected'; }
});
"""


def write_page(folder: Path, content: dict, figures: Figures) -> None:
    """Write report.html, the page of a report's numbers (report.json) and its figures, and its plots beside it."""
    name = content["distance"]
    plots = {"sweep": _plot_sweep(content), "limit": _plot_limit(content), "memory": _plot_memory(figures)}
    for plot, png in plots.items():
        with replacing(folder / f"{plot}.png") as temporary:
            temporary.write_bytes(png)
    facts = (
        f"{content['samples']} samples for each NFE and sampling seed, {content['sampling seeds']} sampling seeds; "
        f"{content['size']} px{', sampled in bfloat16' if content['bf16'] else ''}; "
        f"{content['validation images']:,} validation images; "
        f"{content['training images']:,} training images; features {content['features'][:16]}, "
        f"weights {content['weights']}"
        + "".join(f"; {name} at NFE {_listed(by_nfe)}" for name, by_nfe in content["sampler"].items() if by_nfe)
    )
    tuned = ", ".join(map(str, _tuned(content)))
    apart = f" NFE {tuned}: with settings that were searched for them alone; the others without." if tuned else ""
    keys = list(content["nfe"])
    title = html.escape("/".join(Path(content["checkpoint"]).parts[-2:]))
    grids = "".join(
        f'<figure data-nfe><img alt="samples at NFE {nfe}" src="{_png(_grid(_rows(images, 8), 3))}">'
        f"<figcaption>NFE {nfe}: 32 samples from the same noise, chosen by seed.</figcaption></figure>"
        for nfe, images in figures.samples.items()
    )
    parts = [
        f"<h1>{title}: {name} at NFE {', '.join(keys)}</h1><p>{facts}.</p>",
        _score_table(content),
        "<h2>Samples</h2>"
        f"<label>NFE {', '.join(keys)} <input id=nfe type=range min=0 max={len(keys) - 1} value=0></label>{grids}",
        "<h2>Quality against network calls</h2>",
        _figure(_uri(plots["sweep"]), f"{name} of one sampling seed; the dashed line is the floor.{apart}", plot=True),
        "<h2>Sample size</h2>",
        _figure(
            _uri(plots["limit"]),
            f"{name} against 1/N: its bias falls as samples grow, towards the limit at 0 on the left; that of "
            "the finite number of validation images stays. Compare scores only at the same N.",
            plot=True,
        ),
        "<h2>Memory</h2>",
        _memory(content, figures, _uri(plots["memory"])),
        "<h2>Failures</h2>",
        _failure_table(content),
        _figure(
            _png(_grid(figures.farthest, 3)), "The eight samples of NFE 4 farthest from all real images, by features."
        ),
        "<h2>Trajectories and interpolations</h2>",
        _figure(_png(_grid(figures.trajectory, 3)), "From noise to sample in four jumps, one row a sample."),
        _figure(_png(_grid(figures.interpolated, 3)), "NFE 4 from noise interpolated on the sphere, one row a pair."),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(name)}</title><style>{STYLE}</style><body>{''.join(parts)}<script>{SCRIPT}</script></body></html>"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _score_table(content: dict) -> str:
    columns = ("frechet", "kernel", "precision", "recall", "density", "coverage")
    titles = (content["distance"], "kernel distance", *columns[2:])
    rows = []
    for nfe, found in content["nfe"].items():
        cells = [f"{mean:.4g} ± {half:.2g}" for mean, half in (found["intervals"][column] for column in columns)]
        cells[1:1] = [f"{found['ratio']:.2f}", f"{found['samples']['at infinity']:.4g}"]
        rows.append((f"NFE {nfe}", *cells))
    floor = content["floor"]
    rows.append((f"floor ({floor['training images']} training images)", f"{floor['frechet']:.4g}", "1", "", "",
                 *(f"{floor[column]:.4g}" for column in columns[2:])))  # fmt: skip
    table = _table(("", titles[0], "ratio to floor", "at N → ∞", *titles[1:]), rows, "scores")
    return (
        f"<div class=wide>{table}</div><p><button id=copy>Copy the table</button></p>"
        "<p>± is half the 95 % interval over sampling seeds (Student's t). Lower is better for distances, higher for "
        "the others. Precision, recall, density and coverage: 5 neighbours.</p>"
    )


def _memory(content: dict, figures: Figures, plot: str) -> str:
    columns = [(space, told) for space in ("features", "pixels") for told in ("share of copies", "nearer than unseen")]
    rows = [
        (f"NFE {nfe}", *(f"{found['memory'][space][told]:.3f}" for space, told in columns))
        for nfe, found in content["nfe"].items()
    ]
    table = _table(("", *(f"{told}, by {space}" for space, told in columns)), rows)
    return (
        f"<div class=wide>{table}</div><p>Share of copies: samples nearer to a training image, or its mirror image, "
        "than 99 % of the validation images are (without memory 0.01). Nearer than unseen: the chance that a sample is "
        "nearer than a validation image (without memory 0.5; bad samples are far from all images and have less).</p>"
        + _figure(plot, "Distance to the nearest training image, by features, at NFE 4.", plot=True)
        + _figure(
            _png(_grid(figures.closest, 3)), "The eight samples nearest to training images by features, above those."
        )
        + _figure(_png(_grid(figures.closest_by_pixel, 3)), "The same by pixels.")
    )


def _failure_table(content: dict) -> str:
    names = list(next(iter(content["nfe"].values()))["failures"])
    rows = [
        (f"NFE {nfe}", *(f"{found['failures'][n]:.3f}" for n in names), f"{found['variety']:.3f}")
        for nfe, found in content["nfe"].items()
    ]
    table = _table(("", *names, "variety"), rows)
    note = (
        "Shares of samples beyond what 99 % of the validation images keep to (validation images: 0.01). Variety: a "
        "pixel's standard deviation over samples, as a share of that over validation images."
    )
    return f"<div class=wide>{table}</div><p>{note}</p>"


def _table(head: tuple, rows: list[tuple], name: str = "") -> str:
    line = lambda cells, tag: f"<tr>{''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells)}</tr>"  # noqa: E731
    return f"<table{f' id={name}' if name else ''}>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _figure(source: str, caption: str, plot: bool = False) -> str:
    kind = " class=plot" if plot else ""
    return f'<figure><img{kind} alt="" src="{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _rows(images: list[np.ndarray], width: int) -> list[list[np.ndarray]]:
    return [images[i : i + width] for i in range(0, len(images), width)]


def _grid(rows: list[list[np.ndarray]], scale: int) -> Image.Image:
    image = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))
    return (
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if image.width < 400
        else image
    )


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _axes(**labels):
    """Axes in a grey that reads on light and dark ground alike."""
    grey = "#808080"
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(**labels)
    axes.tick_params(colors=grey, which="both")
    for item in (axes.xaxis.label, axes.yaxis.label):
        item.set_color(grey)
    for spine in axes.spines.values():
        spine.set_color(grey)
    axes.grid(alpha=0.25, which="both")
    return figure, axes


def _drawn(figure, axes) -> bytes:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(labelcolor="#808080", framealpha=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png", transparent=True)
    return buffer.getvalue()


def _listed(by_nfe: dict) -> str:
    return ", ".join(f"{nfe} ({value if isinstance(value, list) else f'{value:g}'})" for nfe, value in by_nfe.items())


def _tuned(content: dict) -> list[int]:
    """The NFEs of the sweep for which the sampler has settings of their own."""
    settings = {int(nfe) for by_nfe in content["sampler"].values() for nfe in by_nfe or {}}
    return [nfe for nfe in map(int, content["sweep"]) if nfe in settings]


def _plot_sweep(content: dict) -> bytes:
    figure, axes = _axes(xlabel="NFE", ylabel=content["distance"])
    found = {int(nfe): distance for nfe, distance in content["sweep"].items()}
    nfes, tuned = list(found), _tuned(content)
    plain = [nfe for nfe in nfes if nfe not in tuned]
    for some, marks, label in ((plain, "o-", "without settings"), (tuned, "s", "with settings of their own")):
        if some:  # apart: a line through both would tell of the settings, not of calls
            axes.plot(some, [found[nfe] for nfe in some], marks, label=label if tuned else None)
    axes.axhline(content["floor"]["frechet"], color="#808080", linestyle="--")
    numbered(axes, nfes)
    return _drawn(figure, axes)


def numbered(axes, nfes: list[int]) -> None:
    """Scale both axes of a plot of distances against NFE by logarithms, and number them, however narrow they are."""
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(nfes, nfes)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [tick for scale in (0.1, 1, 10, 100) for tick in (scale, 2 * scale, 5 * scale) if low <= tick <= high]
    if len(ticks) < 2:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter("{x:g}")


def _plot_limit(content: dict) -> bytes:
    figure, axes = _axes(xlabel="1 / N", ylabel=content["distance"])
    for nfe, found in content["nfe"].items():
        sizes = 1 / np.array(found["samples"]["counts"])
        (line,) = axes.plot(sizes, found["samples"]["frechet"], "o", label=f"NFE {nfe}")
        slope, limit = np.polyfit(sizes, found["samples"]["frechet"], 1)
        axes.plot([0, sizes.max()], [limit, limit + slope * sizes.max()], color=line.get_color(), linewidth=0.8)
    return _drawn(figure, axes)


def _plot_memory(figures: Figures) -> bytes:
    figure, axes = _axes(xlabel="distance to the nearest training image", ylabel="share")
    bins = np.histogram_bin_edges(np.concatenate([figures.distances, figures.unseen_distances]), 40)
    for label, values in (("samples", figures.distances), ("validation images", figures.unseen_distances)):
        axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), alpha=0.5, label=label)
    return _drawn(figure, axes)
