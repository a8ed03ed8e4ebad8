"""Attention logits, and how large they may become: QK-clip.

QKClip              rescales query and key weights after the step, head by head
AttentionLayer      which rows of which parameters are whose
attention_layers    those of a model, as far as its modules are known
max_logits          the largest logit of every head, from queries and keys
"""

from .clip import QKClip
from .discovery import attention_layers
from .layers import AttentionLayer
from .maxima import max_logits

__all__ = ["AttentionLayer", "QKClip", "attention_layers", "max_logits"]
