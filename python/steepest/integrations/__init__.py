"""Small modules for frameworks that want an optimizer in a shape of their own.

transformers   what `Trainer(optimizer_cls_and_kwargs=...)` takes
timm           names for `create_optimizer_v2`

Each imports its framework when it is called. Lightning, Fabric and Accelerate need none: docs/integrations has a page
for each.
"""
