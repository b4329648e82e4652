"""Short names for values: equal ones have the same name, others another one."""

import hashlib
import json
from typing import Any


def digest(value: Any, digits: int = 10, *, ensure_ascii: bool = False) -> str:
    """Hexadecimal digits for a JSON value, whatever the order of its keys.

    Kept files bear these names, so the text that is hashed must stay as it is; `ensure_ascii` is for the oldest.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=ensure_ascii)
    # Half an emoji is valid JSON and has no UTF-8; a question that holds one gets a name, too.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
