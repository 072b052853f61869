"""The model card: what a model is, from the manifests of all that it was made from.

The same store gives the same card. Neither dates nor paths of the machine are in it.
"""

from posttrain.model_card.card import write_card

__all__ = ["write_card"]
