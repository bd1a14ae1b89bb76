"""The networks. `python -m resflax.models` prints the table of them."""

from resflax.models.count import Count, count
from resflax.models.published import Published, published
from resflax.models.zoo import argument_types, create_model, list_models, override_names

__all__ = [
    "Count",
    "Published",
    "argument_types",
    "count",
    "create_model",
    "list_models",
    "override_names",
    "published",
]
