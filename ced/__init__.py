"""CED: audio tagging with small vision transformers taught by Consistent Ensemble Distillation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ced.errors import optional_packages

if TYPE_CHECKING:
    from ced.model.loading import load_model as load_model
    from ced.model.zoo import list_models as list_models
    from ced.tag.tagger import Tagger as Tagger

__version__ = "0.1.0"
__all__ = ["Tagger", "__version__", "list_models", "load_model"]

_HOMES = {"Tagger": "ced.tag.tagger", "list_models": "ced.model.zoo", "load_model": "ced.model.loading"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import ced` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ced' has no attribute {name!r}")
    with optional_packages(f"ced.{name}"):
        return getattr(import_module(_HOMES[name]), name)
