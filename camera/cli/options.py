"""Command-line flags from the option models: a flag's name, type, default and help are those of the field.

A command declares a parameter whose type is an option model, and gets the model, validated:

    def score(model: Model, out: Out, options: Annotated["PruneOptions", Flags("reduce_ratio")]) -> None: ...

A parameter with the default None is None where none of its flags is given. A dataset is one flag with the parameter's
name for its fields `name` and `path`, and flags for the rest.
Models are named by strings, so that the list of commands is shown without importing pydantic.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from camera.errors import CameraError

if TYPE_CHECKING:
    from camera.options import Options

_FLAG_NAMES = {"devices": "nproc", "engines": "engine", "overrides": "override"}
"""Fields whose flags have another name."""
_EMPTY = inspect.Parameter.empty
_FIRST_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`])")


class Flags:
    """Metadata of an options parameter: which of its fields are flags, and where their defaults differ."""

    def __init__(self, *only: str, without: tuple[str, ...] = (), **defaults: Any) -> None:
        """Args:
        only: the fields that become flags; the default is all of plain types.
        without: fields that do not.
        defaults: values of fields where the command's differ from the model's.
        """
        self.only, self.without, self.defaults = only, without, defaults


def expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for each field in place of each options parameter, as typer reads it."""
    from camera import options

    hints = get_type_hints(function, localns=vars(options), include_extras=True)
    models: list[_Model] = []
    parameters: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if any(isinstance(each, type) and issubclass(each, options.Options) for each in _members(hint)):
            models.append(_Model(parameter, hint))
            made = list(models[-1].parameters())
        else:
            made = [_parameter(parameter.name, hint, parameter.default)]
        for each in made:
            if each.name in parameters:
                raise TypeError(f"camera {function.__name__} would have two flags {_flag(each.name)}")
            parameters[each.name] = each

    def command(**values: Any) -> None:
        built = {model.name: model.build(values) for model in models}
        function(**values, **built)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


class _Model:
    """An options parameter of a command: its flags, and the model that their values make."""

    def __init__(self, parameter: inspect.Parameter, hint: Any) -> None:
        self.name, self.optional = parameter.name, parameter.default is None
        marks = getattr(hint, "__metadata__", ())
        self.chosen = next((each for each in marks if isinstance(each, Flags)), Flags())
        self.kind: type[Options] = next(each for each in _members(hint) if each is not NoneType)
        self.fields = self.kind.known_fields()
        self.differing = {
            name: value for name, value in self.chosen.defaults.items() if value != self._own_default(name)
        }
        # Of a dataset, one flag called as the parameter gives `name` or `path`.
        self.is_dataset = {"name", "path"} <= set(self.fields)
        hidden = {*self.chosen.without, *(("name", "path", "split") if self.is_dataset else ())}
        self.flags = {
            field: _FLAG_NAMES.get(field, field)
            for field in self.chosen.only or self.fields
            if field not in hidden and _flag_type(self.fields[field])
        }

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One for each flag."""
        panel = (inspect.getdoc(self.kind) or "").partition("\n")[0].rstrip(".")
        if self.is_dataset:
            option = typer.Option(
                _flag(self.name),
                metavar="NAME|PATH",
                help=f"{', '.join(self._built_in())}; a .txt, .jsonl or .parquet file or folder; or a .safetensors "
                "file with `input_ids`, int64 (samples, length).",
                show_default=False,
                rich_help_panel=panel,
            )
            kind = Annotated[str | None if self.optional else str, option]  # type: ignore[valid-type]
            yield _parameter(self.name, kind, None if self.optional else _EMPTY)
        for name, flag in self.flags.items():
            kind, default = _flag_type(self.fields[name]), self._default(name)
            words = " ".join((self.fields[name].description or "").split())
            if get_origin(kind) is not Literal:  # which has a sentence for each choice
                words = _FIRST_SENTENCE.split(words)[0]
            repeats = get_origin(kind) is list
            shown: str | bool = (
                ", ".join(map(str, default)) if repeats and default else default not in (None, False)
            )
            option = typer.Option(
                *([] if default is True else [_flag(flag)]),  # and typer's own --no-... form
                help=f"{words} May be repeated." if repeats else words,
                show_default=shown,
                rich_help_panel=panel,
            )
            default = None if repeats else default
            yield _parameter(flag, Annotated[kind | None if default is None else kind, option], default)

    def build(self, values: dict[str, Any]) -> "Options | None":
        """Take the flags out of a call's values and make the model of those that were given.

        Raises:
            CameraError: naming the flag whose value is wrong.
        """
        from pydantic import ValidationError

        source = values.pop(self.name) if self.is_dataset else None
        given = {}
        for name, flag in self.flags.items():
            value = values.pop(flag)
            if isinstance(value, list):
                value = _items(flag, value, get_origin(_bare(self.fields[name].annotation)) is dict)
            if value is not None and value != self._default(name):
                given[name] = value
        if source is not None:
            given |= {"name": source} if source in self._built_in() else {"name": "file", "path": source}
        elif self.optional and not given:
            return None
        try:
            return self.kind(**{**self.differing, **given})
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
        return self.chosen.defaults.get(field, self._own_default(field))

    def _own_default(self, field: str) -> Any:
        return self.fields[field].get_default(call_default_factory=True, validated_data={})

    def _built_in(self) -> list[str]:
        kind = _flag_type(self.fields["name"])
        return [name for name in get_args(kind) if name != "file"]


def _flag_type(field: Any) -> Any:
    """What typer makes a flag of: choices, a number, text, a path, or a list of texts; None for anything else."""
    from camera.registry import NameIn

    def of(annotation: Any, metadata: tuple[Any, ...]) -> Any:
        for mark in metadata:
            if isinstance(mark, NameIn):
                return Literal[tuple(mark.registry)]
        if get_origin(annotation) is Annotated:
            return of(annotation.__origin__, annotation.__metadata__)
        if get_origin(annotation) in (Union, UnionType):
            return of(next(each for each in get_args(annotation) if each is not NoneType), ())
        if get_origin(annotation) in (tuple, dict):
            return list[str] if of(get_args(annotation)[0], ()) else None
        plain = annotation in (bool, int, float, str, Path)
        return annotation if plain or get_origin(annotation) is Literal else None

    return of(field.annotation, tuple(field.metadata))


def _bare(annotation: Any) -> Any:
    return next(each for each in _members(annotation) if each is not NoneType)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that it is."""
    while get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
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
