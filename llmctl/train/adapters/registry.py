"""Register finetuning methods by name.

A method imports JAX only inside its functions, so that settings can read this registry without loading JAX. Another
package adds a method by an entry point:

    [project.entry-points."llmctl"]
    "method.norms" = "my_package.norms:METHOD"
"""

from __future__ import annotations

from llmctl.config.registry import Registry
from llmctl.train.adapters.method import Method

METHODS: Registry[Method] = Registry(
    "method",
    {
        "full": "llmctl.train.adapters.full:METHOD",
        "lora": "llmctl.train.adapters.lora:METHOD",
        "dora": "llmctl.train.adapters.dora:METHOD",
        "adalora": "llmctl.train.adapters.adalora:METHOD",
        "houlsby": "llmctl.train.adapters.houlsby:METHOD",
        "prompt": "llmctl.train.adapters.prompt:METHOD",
        "prefix": "llmctl.train.adapters.prefix:METHOD",
        "ia3": "llmctl.train.adapters.ia3:METHOD",
        "bitfit": "llmctl.train.adapters.bitfit:METHOD",
        "head": "llmctl.train.adapters.head:METHOD",
    },
)


def stray(method: str, given: set[str]) -> str:
    """Return an error message if a setting in `given` is read only by methods other than `method`. Otherwise, return
    "".

    >>> stray("full", {"merge", "task"}).startswith("merge: not for method 'full', say method = 'lora'")
    True
    """
    own = {name: METHODS[name].settings for name in METHODS.own}
    found = sorted(given & {field for fields in own.values() for field in fields} - {*METHODS[method].settings})
    if not found:
        return ""
    readers = " or ".join(f"{name!r}" for name, fields in own.items() if found[0] in fields)
    return f"{', '.join(found)}: not for method {method!r}, say method = {readers}"
