"""Make wild command lines at random, from a seed."""

from __future__ import annotations

import random

WORDS = ["", "x", "0", "-1", "1e400", "nan", "inf", str(2**64), "9" * 400, "\udce9"]
WORDS += ["[", "{a=", "[[1]]", "true", "../x"]


def command_line(rng: random.Random, names: list[str], flags: dict[str, list[str]]) -> list[str]:
    """Return a command with up to five of its flags and wild values."""
    name = rng.choice(names)
    words = [name]
    for _ in range(rng.randint(0, 5)):
        flag = rng.choice(flags[name])
        words += [flag, rng.choice(WORDS)] if rng.random() < 0.8 else [flag]
        if rng.random() < 0.05:
            words.append(rng.choice(["--nonsense", "-z", "--", *WORDS]))
    return words
