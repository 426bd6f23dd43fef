"""What graphs and transforms make of operators: these modules register it."""

from attn_mask._graph import batching as batching
from attn_mask._graph import flops as flops
from attn_mask._graph import registrations as registrations
