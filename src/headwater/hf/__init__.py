"""Hugging Face: influence for pretrained language models and their classifiers, on top of `headwater.torch`."""

try:
    import transformers as _transformers  # noqa: F401
except ImportError:
    from headwater.errors import MissingExtra

    raise MissingExtra("transformers", "hf") from None

from headwater.hf.influence import HfComposableInfluence
from headwater.hf.losses import NextToken, TokenLoss
from headwater.hf.provider import HfGradientProvider

__all__ = ["HfComposableInfluence", "HfGradientProvider", "NextToken", "TokenLoss"]
