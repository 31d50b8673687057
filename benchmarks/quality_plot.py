"""The table as a picture: ln perplexity lost by ratio, a panel for every model and corpus."""

from pathlib import Path

from quality_methods import BASELINE
from quality_table import CORPORA, Row

_STYLES: dict[str, tuple[str, str]] = {
    "random": ("#bbbbbb", ":"),
    "weight norm": ("#999999", ":"),
    "wanda-sp": ("#c49c6c", "--"),
    "flap": ("#8c6bb1", "--"),
    "camera 0": ("#777777", "-."),
    BASELINE: ("#000000", "-"),
    "camera 1": ("#444444", "-."),
    "refit": ("#6baed6", "-"),
    "obs": ("#08519c", "-"),
}


def draw(rows: list[Row], sources: dict[str, dict[str, str]], path: Path) -> None:
    """Write a PNG.

    Args:
        rows: of all models.
        sources: by model and corpus, what the text is.
        path: the file to write.
    """
    import matplotlib  # heavy; only the picture needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = pyplot.subplots(
        len(models), len(CORPORA), figsize=(11, 1.2 + 3.2 * len(models)), squeeze=False, layout="constrained"
    )
    handles = {}
    for line, model in enumerate(models):
        for column, corpus in enumerate(CORPORA):
            axis = axes[line][column]
            if corpus not in sources[model]:
                axis.set_axis_off()
                continue
            for method, (colour, style) in _STYLES.items():
                ours = [row for row in rows if row.model == model and row.method == method]
                if not ours:
                    continue
                handles[method] = axis.errorbar(
                    [100 * row.ratio for row in ours],
                    [row.loss[corpus].mean for row in ours],
                    [row.loss[corpus].spread or 0.0 for row in ours],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3.5,
                    linewidth=2 if method == BASELINE else 1.3,
                    capsize=2,
                )
            lost = [row.loss[corpus].mean for row in rows if row.model == model]
            if min(lost) > 0:  # on another domain pruning may gain a little
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            axis.set_title(f"{model}: {sources[model][corpus]}", fontsize=9, loc="left")
            axis.set_xticks(sorted({100 * row.ratio for row in rows}))
            axis.grid(axis="y", color="#eeeeee")
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel("ln perplexity lost (nats)", fontsize=9)
            if line + 1 == len(models):
                axis.set_xlabel("FFN channels removed (%)", fontsize=9)
    names = [method for method in _STYLES if method in handles]
    figure.legend(
        [handles[name] for name in names], names, loc="outside right center", frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
