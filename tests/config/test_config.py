"""Wrong settings are refused in one line that says where, what, and which word was probably meant."""

from typing import ClassVar, Literal

import pytest
from pydantic import Field

from llmctl.config.base import Config, assign, keyed, merge, parse_value, read_toml, section
from llmctl.config.errors import RequestError
from llmctl.config.validation import validate


class Optim(Config):
    rate: float = Field(0.1, gt=0)
    schedule: Literal["cosine", "linear"] = "cosine"


class Shape(Config):
    deciding: ClassVar[tuple[str, ...]] = ("preset",)
    preset: str = ""
    width: int = 4


class Settings(Config):
    unkeyed: ClassVar[frozenset[str]] = frozenset({"verbose"})
    steps: int = Field(10, ge=1)
    verbose: bool = False
    parent: str = Field("", alias="from")
    optim: Optim = Optim(rate=0.3)
    maybe: Optim | None = None
    several: list[Optim] = []
    shape: Shape = Shape(preset="small", width=8)
    columns: dict[str, str] = {}
    sizes: tuple[int, ...] = ()


def refused(values: dict) -> str:
    with pytest.raises(RequestError) as e:
        validate(Settings, values, lambda path: f"f.toml: {path}")
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"stepps": 3}, "f.toml: stepps: unknown key, did you mean 'steps'?"),
        ({"optim": {"rats": 3}}, "f.toml: optim.rats: unknown key, did you mean 'rate'?"),
        ({"maybe": {"rats": 3}}, "f.toml: maybe.rats: unknown key, did you mean 'rate'?"),
        ({"several": [{"rats": 3}]}, "f.toml: several.0.rats: unknown key, did you mean 'rate'?"),
        ({"optim": {"zzz": 1}}, "f.toml: optim.zzz: unknown key: known are rate, schedule"),
        ({"optim": {"rate": float("inf")}}, "f.toml: optim.rate: must be a finite number, got Infinity"),
        ({"optim": {"rate": float("nan")}}, "f.toml: optim.rate: must be a finite number, got NaN"),
        ({"optim": {"rate": 3.5e38}}, "must be at most 3.4e+38, the largest number in float32, got 3.5e+38"),
        ({"steps": "3"}, 'f.toml: steps: must be a whole number, got "3"'),
        ({"steps": 2.5}, "f.toml: steps: must be a whole number, got 2.5"),
        ({"steps": True}, "f.toml: steps: must be a whole number, got true"),
        ({"steps": 0}, "f.toml: steps: must be >= 1, got 0"),
        ({"verbose": 1}, "f.toml: verbose: must be true or false, got 1"),
        ({"optim": 3}, "f.toml: optim: must be a table, got 3"),
        ({"columns": {"a": 1}}, "f.toml: columns.a: must be a string, got 1"),
        ({"optim": {"schedule": "cosin"}}, "must be 'cosine' or 'linear', got \"cosin\", did you mean 'cosine'?"),
        ({"stepps": 3, "verbose": 1}, "f.toml: stepps: unknown key, did you mean 'steps'? (and 1 more)"),
    ],
)
def test_one_line_for_what_is_wrong(values, line):
    assert refused(values).endswith(line)


def test_what_toml_gives_is_taken():
    got = validate(Settings, {"from": "a", "optim": {"rate": 1}, "sizes": [1, 2]}, str)
    assert (got.parent, got.optim.rate, got.sizes) == ("a", 1.0, (1, 2))


def test_a_section_given_in_part_keeps_the_rest_of_the_default():
    assert validate(Settings, {"optim": {"schedule": "linear"}}, str).optim == Optim(rate=0.3, schedule="linear")


def test_of_a_section_with_a_preset_only_the_preset_is_kept():
    assert validate(Settings, {"shape": {}}, str).shape == Shape(preset="small")
    assert validate(Settings, {"shape": {"preset": "large"}}, str).shape == Shape(preset="large")


def test_keyed_leaves_out_what_cannot_change_a_result():
    assert "verbose" not in keyed(Settings())
    assert keyed(Settings())["optim"] == {"rate": 0.3, "schedule": "cosine"}


def test_values_are_toml_and_else_text():
    texts = ("0.6", "true", "[1, 2]", '{a = "b"}', '"x"', "1e-3", "plain", "a/b.csv", "1\nb = 2", "")
    got = [parse_value(t) for t in texts]
    assert got == [0.6, True, [1, 2], {"a": "b"}, "x", 1e-3, "plain", "a/b.csv", "1\nb = 2", ""]


def test_sections_merge_and_free_tables_replace():
    below = {"optim": {"rate": 1, "schedule": "linear"}, "columns": {"text": "a"}}
    above = {"optim": {"rate": 2}, "columns": {"label": "b"}}
    assert merge(below, above, Settings) == {"optim": {"rate": 2, "schedule": "linear"}, "columns": {"label": "b"}}
    assert below["optim"]["rate"] == 1


def test_sections_are_found_behind_none_too():
    assert (section(Settings, "optim"), section(Settings, "maybe"), section(Settings, "steps")) == (Optim, Optim, None)


def test_assign_makes_tables_and_refuses_to_go_through_a_value():
    doc: dict = {"a": {"b": 1}}
    assign(doc, ["a", "c", "d"], 2)
    assert doc == {"a": {"b": 1, "c": {"d": 2}}}
    with pytest.raises(RequestError, match=r"a\.b\.c: b is a value"):
        assign(doc, ["a", "b", "c"], 3)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "demo.toml").write_text("a = \n")
    with pytest.raises(RequestError, match=r"not valid TOML: .*line 1"):
        read_toml(tmp_path / "demo.toml")
    with pytest.raises(RequestError, match=r"no such file, did you mean '.*demo\.toml'"):
        read_toml(tmp_path / "dem.toml")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_toml(tmp_path)


def test_a_setting_that_comes_later_changes_no_older_key():
    class Old(Config):
        a: int = 1
        """A."""

    class New(Old):
        added: ClassVar[frozenset[str]] = frozenset({"b"})
        b: int = 2
        """B."""

    assert keyed(New()) == keyed(Old()) == {"a": 1} and keyed(New(b=3)) == {"a": 1, "b": 3}


def test_epochs_stand_instead_of_steps():
    """The default's 500 steps do not count as given beside `train.epochs`; the keys of recipes without epochs stay."""
    from llmctl.pipeline.stages.finetune import Config as Finetune

    config = validate(Finetune, {"train": {"epochs": 2}}, str)
    assert (config.train.epochs, config.train.eval_every) == (2.0, 100)
    with pytest.raises(RequestError, match="epochs and steps exclude each other"):
        validate(Finetune, {"train": {"epochs": 2, "steps": 30}}, str)
    assert "epochs" not in keyed(validate(Finetune, {"train": {"steps": 30}}, str))["train"]
    assert validate(Finetune, {"train": {"batch_size": 8}}, str).train.steps == 500


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"steps": 9, "seq_len": 8}, {"epochs": 2}, {"seq_len": 8, "epochs": 2}),
        ({"epochs": 2}, {"steps": 9}, {"steps": 9}),
        ({"steps": 9}, {"epochs": 0}, {"steps": 9, "epochs": 0}),
        ({"steps": 9}, {"steps": 3, "epochs": 2}, {"steps": 3, "epochs": 2}),  # one layer has both: refused later
        ({"steps": 9}, {"seq_len": 8}, {"steps": 9, "seq_len": 8}),
    ],
)
def test_a_field_of_a_higher_layer_voids_what_it_excludes_below(below, above, merged):
    from llmctl.pipeline.stages.finetune import Config as Finetune

    assert merge({"train": below}, {"train": above}, Finetune) == {"train": merged}
