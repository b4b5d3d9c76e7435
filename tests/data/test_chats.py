"""Conversations in the formats of OpenAI and ShareGPT: read alike, and refused in one line with what is wrong."""

import datetime
import decimal
import json

import pytest

from llmctl.config.errors import RequestError
from llmctl.data import chats, columns, splits
from llmctl.data.config import DataConfig

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def load(path, rows, **kw):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    cfg = DataConfig(source="jsonl", path=str(path), **{"validation": 0, "test": 0} | kw)
    return splits.load(cfg, conversations=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (HI, HI),
        (SHARED, HI),
        ([{"role": "Developer", "content": "s", "name": None}, *HI], [{"role": "system", "content": "s"}, *HI]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, HI[1]],
            HI,
        ),
        (
            [
                SHARED[0],
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
            ],
            [
                HI[0],
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "2"},
            ],
        ),
        (
            [HI[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": '{"a": 1}'}}]}],
            [HI[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"a": 1}}}]}],
        ),
        ([HI[0], {**HI[1], "tool_calls": []}], HI),
        ([HI[0], {**HI[1], "weight": 0.0}, {**HI[1], "weight": 1}], [HI[0], {**HI[1], "weight": 0.0}, HI[1]]),
    ],
)
def test_both_formats_are_read_alike(given, expected):
    assert chats.read(given) == expected


def test_scalars_of_columnar_files_become_text():
    """Templates and the comparison of conversations read JSON data."""
    day = datetime.datetime(2024, 7, 26, 1, 2)
    more = {"at": day, "cost": [decimal.Decimal("1.50")], "about": {"day": day.date(), "none": None}}
    found = chats.read([HI[0], {**HI[1], **more}])
    assert found[1] == {
        **HI[1], "at": "2024-07-26T01:02:00", "cost": ["1.50"], "about": {"day": "2024-07-26"}
    }  # fmt: skip
    tools = chats.read_tools([{"name": "f", "since": day}])
    assert json.loads(chats.as_json_text(found, tools))[1] == [{"name": "f", "since": "2024-07-26T01:02:00"}]
    with pytest.raises(RequestError, match=r"^message 2: about: image holds bytes, which is no JSON data$"):
        chats.read([HI[0], {**HI[1], "about": {"image": b"a"}}])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Hi", "holds str, not a list of messages"),
        (["Hi"], "holds a list of str, not a list of messages"),
        ([], "holds a conversation without messages"),
        (HI[:1], "in which the assistant says nothing"),
        ([{"role": "users", "content": "x"}, HI[1]], "message 1 has the role 'users', did you mean 'user'"),
        ([{"role": 3, "content": "x"}, HI[1]], "message 1 has the role 3 "),
        ([{"from": "model", "value": "x"}], "message 1 has the sender 'model'"),
        ([HI[0], {"role": "assistant", "content": " "}], r"message 2 \(assistant\) is empty"),
        ([{"role": "user"}, HI[1]], r"message 1 \(user\) is empty"),
        ([{"role": "user", "content": 7}, HI[1]], "message 1 holds int, not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, HI[1]], "a part of type 'image_url', not text"),
        ([HI[0], {"from": "function_call", "value": "f(1)"}], r"message 2 \(function_call\) is not JSON"),
        ([HI[0], {**HI[1], "weight": 0.5}], r"message 2 has the weight 0.5; it must be 0 \(context only\) or 1"),
        ([HI[0], {**HI[1], "tool_calls": "f"}], "message 2: tool_calls must be a list"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(value, said, tmp_path):
    with pytest.raises(RequestError, match=rf"x.jsonl:2: column 'messages' .*{said}") as e:
        load(tmp_path / "x.jsonl", [{"messages": HI}, {"messages": value}])
    assert "\n" not in str(e.value)


def test_deeply_nested_messages_are_refused(tmp_path):
    deep = '{"messages": [{"role": "user", "content": "x", "more": ' + "[" * 600 + "]" * 600 + "}]}"
    with pytest.raises(RequestError, match=r"nested too deeply|in which the assistant says nothing"):
        load(tmp_path / "x.jsonl", [{"messages": HI}, deep])


def test_tools_are_lists_or_their_text(tmp_path):
    tool = {"type": "function", "function": {"name": "f"}}
    rows = [{"messages": HI, "tools": [tool]}, {"messages": [*HI, *HI], "tools": json.dumps([tool])},
            {"messages": [*HI, *HI, *HI]}, {"messages": HI * 4, "tools": ""}]  # fmt: skip
    found = load(tmp_path / "x.jsonl", rows)["train"]
    assert [row["tools"] for row in found] == [[tool], [tool], None, None]
    for odd, said in (("x", "not JSON"), (["f"], "must hold a list of tools"), ({"a": 1}, "must hold a list of tools")):
        with pytest.raises(RequestError, match=f"column 'tools' .*{said}"):
            load(tmp_path / "x.jsonl", [{"messages": HI, "tools": odd}])


def test_tools_are_mapped_beside_a_named_column(tmp_path):
    row = {"dialog": HI, "tools": [{"name": "f"}]}
    found = load(tmp_path / "x.jsonl", [row], columns={"messages": "dialog"})["train"]
    assert found[0]["tools"] == [{"name": "f"}]
    with pytest.raises(RequestError, match=r"a chat template renders conversations; leave data\.template out"):
        load(tmp_path / "x.jsonl", [row], template={"prompt": "{{ row }}"})


@pytest.mark.parametrize(
    ("row", "mapped"),
    [
        ({"text": "t", "prompt": "p", "messages": HI}, {}),
        ({"conversations": SHARED, "label": "x"}, {}),
        ({"n": 1, "dialog": HI}, {}),
        ({"dialog": HI, "messages": "m"}, {"messages": "dialog"}),
        ({"dialog": HI}, {"text": "t", "messages": "dialog"}),
    ],
)
def test_the_column_of_conversations_is_found(row, mapped, tmp_path):
    mapped = {k: v for k, v in mapped.items() if v in row}
    found = load(tmp_path / "x.jsonl", [row], columns=mapped)["train"]
    assert found.columns == ("messages",) and found[0]["messages"] == HI
    assert columns.holds_conversations(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl"), columns=mapped))


def test_data_without_conversations(tmp_path):
    with pytest.raises(RequestError, match="none of its columns holds conversations"):
        load(tmp_path / "x.jsonl", [{"text": "a"}])
    assert not columns.holds_conversations(DataConfig(source="jsonl", path=str(tmp_path / "x.jsonl")))


def test_conversations_that_begin_alike_are_in_one_split(tmp_path):
    rows = [{"messages": [{"role": "system", "content": f"s{i % 3}"}, {"role": "user", "content": f"question {i // 4}"},
                          {"role": "assistant", "content": f"answer {i}"}]} for i in range(200)]  # fmt: skip
    found = load(tmp_path / "x.jsonl", [*rows, rows[0]], validation=0.3, test=0.3)
    asked = [{row["messages"][1]["content"] for row in part} for part in found.examples.values()]
    assert found.duplicates == 1 and all(len(a) > 3 for a in asked)
    assert not asked[0] & asked[1] and not asked[1] & asked[2] and not asked[0] & asked[2]


def test_text_is_replaced_and_half_characters_too(tmp_path):
    rows = ['{"messages": [{"role": "user", "content": "a<br>\\ud83d"}, {"role": "assistant", "content": "<br>b"}]}']
    found = load(tmp_path / "x.jsonl", rows, replace={"<br>": "\n"})["train"]
    assert [m["content"] for m in found[0]["messages"]] == ["a\n\ufffd", "\nb"]
