"""The arithmetic of programs smaller than a model, against the programs that XLA compiled for 4 fake devices."""

import jax
import pytest

from llmctl.pipeline import recipe
from llmctl.plan import compile as compiling
from llmctl.plan import modelled, planner, topologies
from llmctl.plan.hlo import counts

RECIPE = """
[data]
source = "csv"
path = "there/is/no/such.csv"

[mesh]
data = 1
fsdp = 2
tensor = 2

[[stage]]
kind = "pretrain"
tokenizer = { kind = "bpe", vocab_size = 1024 }
model = { d_model = 128, head_dim = 32, layers = 2, heads = 4, kv_heads = 4, d_ff = 384, tied = false }
train = { steps = 10, batch_size = 8, seq_len = 128 }

[[stage]]
kind = "prune"
method = "METHOD"
MORE
examples = 16
batch_size = 8

[[stage]]
kind = "quantize"
QUANTIZE
"""
H100 = topologies.find("h100:4")
GPTQ = 'method = "gptq"\nformat = "int4"\nexamples = 16\nbatch_size = 8'
METHODS = {
    "gptq": GPTQ,
    "awq": GPTQ.replace("gptq", "awq") + '\ngroup = 64\nrules = { up = "int8" }',
    "wanda": 'allocation = "owl"',
    "sparsegpt": 'repair = true\nallocation = "sensitivity"',
    "magnitude": 'pattern = "4x1"\nallocation = "global"',
    "structured": 'layers = 0.5\nheads = 0.5\nffn = 0.5\nhidden = 0.25\nimportance = "activation"\nrepair = true',
}

GENERATES = {"wanda": "4x64x64", "sparsegpt": "4x64x64", "magnitude": "4x64x60"}
"""Generation that is planned after a method; the second has a quantized cache, and the third a draft."""


@pytest.fixture(scope="module", params=METHODS)
def programs(request, tmp_path_factory):
    """By title: (model, compiled, counts of the compiled)."""
    method, more = request.param, METHODS[request.param]
    file = tmp_path_factory.mktemp("turns") / "turns.toml"
    prune, quantize = ("magnitude", more) if "examples" in more else (method, "")
    text = RECIPE.replace("METHOD", prune).replace("QUANTIZE", quantize)
    file.write_text(text.replace("MORE", "" if quantize else more))
    chosen = ["prune", "quantize"] if method == "wanda" else ["quantize"] if quantize else ["prune"]
    generate, cache = (GENERATES[method], "int8" if method == "sparsegpt" else "") if method in GENERATES else ("", "")
    how = {"kv_cache": cache, "draft": "pretrain" if method == "magnitude" else "", "draft_tokens": 3}
    built = planner.programs_of(recipe.read(file, None, []), jax.devices()[:4], chosen, generate, **how)
    found = {}
    for _, program in built:
        done = compiling.compiled(program)
        axes = {axis: int(n) for axis, n in program.mesh.shape.items()}
        found[program.title] = (modelled.step(program, H100), done, counts.count(done.text, axes))
    return found


def test_operations_are_those_of_the_compiled_program(programs):
    for title, ((_, guessed), _, counted) in programs.items():
        if "prefill" not in title:  # plain attention multiplies the padding of the cache as well
            # second moments of heads are of the whole width where XLA splits it
            assert guessed.flops == pytest.approx(counted.flops, rel=0.03), title


def test_memory_is_near_that_of_the_compiled_program(programs):
    """Of all that a program needs at its fullest: what it takes, and what comes and goes."""
    for title, ((between, _), done, _) in programs.items():
        whole = done.arguments + done.outputs + done.temporaries
        assert done.arguments + between == pytest.approx(whole, rel=0.25), title


def test_traffic_is_below_what_the_cpu_compiler_makes_of_it(programs):
    """Which fuses less; and not far below."""
    for title, ((_, guessed), _, counted) in programs.items():
        assert 0.25 <= guessed.bytes / counted.bytes < 1.4, title


def test_only_a_matrix_that_competes_as_a_whole_is_gathered(programs):
    kinds = {title: {c.kind for c in guessed.collectives} for title, ((_, guessed), _, _) in programs.items()}
    for title, (_, _, counted) in programs.items():
        if title.startswith(("zeros", "rounding")):
            gathered = "all-gather" in {c.kind for c in counted.collectives}
            assert ("all-gather" in kinds[title]) == gathered, title
