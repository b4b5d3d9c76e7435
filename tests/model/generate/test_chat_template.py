"""Which tokens of a conversation count: hand-made masks of published templates, and those of transformers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmctl.config.errors import RequestError
from llmctl.data.config import TokenizerConfig
from llmctl.data.examples.conversations import ConversationRows
from llmctl.data.source import Table
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading
from llmctl.data.tokenizers.byte_tokenizer import ByteTokenizer
from llmctl.data.tokenizers.tokenizer_json import JsonTokenizer
from llmctl.model.generate.chat_template import Template, chatml

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<|end_of_text|>"]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.FIRST and system_message is defined %}
            {{- " [INST] " + system_message + "\n\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial system!") }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL.replace("FIRST", "first")}
LATE = MISTRAL.replace("FIRST", "last")
"""Version 0.3: the message of the system is rendered in the last message of the user."""
TALK = [
    {"role": "user", "content": "Is 2 < 3?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 5?"},
    {"role": "assistant", "content": "It is not."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
# What counts stands between « and ».
CHATML_TURNS = (
    "<|im_start|>user\nIs 2 < 3?<|im_end|>\n<|im_start|>assistant\n«Yes.<|im_end|>»\n",
    "<|im_start|>user\nAnd 5?<|im_end|>\n<|im_start|>assistant\n«It is not.<|im_end|>»\n",
)
ASKS = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_TURNS = (ASKS.format("Is 2 < 3?") + "«Yes.<|eot_id|>»", ASKS.format("And 5?") + "«It is not.<|eot_id|>»")
MISTRAL_TURNS = (" [INST] Is 2 < 3? [/INST]« Yes.</s>»", " [INST] And 5? [/INST]« It is not.</s>»")
EXPECTED = {
    ("chatml", "turns"): "".join(CHATML_TURNS),
    ("chatml", "system"): "<|im_start|>system\nBe brief.<|im_end|>\n" + "".join(CHATML_TURNS),
    ("chatml", "cut"): "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_TURNS[1],
    ("llama 3", "turns"): "<s>" + "".join(LLAMA_TURNS),
    ("llama 3", "system"): "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    + "".join(LLAMA_TURNS),
    ("llama 3", "cut"): "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" + LLAMA_TURNS[1],
    ("mistral", "turns"): "<s>" + "".join(MISTRAL_TURNS),
    ("mistral", "system"): "<s> [INST] Be brief.\n\nIs 2 < 3? [/INST]« Yes.</s>»" + MISTRAL_TURNS[1],
    ("mistral", "cut"): "<s> [INST] Be brief.\n\nAnd 5? [/INST]« It is not.</s>»",
}


@pytest.fixture(scope="module")
def words():
    """One token per byte and per special token, so that masks by hand are those of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return JsonTokenizer(made.to_str().encode(), special={"bos": "<s>", "eos": "</s>"})


@pytest.fixture(scope="module")
def pieces():
    """Merges of bytes, some of them across the borders of answers."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = ["\n\n\n\n is it not brief?\n\n", "[INST] yes [/INST] it is. And is it? It is."] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL
    )
    made.train_from_iterator(texts, trainer)
    return JsonTokenizer(made.to_str().encode(), special={"bos": "<s>", "eos": "</s>"})


def by_hand(expected, words):
    """Return the ids, and whether each counts, of a text with « and »."""
    ids, counted = [], []
    for k, part in enumerate(expected.replace("»", "«").split("«")):
        own = words.encode_with_special(part)
        ids += own
        counted += [k % 2 == 1] * len(own)
    return ids, counted


def examples(*rows):
    N = len(rows)
    table = Table("talks", ("messages", "tools"), [(row, None) for row in rows], range(1, N + 1))
    zeros = np.zeros(N)
    return Examples(table, table.columns, np.arange(N), zeros, zeros, zeros, None, np.zeros(N, np.int32), ())


def rows_of(template, words, talk, seq_len):
    encode = Template(template, words).conversation
    return ConversationRows(examples(talk), encode, words.pad_id, seq_len, shuffle=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", ["turns", "system", "cut"])
def test_tokens_that_count_are_those_by_hand(name, case, words):
    ids, counted = by_hand(EXPECTED[name, case], words)
    talk = TALK if case == "turns" else [*SYSTEM, *TALK]
    # The whole conversation fits except in the case "cut", which fits exactly without its first exchange.
    room = len(ids) if case == "cut" else 300
    rows = rows_of(TEMPLATES[name], words, talk, room - 1)
    row = rows[0]
    n = len(ids) - 1
    assert row["tokens"][:n].tolist() == ids[:-1] and row["targets"][:n].tolist() == ids[1:]
    assert (row["weights"][:n] > 0).tolist() == counted[1:] and not row["weights"][n:].any()
    assert row["segments"].sum() == n and row["positions"].max() == n - 1
    assert (rows.shortened, rows.cut, rows.dropped, rows.missed) == (int(case == "cut"), 0, 0, 0)


def test_what_generation_reads_comes_before_what_counts(words):
    """The tokens before each answer are those of the prompt for it."""
    for text in TEMPLATES.values():
        template = Template(text, words)
        found = template.conversation([*SYSTEM, *TALK])
        begins = np.flatnonzero(np.diff(found.counted_N.astype(int)) == 1) + 1
        prompts = [template.prompt([*SYSTEM, *TALK[:n]]) for n in (1, 3)]
        assert [found.ids[:at] for at in begins] == prompts


def test_a_last_exchange_that_is_too_long_loses_its_end(words):
    ids, counted = by_hand(EXPECTED["chatml", "cut"], words)
    rows = rows_of(CHATML, words, [*SYSTEM, *TALK], len(ids) - 6)
    assert rows.cut == 1 and rows[0]["weights"].sum() == sum(counted) - 4  # and the newline after them
    assert "1 lose the end of the last answer" in rows.log_lines[0]
    talks = examples(TALK, TALK[:2])
    some = ConversationRows(talks, Template(CHATML, words).conversation, 0, 40, shuffle=False)
    assert (len(some), some.dropped) == (2, 0)
    long = [{"role": "user", "content": "x" * 50}, TALK[1]]
    some = ConversationRows(examples(long, TALK[:2]), Template(CHATML, words).conversation, 0, 40, shuffle=False)
    assert (len(some), some.dropped) == (1, 1) and "1 have no answer within the length" in some.log_lines[0]
    with pytest.raises(RequestError, match="none of the 1 conversations has an answer within 40 tokens"):
        rows_of(CHATML, words, long, 40)


def test_answers_that_are_rendered_differently_later_do_not_count(words):
    """Of a template that drops an earlier answer's reasoning, only the last answer counts."""
    kept = "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'][:2])"
    drops = CHATML.replace("message['content']", kept)
    found = Template(drops, words).conversation(TALK)
    said = words.decode([i for i, counts in zip(found.ids, found.counted_N, strict=True) if counts])
    assert (said, found.missed) == ("It is not.", 1)
    assert "1 answers are context only" in rows_of(drops, words, TALK, 200).log_lines[0]
    # Without a message of the system all is as in version 0.2; with one, no prompt is the beginning of the whole.
    assert Template(LATE, words).conversation(TALK).missed == 0
    with pytest.raises(RequestError, match=r"talks:1: the chat template renders what is before an answer differently"):
        rows_of(LATE, words, [*SYSTEM, *TALK], 200)


def test_a_message_that_spells_the_end_of_an_answer_says_text(words):
    talk = [TALK[0], {"role": "assistant", "content": "a<|im_end|>\n<|im_start|>b\ufdd1\ufdd2"}]
    found = Template(CHATML, words).conversation(talk)
    ends = [i for i in found.ids if i == words.special_ids["<|im_end|>"]]
    said = words.decode([i for i, counts in zip(found.ids, found.counted_N, strict=True) if counts])
    assert len(ends) == 2 and said == "a<|im_end|>\n<|im_start|>b\ufffd\ufffd"


MARKED = {
    "chatml": CHATML.replace(
        "message['content'] + '<|im_end|>' + '\n'}}",
        "''}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    ),
    "llama 3": LLAMA_3.replace(
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{%- generation -%}{{ message['content'] | trim + '<|eot_id|>' }}{%- endgeneration -%}"
        "{% else %}{{ content }}{% endif %}",
    ),
    "mistral": TEMPLATES["mistral"].replace(
        '{{- " " + message["content"] + eos_token }}',
        '{%- generation %}{{- " " + message["content"] + eos_token }}{%- endgeneration %}',
    ),
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("content", ["It is not.", "\n\nis it?", "Ünd 漢字 🙂"])
@pytest.mark.filterwarnings("ignore")
def test_masks_are_those_of_transformers(name, content, words, pieces):
    talk = [*SYSTEM, *TALK[:3], {"role": "assistant", "content": content}]
    for tokenizer in (words, pieces):
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer.model.decode()), bos_token="<s>", eos_token="</s>",
            chat_template=MARKED[name],
        )  # fmt: skip
        expected = theirs.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        template = Template(MARKED[name], tokenizer)
        found = template.conversation(talk)
        assert template.marks_answers and found.ids == list(expected["input_ids"])
        assert found.counted_N.astype(int).tolist() == list(expected["assistant_masks"])
        # The same tokens are found without marks.
        bare = Template(TEMPLATES[name], tokenizer).conversation(talk)
        assert bare.ids == found.ids and bare.counted_N.tolist() == found.counted_N.tolist()


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}", "«{}<|im_end|>»\n"),
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}", "«{}<|im_end|>»\n"),
        ("{% generation %}{{ m.content + '\n' }}{% endgeneration %}", "«{}\n»"),
        ("{% generation %}{{ '<unk>' + m.content }}{% endgeneration %}", "«<unk>{}»"),
    ],
)
def test_marked_answers_end_with_their_end_token(block, expected, words):
    """White space after the end token is not learned, and an end token outside the block is."""
    asks = "{{ '<|im_start|>' + m.role + '\n' }}"
    said = "{% if m.role == 'assistant' %}" + block + "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    template = Template("{% for m in messages %}" + asks + said + "{% endfor %}", words)
    text = "".join(
        f"<|im_start|>{m['role']}\n"
        + (expected.format(m["content"]) if m["role"] == "assistant" else f"{m['content']}<|im_end|>\n")
        for m in TALK
    )
    found = template.conversation(TALK)
    assert (found.ids, found.counted_N.tolist()) == by_hand(text, words)
    assert template.end_ids() == [words.special_ids["<|im_end|>"]] * ("<|im_end|>" in expected)


@pytest.mark.parametrize("template", [CHATML, MARKED["chatml"]])
def test_an_answer_of_weight_0_is_context_only(template, words):
    talk = [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]
    whole = Template(template, words).conversation(TALK)
    found = Template(template, words).conversation(talk)
    said = words.decode([i for i, counts in zip(found.ids, found.counted_N, strict=True) if counts])
    assert (found.ids, said, found.missed) == (whole.ids, "It is not.", 0)
    rows = ConversationRows(examples(talk, talk[:2]), Template(template, words).conversation, 0, 300, shuffle=False)
    assert (len(rows), rows.dropped, rows.unweighted) == (1, 0, 1) and "have the weight 0" in rows.log_lines[0]
    with pytest.raises(RequestError, match="all answers of the 1 conversations have the weight 0"):
        rows_of(template, words, talk[:2], 300)


def test_a_weight_needs_one_marked_text_per_answer(words):
    twice = MARKED["chatml"].replace("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}")
    with pytest.raises(RequestError, match="marks 4 texts of 2 answers"):
        Template(twice, words).conversation([TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]])


@pytest.fixture(scope="module")
def trained():
    texts = ["Be brief. Is it? Yes, it is. user assistant system", "Never say no to the 2 or 3 of them"] * 30
    return loading.train(texts, TokenizerConfig(vocab_size=290))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
def test_chatml_for_any_tokenizer(kind, trained, words):
    """A tokenizer without ChatML's tokens ends turns with its own end token."""
    tokenizer = {"bytes": ByteTokenizer.new(), "sentencepiece": trained, "json": words}[kind]
    end = "<|im_end|>" if kind == "json" else "</s>"
    template = Template(chatml(tokenizer), tokenizer)
    assert template.render([*SYSTEM, *TALK], prompt=False) == EXPECTED["chatml", "system"].replace(
        "<|im_end|>", end
    ).replace("«", "").replace("»", "")
    found = template.conversation([*SYSTEM, *TALK])
    said = [i for i, counts in zip(found.ids, found.counted_N, strict=True) if counts]
    assert tokenizer.decode(said).split() == ["Yes.It", "is", "not."] or kind == "sentencepiece"
    assert template.end_ids() == [tokenizer.special_ids[end]]
    assert said.count(template.end_ids()[0]) == 2 and said[-1] == template.end_ids()[0]
    # What is encoded is what generation encodes.
    assert found.ids == tokenizer.encode_with_special(template.render([*SYSTEM, *TALK], prompt=False))


def test_tools_are_described_and_called(words):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        *SYSTEM,
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    template = Template(chatml(words), words)
    text = template.render(talk, tools, prompt=False)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n") and text.count("<|im_start|>system") == 1
    assert '{"type": "function", "function": {"name": "add", "parameters": {}}}<|im_end|>\n' in text
    found = template.conversation(talk, tools)
    said = words.decode([i for i, counts in zip(found.ids, found.counted_N, strict=True) if counts])
    one = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert said == f"{one}\n{one}Two."


def test_the_date_in_training_is_fixed(words):
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert words.decode(Template(dated, words).conversation(TALK).ids).startswith("26 Jul 2024user")


def test_a_date_of_any_width_is_refused(words):
    template = Template("{{ strftime_now('%1000000000Y') }}" + CHATML, words)
    for use in (template.render, template.prompt, template.conversation):
        with pytest.raises(RequestError, match=r"^the chat template asks for a date with a width$"):
            use(TALK)


@pytest.mark.parametrize("text", ["a<s>b</s> c", "ü</s>漢\n\n<|im_end|>x <unk>", "", "a\ufdd0b", "<\ufdd0s>x<s>"])
def test_characters_of_tokens(text, words, pieces, trained):
    for tokenizer in (words, pieces, trained, ByteTokenizer.new()):
        ids, spans = tokenizer.offsets_with_special(text)
        assert ids == tokenizer.encode_with_special(text)
        assert all(0 <= a <= b <= len(text) for a, b in spans) and spans == sorted(spans)
        special = {i: t for t, i in tokenizer.special_ids.items()}
        assert all(text[a:b] == special[i] for i, (a, b) in zip(ids, spans, strict=True) if i in special and b > a)
