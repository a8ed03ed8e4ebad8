"""Small modules for frameworks that want an optimizer in a shape of their own.

transformers   what `Trainer(optimizer_cls_and_kwargs=...)` takes
timm           names for `create_optimizer_v2`
llamafactory   its trainers of every stage make the optimizer, those of USE_V1 by a plugin
axolotl        a plugin with a section of the configuration; it is imported with axolotl
torchtitan     an `OptimizersContainer` that knows the names; it is imported with torchtitan
configuration  names and values as files have them

The first three import their framework when they are called. Others need none: docs/integrations has a page for each.
"""
