from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.data.rows import Chat, Document, Message
from posttrain.evaluate.perplexity import EncodedRow, score_rows, summarise
from posttrain.evaluate.samples import answer_prompts
from posttrain.events import EventReader, EventWriter, Progress
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.stages.program import StageInput
from posttrain.train.tokenize import encode_chat, encode_document

TEXTS = [
    "Short.",
    "A sentence of a few more words, to be padded against.",
    "x = 1\n" * 30,
    "Ä é 漢",
]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    source = StageInput(kind="model", path=str(tiny_model), digest="")
    return load_causal_lm(source, "float32"), load_tokenizer(source)


@pytest.fixture
def events(tmp_path: Path) -> EventWriter:
    return EventWriter(tmp_path / "events.jsonl")


def chat(*turns: str) -> Chat:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))  # type: ignore[arg-type]
    return Chat(id=turns[0], file="f", row=1, messages=messages)


def rows_of(tokenizer, kind: str) -> list[EncodedRow]:
    if kind == "documents":
        return [EncodedRow(text, encode_document(tokenizer, text, 512)) for text in TEXTS]
    chats = [chat("Why?", text, "And then?", "Nothing.") for text in TEXTS]
    return [EncodedRow(row.id, encode_chat(tokenizer, row.messages, 512)) for row in chats]


@pytest.mark.parametrize("kind", ["documents", "chats"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_padded_batches_give_each_row_its_own_likelihood(loaded, events, kind, batch_size):
    import torch

    model, tokenizer = loaded
    rows = rows_of(tokenizer, kind)
    scored = score_rows(model, tokenizer, rows, batch_size, events)
    assert [row.id for row in scored] == [row.id for row in rows]
    for row, result in zip(rows, scored, strict=True):
        ids = torch.tensor([row.encoded.input_ids])
        log_probs = model(ids).logits.detach().log_softmax(-1)[0]
        expected = [
            -float(log_probs[position, label])
            for position, label in enumerate(row.encoded.labels[1:])
            if label != -100
        ]
        assert result.nats == pytest.approx(sum(expected), rel=1e-5)
        assert result.tokens == len(expected)


def test_only_answers_of_chats_are_scored(loaded, events):
    model, tokenizer = loaded
    [result] = score_rows(
        model,
        tokenizer,
        [
            EncodedRow(
                "a", encode_chat(tokenizer, chat("A long question " * 9, "Ja.").messages, 512)
            )
        ],
        4,
        events,
    )
    assert result.bytes == len("Ja.")
    assert result.tokens < 10


def test_bytes_count_utf8_and_no_special_token(loaded, events):
    model, tokenizer = loaded
    answer = "Ä é 漢"
    row = EncodedRow("a", encode_chat(tokenizer, chat("?", answer).messages, 512))
    [result] = score_rows(model, tokenizer, [row], 1, events)
    assert result.bytes == len(answer.encode())


def test_a_peft_model_is_scored_with_its_adapter(tiny_model, loaded, events):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    rows = rows_of(tokenizer, "chats")
    before = score_rows(model, tokenizer, rows, 4, events)
    fresh = load_causal_lm(StageInput(kind="model", path=str(tiny_model), digest=""), "float32")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = score_rows(get_peft_model(fresh, config).eval(), tokenizer, rows, 4, events)
    assert all(a.nats != b.nats for a, b in zip(before, adapted, strict=True))
    assert [a.tokens for a in before] == [b.tokens for b in adapted]


def test_summary_is_weighted_by_tokens(loaded, events):
    model, tokenizer = loaded
    scored = score_rows(model, tokenizer, rows_of(tokenizer, "documents"), 4, events)
    summary = summarise(scored)
    nats, tokens = sum(row.nats for row in scored), sum(row.tokens for row in scored)
    assert summary.perplexity == pytest.approx(math.exp(nats / tokens))
    # An untrained model knows nothing: about as uncertain as a draw from its vocabulary.
    assert summary.perplexity == pytest.approx(len(tokenizer), rel=0.2)
    assert summary.bits_per_byte == pytest.approx(nats / math.log(2) / summary.bytes)


def test_groups_are_summed_up_by_themselves_where_there_are_several(loaded, events):
    model, tokenizer = loaded
    rows = rows_of(tokenizer, "documents")
    named = [
        replace(row, dataset="mix", group=name)
        for row, name in zip(rows, ["b", "a", "b", "b"], strict=True)
    ]
    scored = score_rows(model, tokenizer, named, 4, events)
    assert [(row.dataset, row.group) for row in scored] == [
        ("mix", "b"),
        ("mix", "a"),
        ("mix", "b"),
        ("mix", "b"),
    ]
    summary = summarise(scored)
    assert list(summary.groups) == ["a", "b"]
    assert summary.groups["a"] == summarise([scored[1]])
    assert summary.groups["b"] == summarise([scored[0], scored[2], scored[3]])
    assert summary.tokens == sum(group.tokens for group in summary.groups.values())
    assert summarise([replace(row, group="") for row in scored]) == summary.model_copy(
        update={"groups": {}}
    )


def test_progress_reaches_the_end(loaded, events, tmp_path):
    model, tokenizer = loaded
    score_rows(model, tokenizer, rows_of(tokenizer, "chats"), 2, events)
    progress = [e for e in EventReader(tmp_path / "events.jsonl").read() if isinstance(e, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert (progress[-1].done, progress[-1].total) == (4, 4)


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(loaded):
    model, tokenizer = loaded
    rows = [chat("Why?", "Because."), chat("What is the meaning of all this?", "None.")]
    together = answer_prompts(model, tokenizer, rows, 8)
    alone = [answer for row in rows for answer in answer_prompts(model, tokenizer, [row], 8)]
    assert together == alone
    assert [(sample.prompt, sample.reference) for sample in together] == [
        ("Why?", "Because."),
        ("What is the meaning of all this?", "None."),
    ]


def test_documents_are_continued_from_their_beginning(loaded):
    model, tokenizer = loaded
    text = "".join(f"line {number}\n" for number in range(100))
    row = Document(id="a", file="f", row=1, text=text)
    [sample] = answer_prompts(model, tokenizer, [row], 4)
    assert text.startswith(sample.prompt + sample.reference)


def test_no_rows_need_no_model(loaded):
    model, tokenizer = loaded
    assert answer_prompts(model, tokenizer, [], 4) == []
