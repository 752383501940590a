"""Publishing on the Hugging Face Hub. Weights are loaded and checked by `timm_hne.pretrained`."""
from .card import render_card
from .folder import write_folder
from .publishing import publish

__all__ = ['publish', 'render_card', 'write_folder']
