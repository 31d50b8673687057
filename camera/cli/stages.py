"""The commands for single stages: each is a function of `camera.api`, and what is printed of its result."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camera import api
from camera.cli.options import Flags
from camera.cli.output import print_table, progress_bar, say, say_lines

if TYPE_CHECKING:
    from camera.benchmark.report import BenchmarkReport
    from camera.formats.gguf_import import ImportReport
    from camera.formats.quantized_model import QuantizeReport
    from camera.report.schema import TaskScore


@dataclass(frozen=True)
class Stage:
    """One command."""

    run: Callable[..., Any]
    show: Callable[..., None]
    """Given the result and the values that the function was called with."""
    json: Callable[[Any], Any] | None = None
    """What --json prints of the result; None: the command has no --json."""
    flags: Mapping[str, Flags] = field(default_factory=dict)
    """By options parameter, where not every field is a flag."""
    progress: Callable[[str], AbstractContextManager[Any]] = progress_bar
    """Given the command's name; gives what the function is told its progress by."""
    code: Callable[[Any], int] = lambda result: 0
    """The exit code for a result."""
    called: str = ""
    """The command's name, where it is not the function's."""

    @property
    def name(self) -> str:
        """Of the command."""
        return self.called or self.run.__name__.replace("_", "-")


def _import(report: "ImportReport", values: dict[str, Any]) -> None:
    held = ", ".join(f"{count} {type}" for type, count in report.types.items())
    say(f"{report.parameters:,} weights ({held}) as {report.dtype}: {values['out']}")
    if report.rounded:
        say(
            f"{report.rounded} tensors hold numbers that {report.dtype} rounds: {100 * report.rounding_error:.2g} % of their "
            "RMS; --dtype float32 keeps them all"
        )
    else:
        say(f"every number is that of {report.file}")
    for line in report.unknown:
        say(f"not in the file: {line}")


def _prune(summary: dict[str, Any], values: dict[str, Any]) -> None:
    from camera.pruning.summary import complaints
    from camera.report.words import percent

    out = values["out"]
    if values["scores"] is not None:
        say(f"kept channels: {out}")
        return
    experts = (
        f"{summary['experts_kept']} of {summary['experts']} experts and " if "experts" in summary else ""
    )
    say(f"kept {experts}{summary['kept_width']} of {summary['width']} FFN channels in each layer: {out}")
    decisions = summary.get("decisions", [])
    method = summary["method"]
    if method != "camera" and decisions:
        say(f"refitted {sum(one['refitted'] for one in decisions)} of {len(decisions)} down projections")
    shares = [share for one in decisions for share in (one["zero_shares"] or {}).values()]
    if shares:  # matrices of one size, so that the mean is the share of all
        say(f"{percent(sum(shares) / len(shares))} of the feed-forward weights that stay are zero")
    for line in complaints(summary):
        say(line)


def _quantize(report: "QuantizeReport", values: dict[str, Any]) -> None:
    say(f"{report.bits_per_weight:.3f} bits per weight: {values['out']}")
    if report.target_bpw is not None:
        for name, type in report.finer_lines.items():
            say(f"  {name}: {type}")
    few, experts = report.few_tokens
    if few:
        say(
            f"{few} of {experts} experts had too few calibration tokens, and were searched with equal weights"
        )
    for name, type, reason in report.fallback_lines:
        say(f"  {name}: {type}, because {reason}")


def _convert(files: list[Path], values: dict[str, Any]) -> None:
    for label, path in zip(("gguf", "twin"), files, strict=False):
        say(f"{label}: {path}")


def _evaluate(found: api.Evaluation, values: dict[str, Any]) -> None:
    if one := found.perplexity:
        say(
            f"perplexity {one.perplexity:.4f} over {one.tokens} tokens "
            f"({one.windows} windows of {one.window}, {one.dtype} on {one.device})"
        )
    if compared := found.divergence:
        say(
            f"KL divergence {compared.divergence:.5f} nats per token from {values['reference']}, "
            f"the same likeliest token {compared.top_1_agreement:.2%} of the time"
        )
    if found.tasks:
        _show_tasks(found.tasks, compared=bool(found.reference_tasks))
    for sample in found.samples:
        say(f"{sample.prompt!r}")
        say(f"  {sample.text!r}")


def _evaluation_json(found: api.Evaluation) -> dict[str, Any]:
    measured = {} if found.perplexity is None else dict(vars(found.perplexity))
    others = {each.name: getattr(found, each.name) for each in fields(found) if each.name != "perplexity"}
    return measured | {name: value for name, value in others.items() if value}


def _show_tasks(scores: "Mapping[str, TaskScore]", compared: bool) -> None:
    from camera.report.words import accuracy_words

    rows = []
    for task, score in scores.items():
        accuracies = (accuracy_words(score.metrics.get(name)) for name in ("acc", "acc_norm"))
        change = score.metrics["acc"].change
        paired = ("", "", "") if change is None else (change.gained, change.lost, f"{change.p_value:.3f}")
        chance = "–" if score.chance is None else f"{100 * score.chance:.1f}"
        rows.append([task, str(score.documents), chance, *accuracies, *map(str, paired if compared else ())])
    print_table(
        ("task", ">n", ">chance", ">acc", ">acc_norm", *((">gained", ">lost", ">p") if compared else ())),
        rows,
    )
    shots = max(score.few_shot for score in scores.values())
    say(
        f"n questions, {shots}-shot; accuracy in %, ± one standard error; chance: guessing, or the commonest answer"
    )
    if compared:
        say("in brackets points against the reference, ± one standard error of the pairs")


def _bench(report: "BenchmarkReport", values: dict[str, Any]) -> None:
    from camera.benchmark.table import markdown_table

    say_lines(markdown_table(report))


STAGES = (
    Stage(api.import_gguf, _import, json=lambda report: report, called="import"),
    Stage(
        api.capture,
        lambda tokens, values: say(f"statistics of {tokens} tokens: {values['out']}"),
        flags={
            "options": Flags(propagate="one-shot"),
            "prune": Flags("ratio", "reduce_ratio", "multiple_of"),
        },
    ),
    Stage(api.score, lambda _, values: say(f"scores: {values['out']}")),
    Stage(api.prune, _prune, json=lambda summary: summary),
    Stage(api.save, lambda _, values: say(f"model: {values['out']}")),
    Stage(
        api.imatrix,
        lambda tokens, values: say(f"importance matrix of {tokens} tokens: {values['out']}"),
        flags={"options": Flags("batch_size", "dtype", "device")},
    ),
    Stage(api.quantize, _quantize, json=lambda report: report, flags={"options": Flags(without=("twin",))}),
    Stage(api.convert, _convert),
    Stage(api.evaluate, _evaluate, json=_evaluation_json, flags={"text": Flags(split="test")}),
    Stage(api.bench, _bench, json=lambda report: report),
)
