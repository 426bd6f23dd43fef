"""What changed in transformers' modeling_attn_mask_utils from release to release.

Nothing about a release is decided anywhere but in the table here.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Behaviour:
    """The file from one release on. False is what 4.35 did, unless a comment differs."""

    since: tuple[int, int, int]

    combines_by_adding: bool = True
    """Causality and padding: a key masked by both holds -inf. Else it holds the minimum."""

    is_dataclass: bool = False
    """The converter. With it ``dtype`` lost its default and came before ``key_value_length``."""

    has_sdpa: bool = False
    """The two functions for scaled_dot_product_attention, and _unmask_unattended."""

    takes_4d_masks: bool = False
    """Of ones and zeros. Before, a mask of any rank was taken for one of rank 2."""

    fx_is_tracing: bool = False
    """An fx.Proxy, in the causal function for sdpa."""

    unmasks_while_tracing: bool = True

    wide_window: bool = False
    """A query attends to itself and W keys before it. Else to W keys, itself included."""

    unmasks_by_value: bool = False
    """Rows that hold the minimum throughout, on CUDA. Else rows before the first attended key."""

    compile_is_tracing: bool = False
    """torch.compile, and an fx.Proxy in the other function for sdpa, too."""

    has_ignore: bool = False
    """_ignore_causal_mask_sdpa, and with it a window that sdpa respects."""

    has_is_training: bool = False
    """An argument of that: training skips a mask of None even while tracing."""

    training_looks_while_tracing: bool = False
    """Training does so for a mask of ones, too."""

    passes_4d_masks: bool = False
    """Those for sdpa are additive already. Else they are ones and zeros."""

    checks_maximum: bool = False
    """Of a 4D mask that is passed."""

    looks_while_tracing: bool = True
    """The function for sdpa that is not causal, and gives None for a mask of ones even then."""

    all_ones_is_none: bool = False
    """In that function. Else only for one query, or as many as keys."""

    is_present: bool = False
    """attn_mask.modeling_attn_mask_utils: fake tensors and the capture of a CUDA stream are
    tracing, XPUs unmask."""

    @property
    def version(self) -> str:
        return ".".join(map(str, self.since))


def _history() -> tuple[Behaviour, ...]:
    known = [Behaviour(since=(4, 35, 0))]

    def change(minor: int, major: int = 4, **changes: bool) -> None:
        known.append(replace(known[-1], since=(major, minor, 0), **changes))

    change(36, combines_by_adding=False, is_dataclass=True, has_sdpa=True)
    change(37, takes_4d_masks=True, fx_is_tracing=True, unmasks_while_tracing=False)
    change(39, wide_window=True, unmasks_by_value=True, compile_is_tracing=True)
    change(40, has_ignore=True)
    change(
        41,
        has_is_training=True,
        training_looks_while_tracing=True,
        passes_4d_masks=True,
        checks_maximum=True,
        looks_while_tracing=False,
    )
    change(42, all_ones_is_none=True)
    change(45, checks_maximum=False)
    change(46, training_looks_while_tracing=False)
    change(0, major=5, is_present=True)
    return tuple(known)


BEHAVIOURS = _history()
