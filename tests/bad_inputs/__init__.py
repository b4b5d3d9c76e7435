"""Bad inputs for every command and every parser, written by hand; each must be refused with exit code 2 and one line.

`cases()` lists them, `runner.run` runs one in a child process under limits. `python -m bad_inputs [WORD…]` in `tests`
runs those whose name contains one of the words, or all.
"""

from bad_inputs import data, finetuning, models, requests, texts
from bad_inputs.case import Case

KINDS = (
    *(requests.recipes, requests.sets, requests.flags, requests.places),
    *(models.manifests, models.descriptions, models.tensors, models.gguf, models.adapters, models.stored_adapters),
    *(texts.tokenizers, texts.templates, texts.talk),
    finetuning.rows,
    *(data.tables, data.archives, data.prepared, data.predictions, data.links),
)


def cases() -> list[Case]:
    """Return every case; names are distinct."""
    made = [case for kind in KINDS for case in kind()]
    names = [case.name for case in made]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return made
