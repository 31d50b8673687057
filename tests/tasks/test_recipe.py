"""A recipe is checked as a whole before anything runs, and says which field is wrong."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from camera.errors import CameraError
from camera.options import Options
from tasks.recipe import REPLACED, Recipe, check_recipe, load_recipe
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
LEAST = {"name": "x", "model": "models/x"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def loaded(path: Path, text: str, *overrides: str) -> Recipe:
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def refused(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(CameraError) as caught:
        loaded(path, text, *overrides)
    return str(caught.value)


def wrong(path: Path, **sections: Any) -> str:
    return refused(path, yaml.safe_dump({**LEAST, **sections}))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_project_is_valid(recipe: Path) -> None:
    assert load_recipe(recipe).name


def test_there_are_recipes() -> None:
    assert "demo.yaml" in [path.name for path in RECIPES]


def test_name_and_model_are_enough(path: Path) -> None:
    recipe = loaded(path, "name: x\nmodel: models/x\n")
    assert (recipe.name, recipe.model) == ("x", "models/x")
    assert (recipe.prune.ratio, recipe.prune.reduce_ratio, recipe.prune.multiple_of) == (0.2, 0.95, 64)
    assert (recipe.baseline, recipe.quantize.type) == ("q4_0", "q4_0_64")


def test_a_recipe_reads_back_as_it_is_written(path: Path) -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / "demo.yaml")
    assert loaded(path, yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe


def test_every_field_is_described() -> None:
    missing = [name for name, description in described(Recipe) if not description]
    assert missing == []


def described(section: type[Options], prefix: str = "") -> list[tuple[str, str | None]]:
    """Every option of a section by dotted name, with its description; items of a tuple of sections as `[]`."""
    options: list[tuple[str, str | None]] = []
    for name, field in section.known_fields().items():
        dotted, inner = f"{prefix}{name}", field.annotation
        options.append((dotted, field.description))
        item = next(iter(get_args(inner)), None)
        if isinstance(inner, type) and issubclass(inner, Options):
            options += described(inner, f"{dotted}.")
        elif isinstance(item, type) and issubclass(item, Options):
            options += described(item, f"{dotted}[].")
    return options


OPTIONS = {
    "baseline",
    "benchmark",
    "benchmark.decode",
    "benchmark.device",
    "benchmark.engines",
    "benchmark.llama_cpp",
    "benchmark.llama_cpp_stock",
    "benchmark.prompt",
    "benchmark.repeats",
    "benchmark.threads",
    "benchmark.timeout",
    "benchmark_host",
    "benchmark_host[].deployment",
    "benchmark_host[].device_name",
    "benchmark_host[].finish_within",
    "benchmark_host[].start_within",
    "calibration",
    "calibration.field",
    "calibration.length",
    "calibration.name",
    "calibration.path",
    "calibration.revision",
    "calibration.samples",
    "calibration.seed",
    "calibration.split",
    "capture",
    "capture.batch_size",
    "capture.device",
    "capture.devices",
    "capture.dtype",
    "capture.propagate",
    "evaluate",
    "evaluate.batch_size",
    "evaluate.datasets",
    "evaluate.datasets[].field",
    "evaluate.datasets[].name",
    "evaluate.datasets[].path",
    "evaluate.datasets[].revision",
    "evaluate.datasets[].split",
    "evaluate.device",
    "evaluate.dtype",
    "evaluate.few_shot",
    "evaluate.layer_by_layer",
    "evaluate.limit",
    "evaluate.max_windows",
    "evaluate.samples",
    "evaluate.task_dtype",
    "evaluate.task_folder",
    "evaluate.tasks",
    "evaluate.window",
    "model",
    "name",
    "preset",
    "prune",
    "prune.damping",
    "prune.experts",
    "prune.method",
    "prune.mode",
    "prune.multiple_of",
    "prune.ratio",
    "prune.reduce_ratio",
    "prune.round",
    "prune.scope",
    "prune.sparsity",
    "prune.target",
    "publish",
    "publish.alias",
    "publish.dvc",
    "publish.enabled",
    "publish.folder",
    "publish.remote",
    "publish.require",
    "publish.require[].perplexity_increase",
    "publish.require[].task_drop",
    "publish.require_signature",
    "quantize",
    "quantize.batch_size",
    "quantize.damping",
    "quantize.device",
    "quantize.dtype",
    "quantize.embedding_type",
    "quantize.method",
    "quantize.output_type",
    "quantize.overrides",
    "quantize.target_bpw",
    "quantize.twin",
    "quantize.type",
    "revision",
    "schema_version",
    "sweep",
    "sweep[].deployment",
    "sweep[].grid",
    "sweep[].methods",
    "sweep[].publish",
    "sweep[].ratios",
    "sweep[].reduce_ratios",
    "sweep[].types",
    "sweep[].workers",
    "tracking",
    "tracking.enabled",
    "tracking.experiment",
    "tracking.parent",
}
"""What people's recipes may say. Whoever removes or renames one raises schema_version and says so in the changelog."""


def test_no_option_disappears_or_appears_by_accident() -> None:
    assert {name for name, _ in described(Recipe)} == OPTIONS


def test_a_preset_gives_what_the_recipe_does_not() -> None:
    recipe = check_recipe(
        {**LEAST, "preset": "ascend-reference", "calibration": {"seed": 7}, "evaluate": {"tasks": ["boolq"]}},
        "here",
    )
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.calibration.seed) == (16, 1024, 7)
    assert recipe.evaluate.tasks == ("boolq",)
    assert recipe.evaluate.on_tasks["dtype"] == "float16"
    assert (recipe.evaluate.dtype, recipe.evaluate.window) == ("auto", 2048)


def test_a_presets_tasks_can_be_left_out() -> None:
    recipe = check_recipe({**LEAST, "preset": "ascend-reference", "evaluate": {"tasks": []}}, "here")
    assert (recipe.evaluate.tasks, recipe.evaluate.window) == ((), 2048)


def test_a_recipe_with_a_preset_is_the_recipe_with_its_fields_written_out() -> None:
    recipe = check_recipe({**LEAST, "preset": "ascend-reference"}, "here")
    plain = recipe.model_dump(mode="json", exclude={"preset"})
    assert check_recipe(plain, "here") == recipe.model_copy(update={"preset": None})
    assert check_recipe(recipe.model_dump(mode="json"), "here") == recipe


def test_a_preset_that_there_is_not_is_refused_by_name(path: Path) -> None:
    assert "preset: Input should be 'ascend-reference' (got 'mine')" in wrong(path, preset="mine")


def test_a_field_that_was_replaced_says_what_to_write_instead(path: Path) -> None:
    message = wrong(path, benchmark={"deployment": "benchmark/x"})
    assert "benchmark.deployment: has moved: write `benchmark_host.deployment`" in message


def test_every_field_that_was_replaced_names_what_replaced_it(path: Path) -> None:
    assert not REPLACED.keys() & OPTIONS
    for field, instead in REPLACED.items():
        section, _, name = field.partition(".")
        assert f"  {field}: {instead}" in wrong(path, **{section: {name: 1}}).splitlines()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"benchmark": {"device": "npu"}, "benchmark_host": {"deployment": "benchmark/x"}}, "device_name"),
        (
            {"benchmark_host": {"deployment": "benchmark/x", "device_name": "Ascend910B1"}},
            "needs benchmark.device",
        ),
        ({"benchmark_host": {"device_name": "Ascend910B1"}}, "benchmark_host.deployment"),
    ],
)
def test_a_benchmark_elsewhere_says_on_what(path: Path, given: dict[str, Any], reason: str) -> None:
    assert reason in wrong(path, **given)


@pytest.mark.parametrize(
    ("sections", "field", "known"),
    [
        ({"prun": {}}, "prun", "calibration, capture, prune"),
        ({"prune": {"rato": 0.2}}, "prune.rato", "ratio, reduce_ratio, mode, multiple_of"),
        ({"calibration": {"seeds": 1}}, "calibration.seeds", "samples, length, seed"),
        (
            {"evaluate": {"datasets": [{}, {"splits": "test"}]}},
            "evaluate.datasets.1.splits",
            "name, path, split",
        ),
    ],
)
def test_an_unknown_field_is_named_with_the_fields_there_are(
    path: Path, sections: dict[str, Any], field: str, known: str
) -> None:
    message = wrong(path, **sections)
    assert f"  {field}: no such field; known here: " in message
    assert known in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"prune": {"ratio": 1.2}}, ["prune.ratio: 1.2 is not below 1"]),
        ({"prune": {"ratio": 1}}, ["prune.ratio: 1.0 is not below 1"]),
        ({"prune": {"ratio": -0.1}}, ["prune.ratio: -0.1 is below 0"]),
        ({"prune": {"ratio": float("nan")}}, ["prune.ratio: "]),
        ({"prune": {"ratio": float("inf")}}, ["prune.ratio: inf is not below 1"]),
        ({"prune": {"reduce_ratio": 1.01}}, ["prune.reduce_ratio: ", "less than or equal to 1"]),
        ({"prune": {"multiple_of": 0}}, ["prune.multiple_of: ", "greater than 0"]),
        ({"prune": {"mode": "soft"}}, ["prune.mode: ", "'physical' or 'mask'", "soft"]),
        ({"prune": {"ratio": "much"}}, ["prune.ratio: ", "number", "much"]),
        ({"prune": [0.2]}, ["prune: "]),
        ({"prune": None}, ["prune: "]),
        ({"prune": {"ratio": {"a": 1}}}, ["prune.ratio: "]),
        ({"calibration": {"samples": 1.5}}, ["calibration.samples: ", "integer"]),
        ({"calibration": {"samples": 0}}, ["calibration.samples: "]),
        ({"calibration": {"name": "file"}}, ["calibration: name `file` needs a path"]),
        (
            {"calibration": {"path": "x.txt"}},
            ["calibration: name `stdlib` takes no path: a text of your own is name `file`"],
        ),
        ({"calibration": {"name": "pile"}}, ["calibration.name: ", "wikitext2", "pile"]),
        ({"evaluate": {"datasets": [{"name": "file"}]}}, ["evaluate.datasets.0: name `file` needs a path"]),
        ({"evaluate": {"datasets": "stdlib"}}, ["evaluate.datasets: "]),
        ({"evaluate": {"datasets": []}}, ["evaluate.datasets: is empty"]),
        ({"benchmark": {"engines": []}}, ["benchmark.engines: is empty"]),
        ({"benchmark": {"decode": []}}, ["benchmark.decode: is empty"]),
        ({"benchmark": {"decode": [256, -1]}}, ["benchmark.decode.1: "]),
        ({"benchmark": {"engines": ["vllm"]}}, ["benchmark.engines.0: ", "vllm"]),
        ({"quantize": {"type": "q4_0", "twin": "q4_0"}}, ["quantize: a twin is of type q4_0_64"]),
        ({"quantize": {"type": "q4_k_m"}}, ["quantize.type: ", "q4_k_m"]),
        ({"quantize": {"overrides": {"*": "q2"}}}, ["quantize.overrides.*: ", "q2"]),
        ({"schema_version": 2}, ["schema_version: "]),
        ({"model": "  "}, ["model: is empty"]),
        ({"model": 7}, ["model: ", "string"]),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_field(
    path: Path, sections: dict[str, Any], words: list[str]
) -> None:
    message = wrong(path, **sections)
    assert message.count("\n") == 1  # the file, and one line for the one field
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "-x", "a/b", "a\\b", "a b", "x\n", "é", "x" * 101, "../x", "a\0"]
)
def test_a_name_is_a_plain_file_name(name: str) -> None:
    with pytest.raises(CameraError, match="name: "):
        check_recipe({**LEAST, "name": name}, "test")


def test_all_wrong_fields_are_said_at_once(path: Path) -> None:
    message = refused(path, "name: a/b\nprune: {ratio: -1, mode: x}\n")
    assert "4 field(s) are wrong" in message
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "name",
        "model",
        "prune.ratio",
        "prune.mode",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not hold a mapping"),
        ("# nothing\n", "does not hold a mapping"),
        ("- a\n- b\n", "does not hold a mapping"),
        ("just words", "does not hold a mapping"),
        ("a: [", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("name: 2024-99-99", "is not valid YAML"),
        ("name: !!int x", "is not valid YAML"),
        ("name: !!timestamp x", "is not valid YAML"),
        ("name: " + "1" * 5000, "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("a: \x07", "is not valid YAML"),
    ],
)
def test_what_is_no_mapping_or_no_yaml_is_refused(path: Path, text: str, words: str) -> None:
    message = refused(path, text)
    assert words in message
    assert str(path) in message


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"gone\.yaml does not exist; see recipes/"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(CameraError, match="does not exist"):
        load_recipe(tmp_path)
    with pytest.raises(CameraError, match="cannot be read"):
        load_recipe(tmp_path / ("x" * 300))


def test_bytes_that_are_no_utf8_are_refused(path: Path) -> None:
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(CameraError, match="is not valid YAML"):
        load_recipe(path)


YAML = "name: x\nmodel: models/x\nprune: {ratio: 0.2, mode: mask}\n"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("prune.ratio=0.3", ["prune", "ratio"], 0.3),
        ("name=y", ["name"], "y"),
        ("capture.dtype=float32", ["capture", "dtype"], "float32"),
        ("benchmark.decode=[8, 16]", ["benchmark", "decode"], (8, 16)),
        ("evaluate.max_windows=null", ["evaluate", "max_windows"], None),
        ("evaluate.max_windows=", ["evaluate", "max_windows"], None),
        ("tracking.enabled=false", ["tracking", "enabled"], False),
        (
            "quantize.overrides={'*.down_proj.weight': q8_0}",
            ["quantize", "overrides"],
            {"*.down_proj.weight": "q8_0"},
        ),
        ("publish.alias=a=b", ["publish", "alias"], "a=b"),
    ],
)
def test_an_override_replaces_one_field(path: Path, override: str, field: list[str], value: object) -> None:
    recipe: Any = loaded(path, YAML, override)
    for part in field:
        recipe = getattr(recipe, part)
    assert recipe == value


def test_an_override_leaves_the_rest_of_its_section(path: Path) -> None:
    assert loaded(path, YAML, "prune.ratio=0.3").prune.mode == "mask"


def test_of_overrides_the_last_wins(path: Path) -> None:
    assert loaded(path, YAML, "prune.ratio=0.3", "prune.ratio=0.4").prune.ratio == 0.4


def test_an_override_does_not_reach_another_section_through_a_yaml_alias(path: Path) -> None:
    text = (
        "name: x\nmodel: models/x\n"
        "calibration: &text {name: file, path: a.txt}\n"
        "evaluate: {datasets: [*text]}\n"
    )
    recipe = loaded(path, text, "calibration.path=b.txt")
    assert recipe.calibration.path == Path("b.txt")
    assert recipe.evaluate.datasets[0].path == Path("a.txt")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prune.ratio", "write section.key=value"),
        ("=0.3", "write section.key=value"),
        ("", "write section.key=value"),
        ("prune.ratio=[", "not valid YAML"),
        ("prune.ratio=2024-99-99", "not valid YAML"),
        ("prune.ratio=1.2", "prune.ratio: 1.2 is not below 1"),
        ("prune.ratoi=0.3", "prune.ratoi: no such field; known here: ratio"),
        ("name.first=x", "name is not a section"),
        ("prune..ratio=1", "prune.: "),
        ("prune=0.3", "prune: "),
    ],
)
def test_a_bad_override_is_refused(path: Path, override: str, words: str) -> None:
    assert words in refused(path, YAML, override)


@pytest.mark.parametrize("section", ["prune", "calibration"])
def test_an_override_fills_a_section_that_is_written_but_empty(path: Path, section: str) -> None:
    field, value = {"prune": ("ratio", 0.3), "calibration": ("seed", 5)}[section]
    recipe = loaded(path, f"name: x\nmodel: models/x\n{section}:\n", f"{section}.{field}={value}")
    assert getattr(getattr(recipe, section), field) == value


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=8,
)
dotted = st.sampled_from(sorted(name for name in OPTIONS if "[]" not in name))


@st.composite
def near_recipes(draw: st.DrawFn) -> str:
    """A valid recipe with some fields set to anything."""
    content: dict[str, Any] = dict(LEAST)
    for name in draw(st.lists(dotted, max_size=4)):
        *sections, last = name.split(".")
        place = content
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = draw(values)
    return str(yaml.dump(content, allow_unicode=True))


TOKENS = st.sampled_from(
    [
        "name",
        "prune",
        ": ",
        "\n",
        "  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "!!int ",
        "!!timestamp ",
        "!!bool ",
        "!!set ",
        "!!binary ",
        "? ",
        "0x",
        "1_",
        ":60",
        "2024-13-01",
        ".nan",
        "<<",
        "'",
        '"',
        "|",
        "%",
        "\\",
        "~",
        "=",
    ]
)
texts = st.one_of(st.text(), near_recipes(), st.lists(TOKENS, max_size=12).map("".join))


def recipe_or_message(path: Path, *overrides: str) -> Recipe | str:
    try:
        return load_recipe(path, overrides)
    except CameraError as error:
        return str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
def test_any_text_is_a_recipe_or_a_message(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    outcome = recipe_or_message(path)
    assert isinstance(outcome, Recipe) or str(path) in outcome


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=dotted | st.text(), value=st.text() | st.lists(TOKENS, max_size=6).map("".join))
def test_any_override_is_taken_or_a_message(path: Path, key: str, value: str) -> None:
    path.write_text(YAML)
    assert recipe_or_message(path, f"{key}={value}")


def test_the_alias_production_is_not_a_recipes_to_give() -> None:
    with pytest.raises(CameraError, match=r"publish\.alias: is given by `camera promote`"):
        check_recipe({"name": "tiny", "model": "m", "publish": {"alias": "production"}}, "here")
