"""The output head on a CPU: only labelled positions, by the plain kernels.

TRL projects hidden states to the vocabulary in small tiles, written for GPUs, where the logits of a
batch do not fit. On a CPU that takes three times as long as one large product (1,500 positions of a
135M model with 49,152 words on two cores in bfloat16: 3.2 s against 0.9 s, forward and backward).

Importing this module imports TRL and torch: do it inside functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import trl.trainer.utils
from torch.utils.checkpoint import checkpoint

from posttrain.estimate.activations import HEAD_KEPT, HEAD_LOGITS


def prefer_plain_head() -> None:
    """Compute TRL's fused head this way where there is no GPU.

    TRL leaves out positions without a label where Triton runs. Elsewhere it scores all of them,
    lest shapes change from batch to batch and a compiler start again; on a CPU nothing is compiled.
    """
    if not torch.cuda.is_available():
        trl.trainer.utils._use_triton = lambda _device: True
        trl.trainer.utils._ChunkedLogProbFunction = PlainLogProbs


class PlainLogProbs:
    """Stands in for TRL's autograd function of the same arguments."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of the targets.

        Args:
            hidden: Of shape [positions, width].
            weight: Of shape [vocabulary, width].
            bias: Of shape [vocabulary], or None.
            targets: Of shape [positions].
            temperature: Logits are divided by it.
            chunk_size: TRL's; `HEAD_LOGITS` takes its place.
            softcap: Bound of the logits, softcap * tanh(logits / softcap), or None.
            logit_scale: Logits are multiplied by it.
            outputs: What TRL wants to log beside. Of a pass without gradient nothing is logged,
                nor is anything of next-token training, which asks for hits and no mean logit:
                there all of it is zero.

        Returns:
            As TRL's, each of shape [positions]: log-probabilities, entropy, logarithm of the sum of
            squared probabilities, mean logit, and whether the target is the likeliest token.
        """
        del chunk_size
        next_token = "is_top1" in outputs and "mean_logits" not in outputs
        logged = outputs if torch.is_grad_enabled() and not next_token else ()

        def score(states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = F.linear(states, weight, bias).float()
            # Each of these would copy the logits, and few models have any.
            if logit_scale != 1:
                logits = logits * logit_scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if temperature != 1:
                logits = logits / temperature
            log_probs = -F.cross_entropy(logits, wanted, reduction="none")
            return log_probs, *_statistics(logits.detach(), wanted, logged)

        positions = max(1, HEAD_LOGITS // weight.shape[0])
        pieces = list(zip(hidden.split(positions), targets.split(positions), strict=True))
        few = len(targets) * weight.shape[0] <= HEAD_KEPT
        if few or not torch.is_grad_enabled():
            scores = [score(states, wanted) for states, wanted in pieces]
        else:
            # Nothing is kept of a piece: it is computed again when it is its turn.
            scores = [
                checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
        return tuple(torch.cat(parts) for parts in zip(*scores, strict=True))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _statistics(
    logits: torch.Tensor, wanted: torch.Tensor, logged: tuple[str, ...]
) -> tuple[torch.Tensor, ...]:
    """Entropy, log of the sum of squared probabilities, mean logit and hits; zero if not logged."""
    nothing = torch.zeros_like(wanted, dtype=logits.dtype)
    entropy = squares = mean = nothing
    if "entropy" in logged:
        # H = log Z - E[logit]; the product needs no copy of the size of the logits.
        expected = torch.einsum("pv,pv->p", logits.softmax(-1), logits)
        entropy = logits.logsumexp(-1) - expected
    if "log_sum_sq_probs" in logged:
        squares = (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)
    if "mean_logits" in logged:
        mean = logits.mean(-1)
    hits = logits.argmax(-1) == wanted if "is_top1" in logged else nothing.bool()
    return entropy, squares, mean, hits
