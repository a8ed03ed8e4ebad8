"""Which parameter goes where: hidden matrices to the matrix method, everything else to AdamW, with a reason for each.

    route(model)            one Route per parameter: name, rule, reason, how it is read as matrices
    param_groups(model)     group dictionaries for any optimizer of this package
    fused_layouts(model)    overrides that take known fused projections apart
    summary(routes, ...)    the whole in one line, for a log

A parameter is decided once, in this order: frozen ones are left out; then the overrides of the user (`overrides.py`);
then the rules (`rules.py`: module type, name, what the model says, shape), asked of every place of a tied parameter;
the rest are matrices. What is known of other people's models is data, in `architectures.py`.
Only shapes and names are read, never values: a model on the meta device is routed like any other.
"""

from __future__ import annotations

from .groups import ADAMW_NUMBERS, param_groups, says_how, split_group
from .overrides import Overrides
from .places import Routable, check_not_flattened
from .routes import Route, fused_layouts, route, route_by_shape, warn_if_embedding_like
from .table import format_table, summary

__all__ = [
    "ADAMW_NUMBERS",
    "Overrides",
    "Routable",
    "Route",
    "check_not_flattened",
    "format_table",
    "fused_layouts",
    "param_groups",
    "route",
    "route_by_shape",
    "says_how",
    "split_group",
    "summary",
    "warn_if_embedding_like",
]
