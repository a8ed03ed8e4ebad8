"""One file per op: signature, shapes, formula, torch reference, fake and route (CUDA, then Triton, then torch)."""
