"""From a function of `camera.api` to a command: its arguments, its flags, its help.

A parameter without a default is an argument, another one a flag, helped by its line in the docstring. Of an option model
every field is a flag: the field's name, type, default and docstring are the flag's, and the function gets the model,
validated; or None, where that is the default and none of the flags is given. A dataset is one flag with the parameter's
name for its fields `name` and `path`, and flags for the rest.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from camera.cli.output import print_json
from camera.errors import CameraError

if TYPE_CHECKING:
    from camera.cli.stages import Stage
    from camera.options import Options

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
_PRESET = typer.Option(
    "--preset",
    help="Settings that belong together, for what no flag gives: those of the Ascend version of CAMERA.",
)
_FLAG_NAMES = {"devices": "nproc", "engines": "engine", "overrides": "override"}
"""Fields whose flags have another name."""
_EMPTY = inspect.Parameter.empty
_FIRST_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`])")


class Flags:
    """Which fields of an options parameter are flags, and where their defaults differ from the model's."""

    def __init__(self, *only: str, without: tuple[str, ...] = (), **defaults: Any) -> None:
        """Args:
        only: the fields that become flags; the default is all of plain types.
        without: fields that do not.
        defaults: values of fields where the command's differ from the model's.
        """
        self.only, self.without, self.defaults = only, without, defaults


def stage_command(stage: "Stage") -> Callable[..., None]:
    """A function with a parameter for each argument and flag, as typer reads it."""
    from camera import options, presets

    signature = inspect.signature(stage.run).parameters
    written = SimpleNamespace(__annotations__={each.name: each.annotation for each in signature.values()})
    hints = get_type_hints(written, stage.run.__globals__, vars(options))
    models: list[_Model] = []
    parameters: dict[str, inspect.Parameter] = {}
    for name, help in _argument_help(stage.run).items():
        if name == "progress":
            continue
        if any(
            isinstance(each, type) and issubclass(each, options.Options) for each in _members(hints[name])
        ):
            models.append(_Model(signature[name], hints[name], stage.flags.get(name, Flags())))
            made = list(models[-1].parameters())
        else:
            made = [_plain_parameter(signature[name], hints[name], help)]
        for each in made:
            if each.name in parameters:
                raise TypeError(f"camera {stage.run.__name__} would have two flags {_flag(each.name)}")
            parameters[each.name] = each
    if any(presets.sets(model.kind) for model in models):
        parameters["preset"] = _parameter("preset", Annotated[presets.PresetName | None, _PRESET], None)
        parameters["context"] = _parameter("context", typer.Context, _EMPTY)
    if stage.json:
        parameters["as_json"] = _parameter("as_json", Json, False)

    def command(**values: Any) -> None:
        as_json, preset, context = (values.pop(name, None) for name in ("as_json", "preset", "context"))
        for model in models:
            below = _Below(presets.fields_of(preset, model.kind), context)
            values[model.name] = model.build(values, below)
        with stage.progress(stage.name) as progress:
            result = stage.run(**values, progress=progress)
        if as_json and stage.json:
            print_json(stage.json(result))
        else:
            stage.show(result, values)
        if code := stage.code(result):
            raise typer.Exit(code)

    command.__name__, command.__doc__ = stage.run.__name__, command_help(stage.run)
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def command_help(function: Callable[..., Any]) -> str:
    """What the docstring says before its sections."""
    return re.split(r"\n(?:Args|Returns|Raises):\n", inspect.getdoc(function) or "")[0].strip()


def _argument_help(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring says of each parameter."""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n    (?=\w+: )", "\n" + section)[1:]
    return {name: " ".join(text.split()) for name, _, text in (entry.partition(": ") for entry in entries)}


def _plain_parameter(parameter: inspect.Parameter, hint: Any, help: str) -> inspect.Parameter:
    kind = _flag_type(hint)
    words = help[:1].upper() + help[1:]
    if parameter.default is _EMPTY:
        kind = list[Path] if get_origin(kind) is list else kind
        return _parameter(
            parameter.name, Annotated[kind, typer.Argument(help=words, show_default=False)], _EMPTY
        )
    option = typer.Option(_flag(parameter.name), help=words, show_default=parameter.default is not None)
    optional = kind | None if parameter.default is None else kind
    return _parameter(parameter.name, Annotated[optional, option], parameter.default)


@dataclass(frozen=True)
class _Below:
    """What a preset gives where no flag does."""

    fields: Mapping[str, Any]
    context: typer.Context | None

    def hides(self, field: str, flag: str) -> bool:
        """Whether the command line has a flag with its usual value, where the preset has another one."""
        if field not in self.fields or self.context is None:
            return False
        source = self.context.get_parameter_source(flag)
        return source is not None and source.name != "DEFAULT"


class _Model:
    """An options parameter of a command: its flags, and the model that their values make."""

    def __init__(self, parameter: inspect.Parameter, hint: Any, chosen: Flags) -> None:
        self.name, self.optional, self.chosen = parameter.name, parameter.default is None, chosen
        self.kind: type[Options] = next(each for each in _members(hint) if each is not NoneType)
        self.fields = self.kind.known_fields()
        self.is_dataset = {"name", "path"} <= set(self.fields)
        hidden = {*chosen.without, *(("name", "path", "split") if self.is_dataset else ())}
        self.flags = {
            field: _FLAG_NAMES.get(field, field)
            for field in chosen.only or self.fields
            if field not in hidden and self._type(field)
        }

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One for each flag."""
        panel = (inspect.getdoc(self.kind) or "").partition("\n")[0].rstrip(".")
        if self.is_dataset:
            option = typer.Option(
                _flag(self.name),
                metavar="NAME|PATH",
                help=f"{', '.join(self._built_in())}, of the hub's also NAME:PATH of a local copy; a .txt, .jsonl or .parquet file or folder; or a .safetensors "
                "file with `input_ids`, int64 (samples, length).",
                show_default=False,
                rich_help_panel=panel,
            )
            kind = Annotated[str | None if self.optional else str, option]  # type: ignore[valid-type]
            yield _parameter(self.name, kind, None if self.optional else _EMPTY)
        for name, flag in self.flags.items():
            kind, default = self._type(name), self._default(name)
            words = " ".join((self.fields[name].description or "").split())
            if get_origin(kind) is not Literal:  # which has a sentence for each choice
                words = _FIRST_SENTENCE.split(words)[0]
            repeats = get_origin(kind) is list
            shown: str | bool = (
                ", ".join(map(str, default))
                if repeats and default
                else not (default is None or default is False)
            )
            option = typer.Option(
                *(
                    [] if default is True or (kind is bool and default is None) else [_flag(flag)]
                ),  # and typer's --no-...
                help=f"{words} May be repeated." if repeats else words,
                show_default=shown,
                rich_help_panel=panel,
            )
            default = None if repeats else default
            yield _parameter(flag, Annotated[kind | None if default is None else kind, option], default)

    def build(self, values: dict[str, Any], below: "_Below") -> "Options | None":
        """Take the flags out of a call's values and make the model of those that were given, and of a preset's fields.

        Raises:
            CameraError: naming the flag whose value is wrong.
        """
        from pydantic import ValidationError

        source = values.pop(self.name) if self.is_dataset else None
        given = {}
        for name, flag in self.flags.items():
            value = values.pop(flag)
            if isinstance(value, list):
                value = _items(flag, value, pairs=isinstance(self._default(name), Mapping))
            usual = value in (self._default(name), str(self._default(name)))
            if value is not None and (not usual or below.hides(name, flag)):
                given[name] = value
        if source is not None:
            name, _, path = source.partition(":")
            if name not in self._built_in():
                name, path = "file", source
            given |= {"name": name} | ({"path": path} if path else {})
        elif self.optional and not given and not below.fields:
            return None
        try:
            return self.kind(**{**self.chosen.defaults, **below.fields, **given})
        except ValidationError as error:
            raise CameraError("; ".join(map(self._message, error.errors()))) from None

    def _message(self, error: Any) -> str:
        text = str(error["msg"]).removeprefix("Value error, ")
        if not error["loc"]:
            return text
        field, *rest = map(str, error["loc"])
        own = self.name if self.is_dataset and field in ("name", "path") else self.flags.get(field, field)
        return f"{_flag('.'.join([own, *rest]))}: {text}"

    def _default(self, field: str) -> Any:
        own = self.fields[field].get_default(call_default_factory=True, validated_data={})
        return self.chosen.defaults.get(field, own)

    def _type(self, field: str) -> Any:
        return _flag_type(self.fields[field].annotation, tuple(self.fields[field].metadata))

    def _built_in(self) -> list[str]:
        return [name for name in get_args(self._type("name")) if name != "file"]


def _flag_type(annotation: Any, metadata: tuple[Any, ...] = ()) -> Any:
    """What typer makes a flag of: choices, a number, text, a path, or a list of texts; None for anything else."""
    from camera.registry import NameIn

    for mark in metadata:
        if isinstance(mark, NameIn):
            return Literal[tuple(mark.registry)]
    if get_origin(annotation) is Annotated:
        return _flag_type(annotation.__origin__, annotation.__metadata__)
    if get_origin(annotation) in (Union, UnionType):
        members = [each for each in get_args(annotation) if each is not NoneType]
        if len(members) > 1 and any(get_origin(each) is Literal for each in members):
            return str  # a number or a word
        return Path if Path in members else _flag_type(members[0])
    origin = get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Sequence | Mapping):
        return list[str] if _flag_type(get_args(annotation)[0]) else None
    plain = annotation in (bool, int, float, str, Path)
    return annotation if plain or get_origin(annotation) is Literal else None


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _items(flag: str, texts: list[str], pairs: bool) -> Any:
    """The values of a flag that may be repeated: `a,b`, or `KEY=VALUE` each."""
    if not pairs:
        return tuple(filter(None, (part.strip() for text in texts for part in text.split(","))))
    split = [text.rpartition("=") for text in texts]
    for text, (_, found, _) in zip(texts, split, strict=True):
        if not found:
            raise CameraError(
                f"{_flag(flag)} {text}: write PATTERN=VALUE, for example '*.down_proj.weight=q8_0'"
            )
    return {key: value for key, _, value in split}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
