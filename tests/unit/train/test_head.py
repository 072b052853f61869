from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from posttrain.train import head
from posttrain.train.head import PlainLogProbs, prefer_plain_head

IGNORED = -100


@pytest.fixture
def trl_head(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Puts back what `prefer_plain_head` replaces."""
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(trl.trainer.utils, name, getattr(trl.trainer.utils, name))
    return monkeypatch


@pytest.mark.skipif(torch.cuda.is_available(), reason="TRL's own head is used on GPUs")
@pytest.mark.parametrize(("at_a_time", "kept"), [(2**26, 2**28), (3000, 2**28), (3000, 0)])
def test_the_head_scores_as_the_model_itself_does(
    tiny_model: Path, trl_head: pytest.MonkeyPatch, at_a_time: int, kept: int
) -> None:
    """Losses and gradients, in one piece, in pieces of five positions, and computed twice."""
    trl_head.setattr(head, "HEAD_LOGITS", at_a_time)
    trl_head.setattr(head, "HEAD_KEPT", kept)
    prefer_plain_head()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = torch.tensor([tokenizer("The door of the house is red.")["input_ids"]])
    labels = ids.clone()
    labels[0, :4] = IGNORED
    usual = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = usual(ids, labels=labels).loss
    expected.backward()
    ours = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_fused_lm_head(ours)
    out = ours(ids, labels=labels, fused_lm_head=True)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    assert out.log_probs.shape == (1, ids.shape[1] - 1)
    assert (out.log_probs[0, :3] == 0).all(), "nothing is scored without a label"
    for a, b in zip(usual.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_it_scales_and_bounds_logits_as_trl_does() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.randint(0, 11, (7,))
    arguments = (hidden, weight, bias, targets, 0.7, 1024, 5.0, 1.3, ("log_probs",))
    theirs = trl.trainer.utils._ChunkedLogProbFunction
    if theirs is PlainLogProbs:  # another test in this process has trained
        logits = 5.0 * torch.tanh((hidden @ weight.T + bias) * 1.3 / 5.0) / 0.7
        expected = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    else:
        expected = theirs.apply(*arguments)[0]
    torch.testing.assert_close(PlainLogProbs.apply(*arguments)[0], expected, atol=1e-5, rtol=1e-5)
