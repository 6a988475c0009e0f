"""Reads the benchmark's YAML, and replaces single values in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file cannot be read, is no mapping, or has a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses duplicate keys, of which PyYAML silently takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ValueError(f"{path}, line {line}: {key!r} is there twice. Leave one out.")
                seen.add(key)
            return dict(super().construct_mapping(node, deep))

    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}). Give the path of a YAML file.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{str(path)!r} must hold a mapping of settings.")
    return fields


def override(fields: dict[str, Any], setting: str) -> None:
    """Replace one value of `fields`. setting: "key.key=value", the value in YAML. Raises ValueError if the path to the
    last key does not exist."""
    import yaml

    name, equals, value = setting.partition("=")
    *above, key = name.split(".")
    for step in above:
        if not isinstance(fields.get(step), dict):
            raise ValueError(f"--set {setting}: there is no {step!r} to set it in. Write KEY.KEY=VALUE.")
        fields = fields[step]
    if not equals:
        raise ValueError(f"--set {setting}: write KEY=VALUE.")
    fields[key] = yaml.safe_load(value)
