"""Pictures as timm's own transform prepares them, the reference for prediction and evaluation."""
from timm.data import create_transform, resolve_model_data_config

from timm_hne.images import open_image


def load_image(path, model):
    """Return the picture of a file as `(1, C, H, W)`, prepared as the configuration of the model says."""
    image = open_image(path, 'L' if model.in_chans == 1 else 'RGB')
    return create_transform(**resolve_model_data_config(model))(image).unsqueeze(0)
