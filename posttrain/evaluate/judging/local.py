"""A local model as the judge: is A or B the likelier word after "The better answer is"?

Not what the model would write is read, but the likelihood of the two letters: that is a verdict
also from a model too small to keep to a form. Importing this module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from posttrain.data.rows import Message
from posttrain.errors import ModelError
from posttrain.evaluate.judging.pairs import ORDERS, Pair, Side, Vote, preferred
from posttrain.evaluate.judging.prompting import BEGUN, LETTER_ALONE, judging_prompt
from posttrain.hardware import ResolvedDType
from posttrain.recipe.judge import ModelJudge
from posttrain.stages.program import StageInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATER = "judge"

TOO_LONG = "longer than the judge reads"


def judge_locally(
    source: StageInput,
    pairs: Sequence[Pair],
    config: ModelJudge,
    dtype: ResolvedDType,
    tell: Callable[[int, int], None],
) -> list[Vote]:
    """The verdict of a local model on each pair, in both orders.

    A vote's `margin` is the log-odds of the candidate's letter, in nats.

    Args:
        source: A causal language model, or an adapter with its base.
        pairs: Without identical answers.
        config: What counts, and how many comparisons are read at once.
        dtype: Precision of the weights.
        tell: Told how many votes there are, of how many.

    Raises:
        ModelError: it cannot be loaded, has no single tokens for the two letters, or reads too few
            tokens for any comparison.
    """
    from posttrain.models import load_causal_lm, load_tokenizer
    from posttrain.train.rollout import batches_by_length

    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, dtype)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = [(pair, first) for pair in pairs for first in ORDERS]
    read = [_encode(tokenizer, pair, first, config.instructions) for pair, first in asked]
    votes: dict[int, Vote] = {}
    for batch in batches_by_length([len(ids) for ids, _ in read], config.batch_size):
        fits = [row for row in batch if window is None or len(read[row][0]) < window]
        odds = _log_odds(model, tokenizer, [read[row] for row in fits])
        votes |= {row: _unread(*asked[row]) for row in batch}
        votes |= {row: _vote(*asked[row], a) for row, a in zip(fits, odds, strict=True)}
        tell(len(votes), len(asked))
    if asked and all(vote.preferred is None for vote in votes.values()):
        raise ModelError(
            f"by.model: every comparison is longer than the {window:,} tokens that the judge "
            "reads; take another judge, or lower `max_prompt_tokens` and `max_new_tokens`"
        )
    return [votes[row] for row in range(len(asked))]


def _encode(
    tokenizer: PreTrainedTokenizerBase, pair: Pair, first: Side, instructions: str
) -> tuple[list[int], tuple[int, int]]:
    """What the judge reads, and the tokens of the two letters after it."""
    from posttrain.train.tokenize import render_chat

    asked = judging_prompt(pair, first, instructions, LETTER_ALONE)
    chat = bool(tokenizer.chat_template)
    text = (
        render_chat(tokenizer, [Message("user", asked)], add_generation_prompt=True)
        if chat
        else f"{asked}\n\n"
    )
    # Both replies are encoded as a whole: a tokenizer may join a blank to what follows or not.
    with_a, with_b = (
        list(tokenizer(f"{text}{BEGUN} {letter}", add_special_tokens=not chat)["input_ids"])
        for letter in "AB"
    )
    if with_a[:-1] != with_b[:-1] or with_a[-1] == with_b[-1]:
        # Some tokenizers end every sequence with a token of their own.
        with_a, with_b = with_a[:-1], with_b[:-1]
    if with_a[:-1] != with_b[:-1] or with_a[-1] == with_b[-1]:
        raise ModelError("the judge's tokenizer has no single tokens for A and B: take another one")
    return with_a[:-1], (with_a[-1], with_b[-1])


def _log_odds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: Sequence[tuple[list[int], tuple[int, int]]],
) -> list[float]:
    """Of each the log-odds of A: log p(A) - log p(B)."""
    import torch

    from posttrain.train.rollout import make_batch

    if not read:
        return []
    device = next(model.parameters()).device
    batch = make_batch(
        [ids for ids, _ in read], [[a] for _, (a, _) in read], tokenizer.pad_token_id, device
    )
    with torch.inference_mode():
        # Of the last two positions kept, the first is the one before the letter.
        logits = model(**batch.inputs()).logits[:, -2].float()
    letters = torch.tensor([letters for _, letters in read], device=device)
    of_letters = logits.gather(1, letters)
    return [float(odds) for odds in (of_letters[:, 0] - of_letters[:, 1]).cpu()]


def _vote(pair: Pair, first: Side, odds: float) -> Vote:
    choice = "tie" if odds == 0 else "A" if odds > 0 else "B"
    margin = odds if first == "candidate" else -odds
    return Vote(pair.id, RATER, first, preferred(choice, first), margin)  # type: ignore[arg-type]


def _unread(pair: Pair, first: Side) -> Vote:
    return Vote(pair.id, RATER, first, None, reply=TOO_LONG)
