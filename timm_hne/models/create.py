"""Creating a model by its name, and being told clearly if it is no hierarchical ensemble."""
import timm

from .ensemble import HierarchicalEnsemble

__all__ = ['check_ensemble', 'create_ensemble']


def check_ensemble(model: object) -> HierarchicalEnsemble:
    """Return `model` if it is a hierarchical ensemble.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(
            f'model must be a hierarchical ensemble (timm_hne.HierarchicalEnsemble), got {type(model).__name__}.')
    return model


def create_ensemble(name: str, **kwargs) -> HierarchicalEnsemble:
    """Create a model by timm's `create_model` and make sure that it is a hierarchical ensemble.

    Raises:
        ValueError: It is none.
    """
    # timm's own models are refused before their weights are fetched.
    is_timms = timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('timm.')
    model = None if is_timms else timm.create_model(name, **kwargs)
    if not isinstance(model, HierarchicalEnsemble):
        raise ValueError(f'model must be a hierarchical ensemble, such as {timm.list_models("hne_*")}, got {name!r}.')
    return model
