"""Which operation may follow which: a model of what each operation leaves, and the rules by which one is refused.

`RULES` is the only table of refusals. Tests compare it with what the stages do; `make docs` writes it into README.md.
"""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

FINETUNE = ("finetune", "sparsify", "LoRA merged", "LoRA apart", "houlsby", "prompt", "prefix")
SCORES = ("magnitude", "wanda 2:4")
PRUNE = (*SCORES, "structured", "depth")
QUANTIZE = ("int8", "int4", "W8A8")
OPERATIONS = ("pretrain", *FINETUNE, *PRUNE, "distill", *QUANTIZE, "export and import")
ADAPTER, PROMPT, PREFIX = 8, 3, 2
FAMILIES = ("llama", "bert", "t5")

SIZES = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 4, "d_ff": 16, "max_seq_len": 32}
MORE = {"llama": {"kv_heads": 2}, "bert": {}, "t5": {"encoder_layers": 2}}


@dataclass(frozen=True)
class State:
    """What of an artifact decides what may follow."""

    family: str = "llama"
    head: str = "lm"
    architecture: str = "decoder"
    layers: int = SIZES["layers"]
    heads: int = SIZES["heads"]
    kv_heads: int = SIZES["kv_heads"]
    d_ff: int = SIZES["d_ff"]
    integers: str = ""
    """Type of the integers, with `/` if they have one scale per group, and `*` if activations are quantized too."""
    pairs: bool = False
    base_head: str = ""
    """Head of the artifact that unmerged low-rank pairs were attached to."""
    imported: bool = False
    """Whether the tokenizer is one that was written by export and read by import."""
    adapter: int = 0
    """Width of the bottleneck adapters."""
    adapter_integers: bool = False
    """Whether the bottleneck adapters are quantized, because they were there before quantization."""
    prompt: int = 0
    """Length of the trained prompt."""
    prefix: int = 0
    """Number of trained keys and values before every text."""
    pruned: bool = False
    sparsity: float = 0.0
    """Share of zeros in the layers' matrices."""


def start(family: str) -> State:
    """Return the state of a family's pretrained model."""
    architecture = {"llama": "decoder", "bert": "encoder", "t5": "encoder_decoder"}[family]
    return State(family, architecture=architecture, kv_heads=({**SIZES, **MORE[family]})["kv_heads"])


def task(operation: str, s: State) -> str:
    """Return the task that an operation of `FINETUNE` is run for."""
    return "lm" if operation not in ("finetune", "prompt") and s.head == "lm" and s.family != "bert" else "classify"


def after(operation: str, s: State) -> State:
    """Return the state of what the operation leaves. The sparsity is that of the method, where it decides it."""
    if operation in FINETUNE:
        new = replace(s, head=task(operation, s))
        new = replace(new, pruned=True, sparsity=max(s.sparsity, 0.5)) if operation == "sparsify" else new
        if new.head == "classify" and s.architecture == "encoder_decoder":
            new = replace(new, architecture="encoder", prefix=0)  # the prefix is one of the decoder
        new = replace(new, adapter=ADAPTER) if operation == "houlsby" else new
        new = replace(new, prompt=PROMPT) if operation == "prompt" else new
        new = replace(new, prefix=PREFIX) if operation == "prefix" else new
        return replace(new, pairs=True, base_head=s.head) if operation == "LoRA apart" else new
    if operation == "export and import":  # pairs travel as an adapter; everything else as dense weights
        return s if s.pairs else replace(s, integers="", imported=True)
    if operation in (*PRUNE, *QUANTIZE):
        s = replace(s, pairs=False, base_head="")  # they merge the pairs
    if operation in SCORES:
        return replace(s, pruned=True, sparsity=max(s.sparsity, 0.5))
    if operation == "structured":
        return replace(s, heads=s.heads // 2, kv_heads=s.kv_heads // 2, d_ff=s.d_ff // 2)
    if operation == "depth":
        return replace(s, layers=1)
    if operation in QUANTIZE:
        integers = {"int8": "int8", "int4": "int4/", "W8A8": "int8*"}[operation]
        return replace(s, integers=integers, adapter_integers=s.adapter > 0)
    return s


@dataclass(frozen=True)
class Rule:
    """One reason why operations are refused."""

    of: str
    """The artifact, in words for people."""
    operations: Collection[str]
    when: Callable[[State], bool]
    message: str
    """Part of the error, as a regular expression."""
    because: str
    """The reason, in words for people; empty if it is a number that leaves nothing to do, and not the order."""


RULES = (
    Rule("unmerged LoRA", FINETUNE, lambda s: s.pairs, "has unmerged low-rank pairs",
         "an artifact has one set of low-rank pairs, so merge them first"),
    Rule("integers", ("finetune", "sparsify", "LoRA merged"), lambda s: bool(s.integers),
         "is quantized, and integers cannot", "integers cannot be trained, and unmerged LoRA beside them can"),
    Rule("zeros", ("LoRA merged",), lambda s: s.pruned, "which merged low-rank pairs would fill",
         "merged pairs would fill the zeros; full finetuning keeps them"),
    Rule("a task's head", ("pretrain",), lambda s: s.head != "lm", "cannot be pretrained further",
         "pretraining needs the head of a language model, which finetuning for another task replaces"),
    Rule("a trained prompt", ("distill",), lambda s: s.prompt > 0, "has another trained prompt than the teacher",
         "the teacher must have the same prompt"),
    Rule("integers or unmerged LoRA", ("pretrain", "distill"), lambda s: s.pairs or bool(s.integers),
         "cannot be pretrained further|has quantized or low-rank weights",
         "all weights would be trained, so merge first and quantize last"),
    Rule("unmerged LoRA over zeros", (*PRUNE, *QUANTIZE), lambda s: s.pairs and s.pruned,
         "merging its low-rank pairs would fill the zeros", "the pairs would be merged, which fills the zeros"),
    Rule("unmerged LoRA on integers", PRUNE, lambda s: s.pairs and bool(s.integers),
         "merging would undo the quantization", "the pairs would be merged, which undoes the quantization"),
    Rule("integers", QUANTIZE, lambda s: bool(s.integers) and not s.pairs, "already .*; quantize the artifact before",
         "integers are not rounded again, so quantize the artifact before"),
    Rule("integers with a scale per group", ("structured",), lambda s: "/" in s.integers and can_halve(s),
         "is quantized in groups", "a group of inputs that share a scale cannot be cut"),
    Rule("as many zeros", ("magnitude", "sparsify"), lambda s: s.sparsity >= 0.5, "sparsity.* 0.5 changes nothing", ""),
    Rule("one head", ("structured",), lambda s: not can_halve(s), "nothing would be removed", ""),
    Rule("one layer", ("depth",), lambda s: s.layers == 1, "nothing would be removed", ""),
    Rule("a trained prompt", ("export and import",), lambda s: s.prompt > 0, "has a trained prompt",
         "only PEFT's format holds it"),
    Rule("a trained prefix", ("export and import",), lambda s: s.prefix > 0, "has a trained prefix",
         "only PEFT's format holds it"),
    Rule("quantized bottleneck adapters", ("houlsby",), lambda s: s.adapter_integers,
         "has bottleneck adapters that are quantized", ""),
    Rule("bottleneck adapters", ("export and import",), lambda s: s.adapter > 0, "has bottleneck adapters",
         "no other format holds them"),
    Rule("a T5 with a task's head", ("export and import",), lambda s: s.family == "t5" and s.head != "lm",
         "have no head 'classify' to export to", "transformers has no T5 whose task head reads the encoder alone"),
    Rule("a BERT with fewer heads", ("export and import",),
         lambda s: s.family == "bert" and s.heads != SIZES["heads"], "head_dim",
         "BERT's format derives the width of a head from their number, as RoBERTa's and GPT-2's"),
    Rule("unmerged LoRA with a new head", ("export and import",), lambda s: s.pairs and s.base_head != s.head,
         "tensors that are not understood", "the adapter brings a head that its base does not have"),
)  # fmt: skip


def can_halve(s: State) -> bool:
    """Return whether half of the heads, and of the neurons in multiples of 4, can be removed."""
    return s.kv_heads > 1 and s.d_ff > 4


def refusal(operation: str, s: State) -> Rule | None:
    """Return the rule by which the operation is refused on an artifact in this state, if any."""
    return next((r for r in RULES if operation in r.operations and r.when(s)), None)


GROUPS = {
    "pretrain": ("pretrain",), "finetune": ("finetune",), "prune in training": ("sparsify",),
    "LoRA": ("LoRA merged",), "unmerged LoRA": ("LoRA apart",),
    "bottleneck adapters": ("houlsby",), "prompt tuning": ("prompt",), "prefix tuning": ("prefix",),
    "prune by score": SCORES, "prune parts": ("structured", "depth"), "distill": ("distill",),
    "quantize": QUANTIZE, "export, import": ("export and import",),
}  # fmt: skip
"""Operations as README.md's table names them."""


def table() -> str:
    """Return README.md's table of what may follow what, with the rules as numbered reasons."""
    rules = [r for r in RULES if r.because]
    lines = [f"| then → | {' | '.join(GROUPS)} |", f"|---{'|:-:' * len(GROUPS)}|"]
    for name, firsts in GROUPS.items():
        cells = (_cell(rules, firsts, seconds) for seconds in GROUPS.values())
        lines.append(f"| **{name}** | {' | '.join(cells)} |")
    lines.append("")
    lines += [f"{i}. {r.of[0].upper()}{r.of[1:]}: {r.because}." for i, r in enumerate(rules, 1)]
    return "\n".join(lines)


def _cell(rules: list[Rule], firsts: Collection[str], seconds: Collection[str]) -> str:
    """Return ✓, or the numbers of the rules: in brackets if they refuse some of these operations or families only."""
    found = [
        next((i for i, r in enumerate(rules, 1) if second in r.operations and r.when(after(first, start(family)))), 0)
        for family, first, second in itertools.product(FAMILIES, firsts, seconds)
    ]
    numbers = ", ".join(map(str, sorted(set(found) - {0})))
    return "✓" if not numbers else f"({numbers})" if 0 in found else numbers
