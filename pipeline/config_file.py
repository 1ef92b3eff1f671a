"""A config file: YAML and dotted overrides in, a checked Config or one line per mistake out.

Unknown keys are errors that name the nearest known one; every error names file and line.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.errors import UsageError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, lay `dotted.key=value` overrides over it, check it all.

    Raises UsageError with one line per mistake: file and line (or "command line"), key, what came, what was
    wanted.
    """
    path = find_config(path)
    values = raw_config(path, overrides)
    try:
        # Through JSON, for its strict mode: a list may be a tuple there, but "32" is not an integer.
        return Config.model_validate_json(json.dumps(values), strict=True)
    except TypeError as error:
        raise UsageError(f"{path}: text, numbers, lists and mappings were wanted: {error}") from None
    except ValidationError as error:
        places = _Places(path, overrides)
        found = error.errors()
        # A list with a wrong item is not also too short.
        inner = {e["loc"][:length] for e in found for length in range(len(e["loc"]))}
        # A default that follows from a wrong value is no mistake of its own.
        found = [e for e in found if e["type"] != "default_factory_not_called"]
        raise UsageError("\n".join(_explain(e, places) for e in found if e["loc"] not in inner)) from None


def raw_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The merged and interpolated values, before the schema has seen them.  Raises UsageError."""
    merged = _read_mapping(path)
    for override in overrides:
        merged = _lay_over(merged, override)
    try:
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "").replace("[", ".").replace("]", "")
        raise UsageError(f"{_Places(path, overrides)[key]}: {key}: {str(error).splitlines()[0]}") from None
    return cast(dict[str, Any], values)


def _read_mapping(path: Path) -> DictConfig:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if isinstance(root, yaml.MappingNode):
            return cast(DictConfig, OmegaConf.load(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UsageError(f"{where}: not valid YAML: {_yaml_problem(error)}") from None
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise UsageError(f"{path}: {str(error).splitlines()[0]}") from None
    came = "an empty file" if root is None else f"a {root.id}"
    raise UsageError(f"{path}: {came} came, a mapping of sections was wanted")


def _lay_over(values: DictConfig, override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or value.strip() == "???" or not all(part.isidentifier() for part in key.split(".")):
        raise UsageError(f"command line: {override!r} came, dotted.key=value was wanted")
    try:
        return cast(DictConfig, OmegaConf.merge(values, OmegaConf.from_dotlist([override])))
    except yaml.YAMLError as error:
        raise UsageError(f"command line: {override!r}: not valid YAML: {_yaml_problem(error)}") from None
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UsageError(f"command line: {override!r}: {str(error).splitlines()[0]}") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    said = [getattr(error, "context", None), getattr(error, "problem", None)]
    return " ".join((", ".join(part for part in said if part) or str(error)).split())


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name that ships with the package.  Raises UsageError."""
    path = Path(path)
    if path.is_file():
        return path
    shipped = {file.name: file for file in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
    if path.name in shipped and path.parent in (Path(), Path("configs")):
        return shipped[path.name]
    raise UsageError(f"{path}: no such config; shipped with the package: {', '.join(sorted(shipped)) or 'none'}")


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; reading it gives an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(config.model_dump(mode="json"))))


def without_secrets(text: str) -> str:
    """A config's YAML as it may be shown to others: data.remote.options, which may be keys of a store, are starred."""
    try:
        values: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        return "(not valid YAML)\n"
    try:
        remote: dict[str, Any] = values["data"]["remote"]
        options: Any = remote["options"]
    except (KeyError, TypeError):
        return text
    if not options:
        return text
    remote["options"] = dict.fromkeys(options, "***") if isinstance(options, dict) else "***"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _literal(value: Any) -> Any:
    """The value with every ${ in its texts written so that it is read as text, not as an interpolation."""
    match value:
        case str():
            return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
        case list():
            return [_literal(item) for item in cast(list[Any], value)]
        case dict():
            return {key: _literal(inner) for key, inner in cast(dict[str, Any], value).items()}
        case _:
            return value


class _Places:
    """Dotted key → where it was given: "command line", or the file and the line of it or of its section."""

    def __init__(self, path: Path, overrides: list[str] | tuple[str, ...]) -> None:
        self.path = path
        self.lines = _key_lines(path.read_text(encoding="utf-8"))
        self.overrides = {override.split("=", 1)[0] for override in overrides}

    def __getitem__(self, key: str) -> str:
        while key:
            if key in self.overrides:
                return "command line"
            if key in self.lines:
                return f"{self.path}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return f"{self.path}"

    def overridden_within(self, key: str) -> bool:
        """Whether an override gave something below this key."""
        return any(override.startswith(f"{key}.") for override in self.overrides)


def _explain(error: Any, places: _Places) -> str:
    """One line for one mistake: where, what came, what was wanted."""
    key = ".".join(str(part) for part in error["loc"])
    where = places[key]
    if places.overridden_within(key):
        where = f"{where} and command line" if error["type"] == "value_error" else "command line"
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: {key}: unknown key; {_nearest(error['loc'])}"
        case "missing":
            return f"{where}: {key}: missing"
        case "value_error":  # of keys that don't go together
            return f"{where}: {f'{key}: ' if key else ''}{error['ctx']['error']}"
        case _:
            came = repr(error["input"])
            return f"{where}: {key}: {came if len(came) <= 80 else came[:77] + '...'} came: {error['msg']}"


def _nearest(loc: tuple[str | int, ...]) -> str:
    """Name the known key most like an unknown one; those of its own section, then the outermost, come first."""
    section: type[BaseModel] = Config
    for part in loc[:-1]:
        section = cast(type[BaseModel], section.model_fields[str(part)].annotation)
    siblings = [".".join(map(str, (*loc[:-1], name))) for name in section.model_fields]
    leaves = sorted(_leaves(Config), key=lambda name: name.count("."))

    def likeness(known: str) -> float:
        ratio = difflib.SequenceMatcher(None, known.rpartition(".")[2], str(loc[-1])).ratio()
        return ratio + 0.2 * (known in siblings)

    best = max((*siblings, *leaves), key=likeness)
    return f"nearest known key: {best}" if likeness(best) >= 0.6 else f"known here: {', '.join(section.model_fields)}"


def _leaves(section: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _leaves(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key → line number in a YAML text (first line is 1)."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[prefix + str(key.value)] = key.start_mark.line + 1
                walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return lines
