"""What answers requests for images: the classifier that the page, the service and `timm-hne predict` share."""
from .classifier import Classifier
from .exported import ExportedEnsemble

__all__ = ['Classifier', 'ExportedEnsemble']
