from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM
from trl.trainer.utils import add_fused_lm_head

from posttrain.errors import DataError
from posttrain.train.branches import can_branch, score_branches
from posttrain.train.head import prefer_plain_head
from posttrain.train.pairs import encode_marked, marked_table
from tests.unit.train.pair_programs import (
    answers_stage_dir,
    make_marked,
    make_marked_dataset,
    make_pair_dataset,
    make_reference,
    run_here,
)


def test_it_scores_every_answer_and_the_exchanged_ones(tiny_model: Path, tmp_path: Path) -> None:
    data = make_marked_dataset(tmp_path / "marked", train=6, held_out=4)
    folder = make_reference(tmp_path / "stage", "kto", tiny_model, data)
    found = pq.read_table(folder / "reference.parquet").to_pydict()
    assert found["side"] == ["train"] * 6 + ["held_out"] * 4
    assert found["id"][:6] == [row.id for row in make_marked(6)]
    assert found["label"][:6] == [row.label for row in make_marked(6)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    answers = encode_marked(AutoTokenizer.from_pretrained(tiny_model), make_marked(6), 64)
    table = marked_table(answers, 64, 1).dataset
    for column, answer in (("logp", "completion_ids"), ("kl_logp", "KL_completion_ids")):
        for entry in range(6):
            prompt, ids = table["prompt_ids"][entry], table[answer][entry]
            with torch.no_grad():
                scores = model(torch.tensor([prompt + ids])).logits[0, :-1].log_softmax(-1)
            own = scores[-len(ids) :].gather(1, torch.tensor(ids)[:, None]).sum()
            assert found[column][entry] == pytest.approx(float(own), abs=1e-3)


def test_the_batch_changes_nothing_and_the_same_run_leaves_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = make_pair_dataset(tmp_path / "pairs", train=6, held_out=4)
    folders = [
        make_reference(tmp_path / str(n), "dpo", tiny_model, data, micro_batch_size=size)
        for n, size in enumerate((8, 8, 1))
    ]
    files = [folder / "reference.parquet" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()
    one, many = (pq.read_table(files[n]).to_pydict() for n in (2, 0))
    for column in ("chosen_logp", "rejected_logp"):
        assert one[column] == pytest.approx(many[column], abs=1e-3)


def test_a_reference_of_other_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = make_pair_dataset(tmp_path / "pairs", train=6, held_out=4)
    other = make_pair_dataset(tmp_path / "other", train=8, held_out=4)
    folder = make_reference(tmp_path / "reference", "dpo", tiny_model, other)
    stage_dir = answers_stage_dir(tmp_path / "dpo", "dpo", tiny_model, data, cached=folder)
    with pytest.raises(DataError, match="of other rows"):
        run_here("dpo", stage_dir)


@pytest.mark.parametrize("window", [None, 4])
def test_answers_that_share_a_row_are_scored_as_if_alone(window: int | None) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    model = MistralForCausalLM(config).eval()
    prefer_plain_head()
    add_fused_lm_head(model)
    entries = [([5, 6, 7, 8, 9, 10, 11, 12], [[13, 14, 15], [16, 17]]), ([3], [[4], [5, 6, 7, 8]])]
    with torch.inference_mode():
        alone = [
            [
                float(
                    model(torch.tensor([prompt + answer]))
                    .logits[0, len(prompt) - 1 : -1]
                    .log_softmax(-1)
                    .gather(1, torch.tensor(answer)[:, None])
                    .sum()
                )
                for answer in answers
            ]
            for prompt, answers in entries
        ]
        sums = torch.tensor(alone[0])
        # A window counts positions in the row, and a branch's are not its own.
        assert can_branch(model, entries[0], sums) == (window is None)
        if window is None:
            found = score_branches(model, entries)
            assert found.tolist() == [pytest.approx(line, abs=1e-4) for line in alone]
