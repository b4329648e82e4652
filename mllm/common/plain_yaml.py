"""YAML in which ``1e-3`` is a number.

PyYAML goes by YAML 1.1, where a number with an exponent needs a point and a sign: ``1.0e-3``. What people write
(``1e-3``, ``1E5``, ``.5e-2``) would be text. YAML 1.2 reads it as numbers (its core schema, 10.3.2), and so do these.
"""

import re
from typing import Any

import yaml

FLOAT = "tag:yaml.org,2002:float"
EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+")


class Loader(yaml.SafeLoader):
    """Safe, with YAML 1.2's numbers."""


class Dumper(yaml.SafeDumper):
    """Puts text that `Loader` would take for a number in quotes."""


for each in (Loader, Dumper):
    each.add_implicit_resolver(FLOAT, re.compile(f"^(?:{EXPONENT.pattern})$"), list("-+.0123456789"))


def read(text: str) -> Any:
    """A document's value. Raises yaml.YAMLError as PyYAML does."""
    return yaml.load(text, Loader)


def write(values: dict[str, Any]) -> str:
    """A document that `read` reads as the same values, keys in their order."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False)
