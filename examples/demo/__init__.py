"""What `train_gpt.py` and `sweep.py` share: text, model, methods, training loop, progress bar and report."""
