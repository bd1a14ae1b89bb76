"""resflax: the residual-network laboratory for JAX.

import resflax
resflax.list_models("*resnext*")
model = resflax.create_model("se_resnext50_32x4d", num_classes=1000)
run = resflax.restore("runs/...")
"""

from resflax.models import count, create_model, list_models

__version__ = "0.1.0"
__all__ = ["count", "create_model", "list_models"]
