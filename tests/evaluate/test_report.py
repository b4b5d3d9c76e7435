"""Tables of an evaluation whose artifacts are measured on several tasks."""

from llmctl.evaluate import report
from llmctl.evaluate.tasks.registry import TASKS


def result(name, task, **metrics):
    return {"artifact": name, "digest": f"of {name}", "task": task, "protocol": "p", "metrics": metrics}


def test_tasks_with_metrics_of_the_same_names_have_a_row_each():
    results = [
        result("a", "masked", token_accuracy=0.5, nll=2.0),
        result("a", "next", token_accuracy=0.25, nll=3.0, next_sentence_accuracy=0.75),
        result("b", "masked", token_accuracy=0.4, nll=2.5),
    ]
    head, body = report.cells(results)
    assert head == ["artifact", "task", "token accuracy", "next sentence", "nats/token"]
    assert body == [
        ["a", "masked", "50.00%", "–", "2.0000"],
        ["a", "next", "25.00%", "75.00%", "3.0000"],
        ["b", "masked", "40.00%", "–", "2.5000"],
    ]
    assert report.markdown(results).count("- `a`: `of a`") == 1


def test_tasks_with_different_metrics_share_a_row():
    head, body = report.cells([result("a", "masked", token_accuracy=0.5), result("a", "other", rmse=2.0)])
    assert (head, body) == (["artifact", "RMSE", "token accuracy"], [["a", "2", "50.00%"]])


def test_objectives_have_different_titles():
    # Results are told apart by their titles, also in the closing table of a run.
    titles = [TASKS[name].title for name in ("causal", "masked", "next_sentence", "spans", "prefix", "completions")]
    assert len(set(titles)) == len(titles)


def test_in_a_terminal_every_figure_has_a_row_and_every_result_a_column():
    one = result("a", "c", accuracy=0.8, accuracy_low=0.7, accuracy_high=0.9, text_tokens=1234, latency_p50=0.0125)
    shown = report.table([one, result("b", "c", accuracy=0.5, per_class={"x": 1.0})])
    cells = [[str(c.header), *c.cells] for c in shown.columns]
    assert cells == [
        ["metric", "accuracy", "  95 % interval", "text tokens", "p50 ms"],
        ["a", "80.00%", "70.00% to 90.00%", "1234", "12.50"],
        ["b", "50.00%", "–", "–", "–"],
    ]
    headings = [c.header for c in report.table([result("a", "masked"), result("a", "next")]).columns]
    assert headings == ["metric", "a: masked", "a: next"]


def test_metrics_on_changed_texts_have_a_table_of_their_own():
    metrics = {"accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "accuracy_under_typos": 0.7}
    metrics |= {"accuracy_under_typos_low": 0.6, "accuracy_under_typos_high": 0.8, "flips_under_typos": 0.25}
    result = {"artifact": "a", "task": "robustness", "digest": "d", "protocol": "p", "metrics": metrics}
    head, body = report.change_cells([result, {**result, "artifact": "b", "metrics": {"accuracy": 0.5}}])
    assert head == ["artifact", "task", "change", "accuracy", "changed predictions"]
    assert body == [
        ["a", "robustness", "–", "90.00% (80.00% to 95.00%)", "–"],
        ["a", "robustness", "typos", "70.00% (60.00% to 80.00%)", "25.00%"],
    ]
    assert "| a | robustness | typos | 70.00% (60.00% to 80.00%) | 25.00% |" in report.markdown([result])
    assert report.headline(result).endswith("(95 % interval 80.00% to 95.00%), under typos 70.00%")
