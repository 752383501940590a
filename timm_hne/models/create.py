"""Creating a model by its name, and being told clearly if it is no hierarchical ensemble."""
import timm
from timm.models import load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path

from .ensemble import HierarchicalEnsemble

__all__ = ['check_ensemble', 'create_ensemble', 'has_weights']


def check_ensemble(model: object) -> HierarchicalEnsemble:
    """Return `model` if it is a hierarchical ensemble.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(
            f'model must be a hierarchical ensemble (timm_hne.HierarchicalEnsemble), got {type(model).__name__}.')
    return model


def has_weights(name: str) -> bool:
    """Return whether exactly this name, with a tag or without, is that of an ensemble with pretrained weights."""
    return timm.is_model_pretrained(name) and not _is_timms(name)


def _is_timms(architecture: str) -> bool:
    return timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith('timm.')


def create_ensemble(name: str, **kwargs) -> HierarchicalEnsemble:
    """Create a model by timm's `create_model` and make sure that it is a hierarchical ensemble.

    Args:
        name: As timm takes it: of a registered model, or 'hf-hub:user/name', or 'local-dir:folder'.
        **kwargs: Further arguments of `create_model`.

    Raises:
        ValueError: It is none.
    """
    # timm's own models, which timm may unpickle, are refused before their weights are fetched.
    source, architecture = parse_model_name(name)
    try:
        if source == 'hf-hub':
            _, architecture, _ = load_model_config_from_hf(architecture, cache_dir=kwargs.get('cache_dir'))
        elif source == 'local-dir':
            _, architecture, _ = load_model_config_from_path(architecture)
    except (AttributeError, KeyError, TypeError) as error:  # what timm makes of the config.json of another library
        raise ValueError(f"{name} is no model of timm: its config.json lacks timm's keys ({error}).") from error
    model = None if _is_timms(architecture) else timm.create_model(name, **kwargs)
    if not isinstance(model, HierarchicalEnsemble):
        raise ValueError(f'model must be a hierarchical ensemble, such as {timm.list_models("hne_*")}, got {name!r}.')
    return model
