"""Drop-in for ``transformers.modeling_attn_mask_utils``, on native operators.

Names, signatures, defaults, results and errors are those of transformers 5.23 (the results have
been the same since 4.45); docs/upstream.md lists the few differences. Additive masks hold 0 where a
query attends to a key and ``torch.finfo(dtype).min`` elsewhere, in float16, bfloat16, float32 or
float64.

Throughout: b batch_size, q query_length, kv key_value_length; a window of W lets a query attend to
itself and the W keys before it; a 2D mask attends where its value, cast to the result's dtype, is
1.
"""

import sys
from typing import TYPE_CHECKING

from attn_mask._transformers.releases import add_present

if TYPE_CHECKING:
    from attn_mask._transformers.legacy import *  # noqa: F403
    from attn_mask._transformers.legacy import __all__ as __all__

# Executes that file here: functions look up the class, and each other, in their own module.
add_present(sys.modules[__name__])
