"""Numbers and findings in words, the same in every output."""

import math
from collections.abc import Mapping
from typing import Any

from camera.benchmark.report import BenchmarkRow, Spread
from camera.registry import PRUNING_METHODS
from camera.report.schema import Accuracy, ModelRow, PruneSummary, Results


def count_words(count: int) -> str:
    """Parameters or tokens: `8.03 B`, `262 k`."""
    value = float(count)
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g} B"


def percent(share: float, digits: int = 1) -> str:
    """`20.9 %`."""
    return f"{100 * share:.{digits}f} %"


def change_words(share: float) -> str:
    """With its sign: `+5.1 %`, and `±0.0 %` for what rounds to nothing."""
    text = f"{100 * share:+.1f}"
    return "±0.0 %" if float(text) == 0 else f"{text.replace('-', '−')} %"


def size_unit(largest: int) -> tuple[float, str]:
    """Bytes and name of the unit for sizes up to this."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((scale, unit) for scale, unit in units if largest >= scale), (1.0, "bytes"))


def drawable(row: ModelRow, text: str) -> bool:
    """Whether a model's perplexity on a text was measured, and is a number to draw."""
    return text in row.perplexity and 0 < row.perplexity[text].value < math.inf


def perplexity_words(value: float) -> str:
    """Two decimals while they mean something."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def score_words(row: ModelRow, text: str) -> str:
    """`11.96 (+115.4 %)`: perplexity on a text, and its change against the original; a dash if not measured."""
    score = row.perplexity.get(text)
    if score is None:
        return "–"
    change = "" if score.change is None or row.id == "original" else f" ({change_words(score.change)})"
    return perplexity_words(score.value) + change


def accuracy_words(score: Accuracy | None) -> str:
    """`71.2 ±1.1` for the original, `69.9 (−1.3 ±0.5)` for what is compared with it; a dash if not measured."""
    if score is None:
        return "–"
    value = f"{100 * score.value:.1f}"
    if score.change is not None:
        return f"{value} ({points_words(score.change.difference)}{_error_words(score.change.standard_error)})"
    return value + _error_words(score.standard_error)


def points_words(share: float) -> str:
    """Points with their sign: `−1.3`, and `0.0` for what rounds to nothing."""
    return change_words(share).removesuffix(" %").removeprefix("±")


def _error_words(error: float | None) -> str:
    return "" if error is None else f" ±{100 * error:.1f}"


def milliseconds(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def speed_words(spread: Spread | None, speedup: float | None, noisy: bool = False) -> str:
    """`1.83 (1.21×)`, with `*` if noisy; a dash for what was not measured."""
    if spread is None:
        return "–"
    ratio = "" if speedup is None else f" ({speedup:.2f}×)"
    return f"{milliseconds(spread.median)}{ratio}{'*' if noisy else ''}"


def prune_words(prune: PruneSummary) -> str:
    """What became of the FFN channels."""
    if not prune.removed_share:
        return "No FFN channel removed"
    done = "removed" if prune.mode == "physical" else "set to zero"
    what = "experts' FFN channels" if prune.experts else "FFN channels"
    return f"{percent(prune.removed_share)} of the {what} {done} ({widths_words(prune)})"


def widths_words(prune: PruneSummary) -> str:
    """`11008 → 8832 per layer`; of a mixture of experts `16 → 14 experts of 192 → 160 channels per layer`."""
    if not prune.experts:
        return f"{prune.width} → {prune.kept_width} per layer"
    count = (
        f"{prune.experts} → {prune.experts_kept}"
        if prune.experts_kept < prune.experts
        else str(prune.experts)
    )
    if prune.kept_width == prune.width:
        return f"{count} experts of {prune.width} channels per layer"
    average = " on average" if prune.scope == "layer" else ""
    return f"{count} experts of {prune.width} → {prune.kept_width} channels{average} per layer"


def asked_words(prune: PruneSummary, recipe: Mapping[str, Any]) -> str:
    """What a recipe asked for, of a mixture of experts."""
    step = f"widths in multiples of {prune.multiple_of}"
    if prune.considered:
        return f"{percent(prune.ratio)} asked for, split automatically; {step}"
    asked = recipe.get("prune", {}).get("experts", 0)
    experts = f"{percent(asked)} of the experts and " if isinstance(asked, float) and asked else ""
    return f"{experts}{percent(prune.ratio)} of the channels asked for; {step}"


def experts_words(results: Results) -> str:
    """How uneven the experts of a model are."""
    counts = [count for layer in results.experts for count in layer.tokens]
    text = (
        f"{len(results.experts)} layers route each token to some of {len(results.experts[0].tokens)} experts. "
        f"On the calibration text an expert got {min(counts):,} to {max(counts):,} tokens."
    )
    dropped = sum(not kept for layer in results.experts for kept in layer.kept)
    if dropped:
        text += (
            f" The {dropped} experts that put out the least energy, equally many in each layer, were dropped."
        )
    return text


def tokens_map_note(results: Results) -> str:
    """What the map of tokens shows."""
    dropped = any(not kept for layer in results.experts for kept in layer.kept)
    crossed = "; crossed out: dropped" if dropped else ""
    same = ""
    if results.prune is not None and not uneven(results) and results.prune.kept_width < results.prune.width:
        same = f"; {'the others keep' if dropped else 'each keeps'} {results.prune.kept_width} of {results.prune.width} channels"
    return f"a row is a decoder layer, a column an expert; strong got many, by square roots{crossed}{same}"


def scored_words(results: Results) -> str:
    """Whose channels have an importance, of a mixture of experts; nothing of a dense model."""
    if not results.experts:
        return ""
    dropped = any(not kept for layer in results.experts for kept in layer.kept)
    return "channels of the experts that stay; " if dropped else "channels of all experts; "


def uneven(results: Results) -> bool:
    """Whether the experts that stay have several widths, as only a mask can give them."""
    return len({kept for layer in results.experts for kept in layer.kept if kept}) > 1


def ffn_words(row: ModelRow) -> str:
    """`8832`; of a mixture of experts `14 × 160`; a dash if not known."""
    if row.ffn_width is None:
        return "–"
    return f"{row.experts} × {row.ffn_width}" if row.experts else str(row.ffn_width)


def method_words(prune: PruneSummary) -> str:
    """What chose the channels, with what else the method does."""
    if prune.method is None or prune.method not in PRUNING_METHODS:
        return "not recorded"
    method = PRUNING_METHODS[prune.method]
    refit = ", down projections refitted" if method.needs_gram else ""
    alpha = (
        ""
        if prune.reduce_ratio is None or prune.method == "obs"
        else f", reduce-ratio α = {prune.reduce_ratio:g}"
    )
    return f"{method.title}{alpha}{refit} (method {prune.method})"


def quoted_row(results: Results) -> BenchmarkRow | None:
    """The product's row with the longest decoding that has a speed-up: the one that the verdict quotes."""
    product = results.product
    rows = [
        row
        for row in results.benchmark
        if product is not None and row.model == product.title and row.decode_speedup is not None
    ]
    return max(rows, key=lambda row: row.decode, default=None)


def verdict(results: Results) -> str:
    """One sentence: what was removed, what it cost, what it gained."""
    parts = ["No pruning recorded" if results.prune is None else prune_words(results.prune)]
    product, original = results.product, results.row("original")
    if product and original and product.bytes and original.bytes:
        name = f"stored as {product.type}" if product.type else product.title
        parts.append(f"{name}, {percent(product.bytes / original.bytes, 0)} of the original's size")
    changes = [
        f"{change_words(score.change)} on {text}"
        for text, score in (product.perplexity.items() if product else ())
        if score.change is not None
    ]
    parts.append(
        f"perplexity {', '.join(changes)} against the original" if changes else "perplexity not measured"
    )
    if product and (change := product.task_change) is not None:
        points = f"{points_words(change.difference)}{_error_words(change.standard_error)} points"
        parts.append(f"{tasks_words(results)} {points} against the original")
    quoted = quoted_row(results)
    if quoted is not None:
        parts.append(
            f"decode {quoted.decode_speedup:.2f} × as fast as {results.benchmark_baseline} "
            f"({quoted.engine}, {quoted.decode} tokens{', a noisy measurement' if quoted.noisy else ''})"
        )
    else:
        parts.append("speed not measured")
    return "; ".join(parts) + "."


def tasks_words(results: Results) -> str:
    """What an average over the tasks is of."""
    count = len(results.tasks)
    return f"average of {count} tasks" if count > 1 else f"accuracy on {results.tasks[0]}"


def noisy_words(results: Results) -> list[str]:
    """The rows whose runs lie too far apart: a line for each model and engine with its lengths."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in results.benchmark:
        if row.noisy:
            found.setdefault((row.model, row.engine), []).append(str(row.decode))
    return [f"{model} on {engine}: decode {', '.join(lengths)}" for (model, engine), lengths in found.items()]


def prompts(results: Results) -> tuple[str, ...]:
    """The prompts after which models wrote, in order."""
    return tuple(dict.fromkeys(prompt for row in results.models for prompt in row.samples))
