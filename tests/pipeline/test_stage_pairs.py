"""Run every operation after every other on three families: it keeps what it must, or a rule refuses it."""

import re
import sys
import traceback
from collections import Counter

import numpy as np
import pytest
from stage_bench import Bench
from stage_pairs import FAMILIES, OPERATIONS, refusal

from llmctl.config.errors import RequestError

REPRESENTATIVE = (
    (
        *("llama", "export and import", "pretrain", "LoRA merged", "wanda 2:4", "distill", "finetune", "structured"),
        *("depth", "int4", "LoRA apart", "export and import"),
    ),
    ("llama", "export and import", "sparsify", "int8", "export and import"),
    ("llama", "export and import", "W8A8", "magnitude", "houlsby", "prompt", "prefix", "depth"),
)
"""Chains that are done, in which every operation is the first of a pair and the second of one."""
CHAINS, LONG = 200, 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def outcome(bench, chain, operation):
    """Run an operation after a chain; return "done", the words of the rule that refused it, or what is wrong."""
    rule = refusal(operation, bench.make(chain).state)
    try:
        bench.make((*chain, operation))
    except RequestError as e:
        if rule and re.search(rule.message, str(e)) and "\n" not in str(e):
            return f"refused: {rule.of}"
        return f"wrong: refused with {str(e)!r}, expected {rule}"
    except Exception as e:  # the report names every failure, not the first alone
        at = traceback.extract_tb(e.__traceback__)[-1]
        kind = "wrong" if isinstance(e, AssertionError) else "crashed"
        return f"{kind}: {type(e).__name__} at {at.filename}:{at.lineno} {at.line}: {str(e)[:500]!r}"
    return f"wrong: done, expected {rule}" if rule else "done"


def report(found):
    """Write how often each outcome was seen; return the outcomes that should not be."""
    for what, n in Counter(f"{result:.60}" for result in found.values()).most_common():
        sys.stdout.write(f"{n:5} {what}\n")
    return {where: result for where, result in found.items() if result.startswith(("wrong", "crashed"))}


def test_each_operation_is_first_and_second_of_a_pair():
    firsts = {op for chain in REPRESENTATIVE for op in chain[1:-1]}
    seconds = {op for chain in REPRESENTATIVE for op in chain[2:]}
    assert firsts == seconds == set(OPERATIONS)


@pytest.mark.parametrize("chain", REPRESENTATIVE, ids=lambda c: c[2])
def test_chains_keep_what_they_must(bench, chain):
    for i in range(1, len(chain)):
        assert outcome(bench, chain[:i], chain[i]) == "done", chain[: i + 1]


@pytest.mark.parametrize("chain", [*REPRESENTATIVE, REPRESENTATIVE[0][:5]], ids=lambda c: c[-1])
def test_what_would_undo_earlier_work_is_refused(bench, chain):
    state = bench.make(chain).state
    refused = [op for op in OPERATIONS if refusal(op, state)]
    assert not report({op: outcome(bench, chain, op) for op in refused})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs(bench, family):
    found = {(first,): outcome(bench, (family,), first) for first in OPERATIONS}
    assert set(found.values()) == {"done"}
    for first in OPERATIONS:
        found |= {(first, second): outcome(bench, (family, first), second) for second in OPERATIONS}
    assert not report(found)


@pytest.mark.slow
def test_random_chains(bench):
    """A refused operation is left out, and the chain goes on."""
    found = {}
    for i in range(CHAINS):
        rng = np.random.default_rng(i)
        chain = (FAMILIES[i % len(FAMILIES)],)
        for operation in rng.choice(OPERATIONS, LONG):
            result = outcome(bench, chain, str(operation))
            found[i, (*chain, str(operation))] = result
            if result == "done":
                chain = (*chain, str(operation))
            elif not result.startswith("refused"):
                break
    assert not report(found)
