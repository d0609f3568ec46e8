"""The YAML of configurations: YAML 1.2's numbers, dates as text, no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are YAML 1.2's (3e-4 is one, 0400 is 400, 1:04 is text), with `_`
    between digits, and whose dates are text; duplicates refused."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        prefixed = text[:2] in ("0o", "0x")
        return int(text[2:], 8 if text[1] == "o" else 16) if prefixed else int(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, which keys here override
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} appears twice (line {line})")
            seen.append(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes the text that `Loader` would take for something else."""


_DATE = "tag:yaml.org,2002:timestamp"
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?\d[\d_]*|0o[0-7][0-7_]*|0x[\da-fA-F][\da-fA-F_]*",
    "tag:yaml.org,2002:float": (
        r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
Loader.yaml_implicit_resolvers, Dumper.yaml_implicit_resolvers = {}, {}
for _first, _known in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _kept = [(tag, pattern) for tag, pattern in _known if tag not in _NUMBERS]
    Dumper.yaml_implicit_resolvers[_first] = _kept
    Loader.yaml_implicit_resolvers[_first] = [one for one in _kept if one[0] != _DATE]
for _tag, _text in _NUMBERS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^({_text})$", re.ASCII), [*"-+.0123456789"])
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
