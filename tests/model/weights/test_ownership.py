"""Weights are asked, not recognized: facts about nodes and names stand in `llmctl/model/weights` alone."""

import ast
import re
from pathlib import Path

import pytest

import llmctl

PACKAGE = Path(llmctl.__file__).parent
OTHERS = [p for p in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "model" / "weights" not in p.parents]
NODES = {"Node", "Plain", "Quantized", "LowRank", "Adapter", "QArray"}


def calls(path: Path) -> list[ast.Call]:
    return [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_else_tests_a_nodes_class_or_the_end_of_a_path(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        if name == "isinstance":
            assert not NODES & set(re.findall(r"\w+", ast.unparse(call.args[1]))), ast.unparse(call)
        if name.endswith((".endswith", ".removesuffix")) and call.args:
            assert "kernel" not in ast.unparse(call.args[0]), ast.unparse(call)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r'"/?blocks/" in|"/blocks/"\)', text)


def test_plain_arrays_alone_reach_the_products_of_sharded_matrices_and_tables():
    users = {
        p.relative_to(PACKAGE).as_posix()
        for p in PACKAGE.rglob("*.py")
        if re.search(
            r"(fsdp_matmul|quantized_matmul)\.matmul\(|embedding_lookup\.take\(", p.read_text(encoding="utf-8")
        )
    }
    assert users == {"model/weights/tree.py"}
