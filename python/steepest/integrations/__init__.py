"""Small modules for frameworks that want an optimizer in a shape of their own.

transformers   what `Trainer(optimizer_cls_and_kwargs=...)` takes
timm           names for `create_optimizer_v2`
torchtitan     an `OptimizersContainer` that knows the names; it is imported with torchtitan

The first two import their framework when they are called. Others need none: docs/integrations has a page for each.
"""
