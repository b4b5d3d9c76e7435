"""Columns and labels of a recipe's data are checked before the first stage runs."""

import pytest

from llmctl.cli import app
from llmctl.config.errors import RequestError
from llmctl.pipeline import data_check, recipe

RECIPE = """
data = {{ source = "csv", path = "{file}", {data} }}
[[stage]]
kind = "pretrain"
{pretrain}
[[stage]]
kind = "finetune"
{finetune}
[[stage]]
kind = "eval"
{eval}
"""


@pytest.fixture
def written(tmp_path):
    """Write a table and a recipe with some settings; the recipe's file."""
    (tmp_path / "a.csv").write_text("text,stars\ngood film,1\nbad film,0\n")

    def made(data="", file="a.csv", **stages):
        parts = {"pretrain": "", "finetune": "", "eval": ""} | stages
        path = tmp_path / "r.toml"
        path.write_text(RECIPE.format(file=tmp_path / file, data=data, **parts))
        return path

    return made


MAPPED = 'columns = { text = "text", label = "stars" }'


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"data": 'columns = { text = "texd", label = "stars" }'}, "no column 'texd', did you mean 'text'?"),
        (
            {"data": "validation = 0.1"},
            "finetune: the data has no column 'label'; map it in data.columns (it has: text)",
        ),
        ({"data": MAPPED, "finetune": 'task = "tokens"'}, "finetune: the data has no column 'tokens' and no column"),
        ({"data": MAPPED + ', classes = ["0", "2"]'}, "'1'"),
        ({"data": MAPPED, "eval": 'data.columns = { text = "text" }'}, "eval: the data has no column 'label'"),
    ],
)
def test_wrong_columns_and_labels_are_found_at_once(written, settings, line, capsys, tmp_path):
    file = written(**settings)
    for argv in (["run", str(file), "--run", str(tmp_path / "run")], ["doctor", str(file)]):
        assert app.run(argv) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and line in err
    assert not (tmp_path / "run" / "pretrain").exists()
    with pytest.raises(RequestError):
        data_check.check(recipe.read(file), missing=True)  # as `plan` does


def test_what_is_right_passes_and_absent_data_is_left_to_the_run(written):
    data_check.check(recipe.read(written(data=MAPPED)))
    chosen = recipe.read(written(data=MAPPED, file="none.csv"))
    data_check.check(chosen, missing=True)
    with pytest.raises(RequestError, match=r"none.csv"):
        data_check.check(chosen)


def test_stages_that_are_not_asked_for_are_not_checked(written):
    chosen = recipe.read(written(data=MAPPED, finetune='task = "tokens"'))
    data_check.check(chosen, ["pretrain"])
    assert data_check.needed(chosen, chosen.steps[2]) == ("tokens", "tags")  # eval measures what was finetuned


@pytest.mark.parametrize(
    ("measures", "columns"),
    [
        ('of = ["pretrain"]', ()),
        ('of = ["finetune"]', ("text", "label")),
        ("", ("text", "label")),  # all models before it, and one of them needs labels
        ('of = ["finetune"]\ntasks = ["lm"]', ()),
        ('of = ["pretrain"]\ntasks = ["masked", "next_sentence"]', ("text",)),
    ],
)
def test_an_eval_needs_the_columns_of_what_it_measures(written, measures, columns):
    """The parent, which is the last model before it, does not count if others are named."""
    chosen = recipe.read(written(data=MAPPED, eval=measures))
    assert data_check.needed(chosen, chosen.steps[2]) == columns


def test_a_language_model_before_a_classifier_is_measured_on_plain_text(written, tmp_path):
    (tmp_path / "plain.txt").write_text("some text\n")
    plain = f'data = {{ source = "text", path = "{tmp_path / "plain.txt"}", columns = {{ text = "text" }} }}'
    data_check.check(recipe.read(written(data=MAPPED, eval=f'of = ["pretrain"]\n{plain}')))
    with pytest.raises(RequestError, match=r"eval: the data has no column 'label'"):
        data_check.check(recipe.read(written(data=MAPPED, eval=plain)))


def test_a_student_of_preferences_needs_no_preferences(written):
    learned = 'task = "preference"\nmethod = "lora"'
    chosen = written(data=MAPPED, finetune=learned, eval='of = ["student"]')
    file = chosen.with_name("s.toml")
    student = '[[stage]]\nkind = "distill"\nname = "student"\nteacher = "finetune"\nfrom = "pretrain"\n'
    file.write_text(chosen.read_text().replace('[[stage]]\nkind = "eval"', student + '[[stage]]\nkind = "eval"'))
    steps = recipe.read(file)
    assert [data_check.needed(steps, step) for step in steps.steps[1:]] == [("prompt", "chosen", "rejected"), (), ()]
