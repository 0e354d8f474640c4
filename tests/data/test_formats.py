"""What becomes of a row: its tokens, and which of them are to be predicted."""

import itertools

import numpy as np
import pytest

from jaxlm.data.formats import FormatConfig, examples, formatter
from jaxlm.data.rows import BadRow
from tests.data.tiny import CHATML, MARKED, tokenizer

EOS = "<|endoftext|>"
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "Yes?"},
]


def run(row, name="text", template=CHATML, merges=(), **options):
    made = formatter(FormatConfig(name=name, **options), tokenizer(template, merges))
    (result,) = examples(made, [row], lambda i: f"file:{i + 1}")
    return result


def parts(example, template=CHATML, merges=()):
    """The text without and with loss, cut where the mask changes."""
    made = tokenizer(template, merges)
    assert example.ids.dtype == np.int32 and example.mask.dtype == bool and len(example.ids) == len(example.mask)
    cuts = np.flatnonzero(np.diff(example.mask)) + 1
    bounds = [0, *cuts, len(example.ids)]
    return [(made.decode(example.ids[a:b]), bool(example.mask[a])) for a, b in itertools.pairwise(bounds)]


def reason(row, *args, **options):
    result = run(row, *args, **options)
    assert isinstance(result, BadRow) and result.where == "file:1"
    return result.reason


def test_text():
    assert parts(run({"text": "Grüße"})) == [("Grüße" + EOS, True)]
    assert parts(run({"text": "a" + EOS})) == [("a" + EOS, True)]  # once
    assert parts(run({"text": "a"}, eos=False)) == [("a", True)]
    assert run({"text": " \n"}) is None
    assert reason({"text": 3}) == "column 'text' is int, expected text"
    assert reason({"text": None}) == "column 'text' is NoneType, expected text"
    assert "surrogate" in reason({"text": "a\ud800"})


def test_columns_are_strict():
    with pytest.raises(ValueError, match=r"file:1: column 'txet' not known.*reads text \(did you mean 'text'\?\)"):
        run({"txet": "a"})
    with pytest.raises(ValueError, match="columns 'id', 'url' not known"):
        run({"text": "a", "id": 1, "url": ""})
    for ignored in (("id", "url"), ("*",)):
        assert parts(run({"text": "a", "id": 1, "url": ""}, ignore_columns=ignored)) == [("a" + EOS, True)]
    assert parts(run({"content": "a"}, columns=(("text", "content"),))) == [("a" + EOS, True)]
    assert reason({}) == "no column 'text', only "
    with pytest.raises(ValueError, match=r"has no 'txt' \(did you mean 'text'\?\)"):
        run({}, columns=(("txt", "content"),))
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        FormatConfig(name="alpcaa")


def test_schema_is_checked_at_once():
    made = formatter(FormatConfig(), tokenizer())
    with pytest.raises(ValueError, match=r"no column 'text', only texts \(did you mean 'texts'.*--column text=COLUMN"):
        made.check_schema(("texts",), "data")
    made.check_schema(("text",), "data")


def test_eos_must_exist():
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(ValueError, match="--no-eos"):
        formatter(FormatConfig(), made)
    formatter(FormatConfig(eos=False), made)


def test_prompt_and_completion():
    row = {"prompt": "2+2=", "completion": "4"}
    assert parts(run(row, "prompt")) == [("2+2=", False), ("4" + EOS, True)]
    assert parts(run(row, "prompt", train_on_prompt=True)) == [("2+2=4" + EOS, True)]
    assert reason(row | {"completion": ""}, "prompt") == "column 'completion' is empty: there is nothing to learn"


def test_a_token_across_the_boundary_belongs_to_the_completion():
    merges = [("=", "4")]
    example = run({"prompt": "2+2=", "completion": "4"}, "prompt", merges=merges)
    assert example.merged and parts(example, merges=merges) == [("2+2", False), ("=4" + EOS, True)]
    assert not run({"prompt": "2+2=", "completion": " 4"}, "prompt", merges=merges).merged


def test_alpaca_is_the_published_template():
    """github.com/tatsu-lab/stanford_alpaca/blob/main/train.py"""
    paired = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {x}\n\n### Input:\n1 2\n\n"
        "### Response:"
    )
    alone = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}\n\n### Response:"
    )
    row = {"instruction": "Add {x}", "output": "3"}
    assert parts(run(row | {"input": "1 2"}, "alpaca")) == [(paired, False), ("3" + EOS, True)]
    for empty in ({}, {"input": ""}, {"input": None}):
        assert parts(run(row | empty, "alpaca")) == [(alone, False), ("3" + EOS, True)]


def test_messages():
    expected = [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>\n", True),
        ("<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes?<|im_end|>\n", True),
    ]
    assert parts(run({"messages": TALK}, "messages")) == expected
    assert [t for t, on in parts(run({"messages": TALK}, "messages", turns="last")) if on] == ["Yes?<|im_end|>\n"]
    whole = "".join(text for text, _ in expected)
    assert parts(run({"messages": TALK}, "messages", train_on_prompt=True)) == [(whole, True)]


def test_what_follows_the_last_answer_has_no_loss():
    (_, answer), *rest = [part for part in parts(run({"messages": TALK[:4]}, "messages"))][1:]
    assert answer and rest == [("<|im_start|>user\nMore<|im_end|>\n", False)]


def test_sharegpt():
    talk = [{"from": who, "value": text} for who, text in (("human", "Hi"), ("gpt", "Hello"))]
    assert parts(run({"conversations": talk}, "sharegpt")) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello<|im_end|>\n", True),
    ]
    talk[1]["from"] = "gtp"
    assert reason({"conversations": talk}, "sharegpt").startswith("message 2 has the from 'gtp' (did you mean 'gpt'?)")


def test_generation_marks():
    example = run({"messages": TALK}, "messages", MARKED)
    assert [text for text, on in parts(example, MARKED) if on] == ["Hello<|im_end|>", "Yes?<|im_end|>"]
    example = run({"messages": TALK}, "messages", MARKED, turns="last")
    assert [text for text, on in parts(example, MARKED) if on] == ["Yes?<|im_end|>"]


# What templates do in the wild: Qwen 3 drops the reasoning of former turns; Mistral puts the system message into the
# last turn of the user; a template of plain text has tokens that merge with what follows.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_that_takes_back_what_it_wrote():
    found = reason({"messages": TALK}, "messages", DROPS)
    assert "what stands after message 3 differently once more turns follow" in found and "--turns last" in found
    last = parts(run({"messages": TALK}, "messages", DROPS, turns="last"), DROPS)
    assert [text for text, on in last if on] == ["<think>\n\n</think>\n\nYes?<|im_end|>\n"]


def test_a_template_without_special_tokens():
    def with_loss(merges):
        example = run({"messages": TALK[1:]}, "messages", PLAIN, merges)
        return [text for text, on in parts(example, PLAIN, merges) if on], example.merged

    assert with_loss([]) == (["Hello\n", "Yes?\n"], False)
    # An answer's first token may begin in the prompt, but its last one may not reach into the next turn.
    assert with_loss([(":", "Y")]) == (["Hello\n", ":Yes?\n"], True)
    found = reason({"messages": TALK[1:]}, "messages", PLAIN, [("Ċ", "u")])
    assert found.startswith("the tokens after message 2 change with what follows")
    found = reason({"messages": TALK[1:3]}, "messages", PLAIN, [(":", "H"), ("t", ":H")])
    assert found.startswith("the tokens before message 2 change with what follows")


def test_a_template_that_leaves_a_message_out():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    assert reason({"messages": TALK}, "messages", silent) == "the chat template leaves out message 1, of the system"


def test_a_template_that_refuses():
    strict = "{{ raise_exception('roles must alternate') }}"
    assert reason({"messages": TALK}, "messages", strict).endswith("roles must alternate")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "column 'messages' is empty"),
        ("hello", "column 'messages' is not a list of messages"),
        (TALK[:2], "no turn of the assistant"),
        (TALK[2:], "the conversation begins with the assistant"),
        ([{"role": "asistant", "content": ""}], "message 1 has the role 'asistant' (did you mean 'assistant'?)"),
        ([{"role": "user", "contents": ""}], "message 1 has 'contents' (did you mean 'content'?)"),
        ([{"role": "user"}], "message 1 has no content"),
        ([{"role": "user", "content": [1]}], "content of message 1 is list, expected text"),
        ([{"content": "x"}], "message 1 has the role None"),
    ],
)
def test_bad_conversations(messages, expected):
    assert reason({"messages": messages}, "messages").startswith(expected)


def test_another_template():
    with pytest.raises(ValueError, match="--chat-template FILE"):
        run({"messages": TALK}, "messages", None)
    assert parts(run({"messages": TALK[1:3]}, "messages", None, chat_template=PLAIN)) == [
        ("user:Hi\nassistant:", False),
        ("Hello\n", True),
    ]


def test_tools_reach_the_template():
    template = "{% if tools %}[{{ tools[0].function.name }}]{% endif %}" + CHATML
    tool = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}
    for tools in ([tool], '[{"type": "function", "function": {"name": "clock"}}]'):
        (prompt, _), *_ = parts(run({"messages": TALK, "tools": tools}, "messages", template))
        assert prompt.startswith("[clock]<|im_start|>")


def test_a_batch_keeps_the_order_of_rows():
    made = formatter(FormatConfig(name="prompt"), tokenizer())
    rows = [{"prompt": "a", "completion": c} for c in ("1", "", "22", "333")]
    rows.insert(1, BadRow("other:7", "why"))
    found = examples(made, rows, lambda i: f"file:{i}")
    assert [None if isinstance(f, BadRow) else len(f.ids) for f in found] == [3, None, None, 4, 5]
    assert [str(f)[:7] for f in found if isinstance(f, BadRow)] == ["other:7", "file:2:"]


def test_a_real_template(smollm2_gguf):
    """SmolLM2's, which adds a system message of its own."""
    from jaxlm.opening import open_checkpoint

    real = open_checkpoint(smollm2_gguf).tokenizer()
    (example,) = examples(formatter(FormatConfig(name="messages"), real), [{"messages": TALK[1:]}], str)
    bounds = np.flatnonzero(np.diff(example.mask)) + 1
    with_loss = [real.decode(ids) for ids in np.split(example.ids, bounds)[1::2]]
    assert with_loss == ["Hello<|im_end|>\n", "Yes?<|im_end|>\n"]
    assert real.decode(example.ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
