"""Draws what tests/bench/overload.py measured: the step of load over time, with and without the limiter side by side.

    python -m tests.bench.overload_plot FACTS.json FILE.png

Four panels each, with the same scales on both sides: offered load and goodput; the limit, what is in flight and what
waits, logarithmic above 10; p99 by priority; refusals by priority. Needs matplotlib (pip install 'steadyread[bench]').
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file, no window

from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image  # comes with matplotlib

Facts = dict[str, Any]

PRIORITIES = ("critical", "normal", "background")
COLOURS = {"critical": "#c0392b", "normal": "#2471a3", "background": "#7f8c8d", "others": "#27ae60"}
TITLES = {"with": "with the limiter", "without": "without"}
GREY = "#b8b8b8"
SHOWN_FROM = "idle"  # the phase
COLOURS_MAX = 128
WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 11.0, 10.0, 80


def plot(facts: Facts, file: Path) -> None:
    runs = facts["runs"]
    pyplot.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.3})
    figure, rows = pyplot.subplots(
        4,
        len(runs),
        sharex=True,
        sharey="row",
        squeeze=False,
        figsize=(WIDTH_INCHES * len(runs) / 2, HEIGHT_INCHES),
        layout="constrained",
    )
    for column, (name, run) in enumerate(runs.items()):
        _draw([row[column] for row in rows], facts, run)
        rows[0][column].set_title(TITLES[name], fontsize=11, pad=18)
    for row, label in zip(
        rows, ("requests/s", "requests at the slow node", "p99, ms", "refused requests/s"), strict=True
    ):
        row[0].set_ylabel(label)
    figure.suptitle(
        f"One slow node ({facts['engine']}, {facts['capacity']:.0f} requests/s at most): load 1x, 4x, 1x of that"
    )
    for row in (rows[0], rows[1], rows[3]):
        row[0].set_ylim(bottom=0)  # last, because it ends the scaling to the data, of the whole row
    figure.savefig(file, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    with Image.open(file) as image:
        image.convert("RGB").quantize(COLOURS_MAX).save(file, optimize=True)  # a third of the size


def _draw(panels: list[Axes], facts: Facts, run: Facts) -> None:
    load, limit, latency, refused = panels
    buckets = run["buckets"]
    streams = run["streams"]
    begin = run["phases"][SHOWN_FROM]["begin"]
    first = round(begin / buckets["seconds"])
    times = [place * buckets["seconds"] for place in range(len(buckets["offered"][0]) - first)]
    slow = [streams.index(name) for name in PRIORITIES]

    def total(what: str) -> list[float]:
        return _smooth(
            [sum(values) for values in zip(*(buckets[what][each][first:] for each in slow), strict=True)]
        )

    load.fill_between(times, total("offered"), color=GREY, alpha=0.5, linewidth=0, label="offered")
    load.plot(times, total("answered"), color="black", label="goodput")
    load.plot(
        times,
        _smooth(buckets["answered"][streams.index("others")][first:]),
        color=COLOURS["others"],
        label="other nodes",
    )
    load.axhline(facts["capacity"], color="black", linewidth=0.8, linestyle=":", label="capacity")

    seen = [(at - begin, *rest) for at, *rest in run["watched"] if at >= begin]
    named = (("in flight", "#2471a3", 2), ("waiting", "#e67e22", 3), ("limit", "black", 1))
    for name, colour, place in named:
        values = [each[place] for each in seen]
        if any(value is not None for value in values):
            limit.plot([each[0] for each in seen], values, color=colour, label=name)
    limit.set_yscale("symlog", linthresh=10)  # linear up to 10

    for name in (*PRIORITIES, "others"):
        values = buckets["p99_ms"][streams.index(name)][first:]
        latency.plot(times, [value or float("nan") for value in values], color=COLOURS[name], label=name)
    latency.axhline(
        facts["deadline_seconds"] * 1000, color="black", linewidth=0.8, linestyle=":", label="clients give up"
    )
    latency.set_yscale("log")

    for name in PRIORITIES:
        values = _smooth(buckets["shed"][streams.index(name)][first:])
        refused.plot(times, values, color=COLOURS[name], label=f"{name}: OVERLOADED")
    refused.plot(times, total("timed_out"), color="#8e44ad", linestyle="--", label="all: no answer in time")
    refused.set_xlabel("seconds")

    for name, phase in run["phases"].items():
        if phase["begin"] < begin:
            continue
        for panel in panels:
            panel.axvline(phase["begin"] - begin, color=GREY, linewidth=0.8)
        load.annotate(
            "critical alone" if name == "idle" else name,
            ((phase["begin"] + phase["end"]) / 2 - begin, 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            color="#555555",
        )
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper left", fontsize=7.5, framealpha=0.8)
    load.set_xlim(0, times[-1])


def _smooth(values: list[float], half: int = 2) -> list[float]:
    """The mean over half a second: Poisson arrivals are noise."""
    return [
        sum(near) / len(near)
        for near in (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    ]


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
